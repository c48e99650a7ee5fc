"""Whole files and folders, markers, locks: nothing of a user's is lost, whatever happens in between."""

import errno
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import skipdit.files.output
from skipdit.files.output import (
    DRAFT,
    MARKER,
    OutputFolder,
    atomic_file,
    atomic_folder,
    check_apart,
    check_whole,
    clean_up,
    output_folder,
    read_marker,
    remove_ours,
    to_json,
)
from skipdit.files.processes import LOCK, Process, locked, this_process


def tree(folder: Path) -> dict[str, str]:
    """Every path in a folder but markers, with its content."""
    return {
        path.relative_to(folder).as_posix(): path.read_text() if path.is_file() else "/"
        for path in sorted(folder.rglob("*"))
        if path.name != MARKER
    }


def write_folder(path: Path, kind: str = "model", **files: str) -> None:
    with atomic_folder(path, kind) as draft:
        for name, text in files.items():
            (draft / name).write_text(text)


# ----------------------------------------------------------------------------------------------------------------------
# One file


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with atomic_file(path) as draft:
        draft.write_text("first")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as draft:
        draft.write_text(f"half {1 / 0}" if draft.write_text("half") else "")
    assert tree(tmp_path) == {"deep": "/", "deep/file.txt": "first"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_file(tmp_path / "file") as draft:
            draft.unlink()  # as safetensors does, which writes a private file of its own
            os.close(os.open(draft, os.O_CREAT | os.O_WRONLY, 0o600))
        with atomic_folder(tmp_path / "folder", "model") as draft:
            (draft / "sub").mkdir(mode=0o700)
            os.close(os.open(draft / "sub" / "weights", os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    for name in ("file", "folder/sub/weights", f"folder/{MARKER}"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask, name
    for name in ("folder", "folder/sub"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o777 & ~umask, name


def test_files_are_on_disk_before_they_take_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(Path, "replace", lambda path, target: (order.append("place"), replace(path, target))[1])
    monkeypatch.setattr(Path, "rename", lambda path, target: (order.append("place"), rename(path, target))[1])
    with atomic_file(tmp_path / "file"):
        pass
    assert order == ["fsync", "place", "fsync"]
    order.clear()
    write_folder(tmp_path / "folder", weights="1")
    marker, whole = order.index("place"), len(order) - 1 - order[::-1].index("place")
    assert order[marker + 1 : whole] == ["fsync"] * 5  # the folder of the marker, both files, the folder, its name
    assert order[whole:] == ["place", "fsync"]


def test_a_file_system_that_syncs_no_folders_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def of_files(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", of_files)
    write_folder(tmp_path / "folder", a="1")
    assert tree(tmp_path) == {"folder": "/", "folder/a": "1"}


# ----------------------------------------------------------------------------------------------------------------------
# A folder as a whole


def test_a_failed_folder_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    write_folder(path, a="1")
    with pytest.raises(ZeroDivisionError), atomic_folder(path, "model") as draft:
        (draft / "c").write_text(f"{1 / (draft / 'b').write_text('')}")
    assert tree(tmp_path) == {"folder": "/", "folder/a": "1"}
    write_folder(path, b="3")
    assert tree(tmp_path) == {"folder": "/", "folder/b": "3"}
    check_whole(path, "model")


@pytest.mark.parametrize("name", ["config.json", "model_index.json", "state.json", MARKER, "thesis.tex"])
def test_folders_of_others_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "proj").mkdir()
    (tmp_path / "proj" / name).write_text("{}")
    with pytest.raises(FileExistsError, match=f"not written by skipdit.*{name}"):
        write_folder(tmp_path / "proj", a="1")
    assert list((tmp_path / "proj").iterdir()) == [tmp_path / "proj" / name]
    assert list(tmp_path.iterdir()) == [tmp_path / "proj"]


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "run", "checkpoint", a="1")
    with pytest.raises(FileExistsError, match="as a model"):
        write_folder(tmp_path / "run", "model", a="2")
    assert tree(tmp_path) == {"run": "/", "run/a": "1"}


def test_links_files_and_the_own_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "real", a="1")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "file").write_text("x")
    for name in ("link", "file"):
        with pytest.raises(FileExistsError, match="new name"):
            write_folder(tmp_path / name, a="2")
    monkeypatch.chdir(tmp_path / "real")
    with pytest.raises(FileExistsError, match="contains the working directory"):
        write_folder(Path("."), a="2")
    assert tree(tmp_path / "real") == {"a": "1"}


def test_a_path_that_turns_back_is_the_plain_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(Path("p"), a="1")
    write_folder(Path("p/../p"), a="2")
    assert tree(tmp_path) == {"p": "/", "p/a": "2"}


def test_what_a_user_put_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "pipeline"
    write_folder(path, a="1")
    (path / "notes.txt").write_text("mine")
    (path / "sub" / "deep").mkdir(parents=True)
    (path / "sub" / "other.bin").write_text("mine too")
    write_folder(path, b="2")
    expected = {"b": "2", "notes.txt": "mine", "sub": "/", "sub/deep": "/", "sub/other.bin": "mine too"}
    assert tree(path) == expected
    with pytest.raises(FileExistsError, match=r"notes\.txt"), atomic_folder(path, "model") as draft:
        (draft / "notes.txt").write_text("ours")
    assert tree(path) == expected
    remove_ours(path)
    assert "b" not in tree(path)
    assert tree(path)["notes.txt"] == "mine"


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [PermissionError, KeyboardInterrupt, OSError])
def test_the_old_folder_is_back_if_a_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, error: type[BaseException]
) -> None:
    path = tmp_path / "folder"
    write_folder(path, a="1")
    rename, calls = Path.rename, 0

    def fail_once(source: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise error("injected")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(error):
        write_folder(path, a="2")
    assert tree(tmp_path) == {"folder": "/", "folder/a": "1"}


def test_a_file_of_ours_that_a_user_has_changed_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "folder"
    write_folder(path, a="1", b="1")
    (path / "a").write_text("mine")
    with pytest.raises(FileExistsError, match="folder contains a, changed since skipdit wrote it"):
        write_folder(path, a="2")
    with pytest.raises(FileExistsError, match="b, changed"), atomic_folder(path, "model", overwritten=["a"]):
        (path / "b").write_text("changed while the new one was made")
    assert tree(tmp_path)["folder/a"] == "mine"
    with atomic_folder(path, "model", even_damaged=True) as draft:
        (draft / "a").write_text("3")
    assert tree(tmp_path) == {"folder": "/", "folder/a": "3"}
    (path / "a").write_text("mine")
    with atomic_folder(path, "model", overwritten=["a"]):
        pass
    assert tree(tmp_path) == {"folder": "/"}
    assert f"overwritten in {path}: a" in caplog.text


def test_ctrl_c_between_the_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename = tmp_path / "folder", Path.rename
    write_folder(path, a="1")

    def interrupted(source: Path, target: Path) -> Path:
        moved = rename(source, target)
        if source == path:
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(path, a="2")
    assert tree(tmp_path) == {"folder": "/", "folder/a": "1"}


def test_what_cannot_be_put_back_is_kept_for_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, rename = tmp_path / "folder", Path.rename
    write_folder(path, a="1")

    def fails(source: Path, target: Path) -> Path:
        if target == path:
            raise OSError("injected")
        return rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails)
        with pytest.raises(OSError, match="injected"):
            write_folder(path, a="2")
    assert "was kept because it could not be moved back: injected" in caplog.text
    clean_up(tmp_path)
    assert tree(tmp_path) == {"folder": "/", "folder/a": "1"}


KILLED = """
import os, signal, sys
from pathlib import Path
from skipdit.files.output import atomic_folder
rename, calls = Path.rename, 0
def dying(source, target):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(source, target)
Path.rename = dying
with atomic_folder(Path(sys.argv[1]), "model") as draft:
    (draft / "b").write_text("2")
"""


@pytest.mark.parametrize(("dies_at", "left"), [(1, "a"), (2, "a"), (3, "b")])
def test_a_killed_run_is_tidied_up_by_the_next(tmp_path: Path, dies_at: int, left: str) -> None:
    """Killed before the old folder is moved away, between the two renames, and before the user's file moved over."""
    path = tmp_path / "folder"
    write_folder(path, a="1")
    (path / "notes.txt").write_text("mine")
    result = subprocess.run([sys.executable, "-c", KILLED, str(path), str(dies_at)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert any(child.name.startswith(DRAFT) for child in tmp_path.iterdir())
    clean_up(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert tree(path) == {left: {"a": "1", "b": "2"}[left], "notes.txt": "mine"}


def test_drafts_of_the_living_stay(tmp_path: Path) -> None:
    parent = Process(host=this_process().host, pid=os.getppid(), started=0)
    elsewhere = Process(host="elsewhere", pid=1, started=1)
    for process in (parent, elsewhere):
        (tmp_path / f"{DRAFT}{process}.abcd.png").write_text("x")
    (tmp_path / f"{DRAFT}mine").write_text("not of this form")
    with atomic_file(tmp_path / "file.png") as draft:
        (draft.parent / ".tmpAbC123").touch()  # as safetensors does beside what it writes; it goes with the draft
        clean_up(tmp_path)
        assert draft.exists()
    assert len(tree(tmp_path)) == 4


def test_a_draft_of_another_host_goes_after_a_day_of_silence(tmp_path: Path) -> None:
    """Containers have a new name after each start."""
    write_folder(tmp_path / "folder", a="1")
    work = tmp_path / f"{DRAFT}elsewhere-1-1.abcd"
    (work / "new").mkdir(parents=True)
    (work / "target").write_text("folder")
    (tmp_path / "folder").rename(work / "old")
    clean_up(tmp_path)
    assert work.exists()
    for path in (work, *work.rglob("*")):
        os.utime(path, (0, 0))
    clean_up(tmp_path)
    assert tree(tmp_path) == {"folder": "/", "folder/a": "1"}


def test_an_output_may_not_hold_an_input(tmp_path: Path) -> None:
    (tmp_path / "run" / "pipeline").mkdir(parents=True)
    check_apart(tmp_path / "other", [tmp_path / "run"])
    for target in (tmp_path / "run", tmp_path / "run" / "pipeline", tmp_path / "x" / ".." / "run"):
        with pytest.raises(ValueError, match="contains the input"):
            check_apart(target, [tmp_path / "run" / "pipeline"])


def test_a_changed_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    write_folder(path, "checkpoint", a="1", b="2")
    check_whole(path, "checkpoint")
    (path / "a").write_text("3")
    with pytest.raises(ValueError, match="a is missing or has changed"):
        check_whole(path, "checkpoint")
    (path / MARKER).unlink()
    with pytest.raises(ValueError, match="no marker for a checkpoint"):
        check_whole(path, "checkpoint")


@pytest.mark.parametrize(
    "marker", ["", "[]", '{"files": {}}', '{"skipdit": "1", "files": {"model": {"../x": ""}}}', "[" * 9999]
)
def test_a_strange_marker_is_none(tmp_path: Path, marker: str) -> None:
    (tmp_path / MARKER).write_text(marker)
    assert read_marker(tmp_path)["files"] == {}
    with pytest.raises(FileExistsError, match=r"skipdit\.json was not written by skipdit"):
        OutputFolder(tmp_path, "sample", overwrite=True)
    with pytest.raises(FileExistsError, match=r"skipdit\.json"), atomic_folder(tmp_path, "model", overwritten="*"):
        pass
    assert (tmp_path / MARKER).read_text() == marker


# ----------------------------------------------------------------------------------------------------------------------
# A folder of outputs


def run(path: Path, *names: str, kind: str = "sample", overwrite: bool = False) -> None:
    out = OutputFolder(path, kind, overwrite=overwrite)
    out.claim(names)
    for name in names:
        out.write_text(name, f"{kind} wrote {name} with {names}")
    out.remove_earlier()


def test_an_output_replaces_and_removes_only_its_own(tmp_path: Path) -> None:
    (tmp_path / "full.mp4").write_text("mine")
    run(tmp_path, "full.png", "samples/1.png")
    run(tmp_path, "pareto.png", kind="calibrate")
    run(tmp_path, "full.png")
    assert tree(tmp_path) == {
        "full.mp4": "mine",
        "full.png": "sample wrote full.png with ('full.png',)",
        "pareto.png": "calibrate wrote pareto.png with ('pareto.png',)",
    }
    for name, kind in (("full.mp4", "sample"), ("pareto.png", "sample"), ("full.png", "calibrate")):
        with pytest.raises(FileExistsError, match=name):
            run(tmp_path, name, kind=kind)
    assert (tmp_path / "full.mp4").read_text() == "mine"


def test_what_a_user_has_changed_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, "report.md", "full.png")
    (tmp_path / "report.md").write_text("with my notes")
    with pytest.raises(FileExistsError, match=r"report\.md"):
        run(tmp_path, "report.md")
    run(tmp_path, "full.png")
    assert (tmp_path / "report.md").read_text() == "with my notes"
    with caplog.at_level(logging.WARNING):
        run(tmp_path, "report.md", overwrite=True)
    assert "report.md" in caplog.text
    assert (tmp_path / "report.md").read_text() != "with my notes"


def test_a_killed_output_may_be_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the marker lists the new file and before it takes its place, or right after."""
    run(tmp_path, "a")
    replace = Path.replace

    def dying(source: Path, target: Path) -> Path:
        if target.name == "a":
            raise KeyboardInterrupt
        return replace(source, target)

    out = OutputFolder(tmp_path, "sample")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            out.write_text("a", "2")
    OutputFolder(tmp_path, "sample").write_text("a", "2")
    OutputFolder(tmp_path, "sample").write_text("a", "3")
    assert tree(tmp_path) == {"a": "3"}


def test_empty_folders_of_a_user_stay(tmp_path: Path) -> None:
    run(tmp_path, "samples/1.png", "full.png")
    (tmp_path / "notes").mkdir()
    run(tmp_path, "full.png")
    assert list(tree(tmp_path)) == ["full.png", "notes"]


def test_one_file_is_removed_unless_it_was_changed(tmp_path: Path) -> None:
    run(tmp_path, "a", "b")
    (tmp_path / "b").write_text("mine")
    out = OutputFolder(tmp_path, "sample")
    for name in ("a", "b", "c"):
        out.remove(name)
    assert tree(tmp_path) == {"b": "mine"}
    assert list(read_marker(tmp_path)["files"]["sample"]) == ["b"]


def test_a_stopped_run_notes_what_it_has_written(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        with output_folder(path, "sample") as out:
            assert (tmp_path / "out" / LOCK).exists()
            for name in ("b", "a", "c"):
                out.write_text(name, "")
            out.remove("c")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        write(tmp_path / "x" / ".." / "out")
    assert stopped.value.__notes__ == [f"{tmp_path / 'out'} keeps a, b"]
    assert list(tree(tmp_path / "out")) == ["a", "b"]


def test_a_folder_of_others_is_overwritten_by_patterns_of_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    project = tmp_path / "project"
    (project / "src").mkdir(parents=True)
    old = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    for name in ("config.json", *old, "mine.safetensors", "thesis.tex", "src/main.py", "src/model.safetensors"):
        (project / name).write_text("mine")
    with pytest.raises(FileExistsError, match="was not written by skipdit as a model"):
        write_folder(project, **{"config.json": "ours"})
    with (
        pytest.raises(FileExistsError, match=r"did not write: thesis\.tex"),
        atomic_folder(project, "model", overwritten=("config.json",)) as draft,
    ):
        (draft / "thesis.tex").write_text("ours")
    with atomic_folder(project, "model", overwritten=("*", "*/*")) as draft:
        for name in ("config.json", "model.safetensors"):
            (draft / name).write_text("ours")
    assert tree(project) == {
        "config.json": "ours",
        "mine.safetensors": "mine",
        "model.safetensors": "ours",
        "src": "/",
        "src/main.py": "mine",
        "src/model.safetensors": "mine",
        "thesis.tex": "mine",
    }
    assert caplog.messages == [f"overwritten in {project}: {', '.join(['config.json', *old])}"]
    assert [path.name for path in tmp_path.iterdir()] == ["project"]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):  # noqa: PT011
        OutputFolder(tmp_path / "file", "sample")


# ----------------------------------------------------------------------------------------------------------------------
# Locks


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        with pytest.raises(BlockingIOError, match=f"in use by process {os.getpid()}"), locked(tmp_path / "run"):
            pass
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "run"):
        pass
    assert tree(tmp_path) == {"run": "/", "other": "/"}


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "thesis.tex")
    with pytest.raises(OSError, match=LOCK), locked(tmp_path / "run"):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_the_lock_of_a_folder_that_was_made_again_stays(tmp_path: Path) -> None:
    with ExitStack() as first:
        first.enter_context(locked(tmp_path / "run"))
        shutil.rmtree(tmp_path / "run")
        with locked(tmp_path / "run"):
            first.close()
            with pytest.raises(BlockingIOError), locked(tmp_path / "run"):
                pass


HOLDS = """
import sys, time
from pathlib import Path
from skipdit.files.processes import locked
with locked(Path(sys.argv[1])):
    print(1, flush=True)
    time.sleep(60)
"""


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(BlockingIOError, match=f"by process {holder.pid} on"), locked(tmp_path):
            pass
        holder.kill()
        holder.wait()
        with caplog.at_level(logging.WARNING), locked(tmp_path):
            assert f"process {holder.pid}" in caplog.text
    assert tree(tmp_path) == {}


def test_the_lock_of_another_host_is_kept_while_it_is_fresh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / LOCK).write_text("elsewhere-12-34")
    with pytest.raises(BlockingIOError, match="process 12 on elsewhere"), locked(tmp_path):
        pass
    os.utime(tmp_path / LOCK, (0, 0))
    with caplog.at_level(logging.WARNING), locked(tmp_path):
        assert "elsewhere" in caplog.text


def test_many_threads_take_turns(tmp_path: Path) -> None:
    inside, most, refused = 0, 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most, refused
        for _ in range(20):
            try:
                with locked(tmp_path):
                    with guard:
                        inside += 1
                        most = max(most, inside)
                    with guard:
                        inside -= 1
            except BlockingIOError:
                with guard:
                    refused += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert refused < 80


# ----------------------------------------------------------------------------------------------------------------------
# JSON


@given(
    st.recursive(
        st.floats() | st.integers() | st.text() | st.none(),
        lambda each: st.lists(each) | st.dictionaries(st.text(), each),
    )
)
def test_json_is_valid_whatever_the_numbers(value: object) -> None:
    text = to_json(value)
    assert "NaN" not in text.replace('"NaN', "") or "NaN" in str(value)
    assert skipdit.files.output.json.loads(text, parse_constant=pytest.fail) == skipdit.files.output._plain(value)


def test_a_file_that_grows_stays_ours(tmp_path: Path) -> None:
    out = OutputFolder(tmp_path, "training")
    assert out.grow("log.jsonl")
    for text in ("1", "2"):
        with (tmp_path / "log.jsonl").open("a") as file:
            file.write(text)
        OutputFolder(tmp_path, "training").claim(["log.jsonl"])
    with pytest.raises(FileExistsError, match=r"log\.jsonl"):
        OutputFolder(tmp_path, "sample").claim(["log.jsonl"])
    (tmp_path / "other.jsonl").write_text("mine")
    assert not OutputFolder(tmp_path, "training", overwrite=True).grow("other.jsonl")
