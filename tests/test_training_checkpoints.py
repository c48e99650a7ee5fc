"""Checkpoints and outputs: only ours are counted, replaced or believed; what others put there stays."""

import dataclasses
import json
import logging
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import assert_same_run, checkpoint_names, make_config, make_data, names, read_log, tensors_of

import skipdit.training.loop
from skipdit.checkpoints import load_model
from skipdit.data.pictures import DataConfig
from skipdit.diffusion import Objective
from skipdit.files.output import MARKER, atomic_folder, read_marker
from skipdit.files.processes import locked
from skipdit.files.untrusted import file_digest
from skipdit.loading import load_source
from skipdit.pipelines import ClassToImagePipeline
from skipdit.recipes import RECIPES
from skipdit.tasks.class_to_image import ModelConfig
from skipdit.tasks.text_to_image import TextToImageModelConfig
from skipdit.training import SpectralConfig, TrainConfig, checkpointing, learning_rate_at, train
from skipdit.training.checkpointing import PREVIOUS, checkpoint_path, list_checkpoints, step_of
from skipdit.training.reporter import refuse_inputs
from skipdit.training.stopping import Stopped


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return make_config(make_data(tmp_path / "data"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    """A run of six steps with two checkpoints, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    config = make_config(make_data(folder / "data"))
    train(config, folder / "run", device="cpu")
    return config, folder / "run"


@pytest.fixture
def run(finished: tuple[TrainConfig, Path], tmp_path: Path) -> tuple[TrainConfig, Path]:
    shutil.copytree(finished[1], tmp_path / "run")
    return finished[0], tmp_path / "run"


def longer(config: TrainConfig, max_steps: int = 8) -> TrainConfig:
    return dataclasses.replace(config, max_steps=max_steps)


def sign_anew(checkpoint: Path) -> None:
    """Make the marker of a checkpoint agree with its files, as somebody who rewrites both would."""
    marker = json.loads((checkpoint / MARKER).read_text())
    marker["files"] = {"checkpoint": {name: file_digest(checkpoint / name) for name in marker["files"]["checkpoint"]}}
    (checkpoint / MARKER).write_text(json.dumps(marker))


# ----------------------------------------------------------------------------------------------------------------------
# Which folders are checkpoints


def test_only_our_names_and_markers_are_checkpoints(tmp_path: Path) -> None:
    for step in (9_999_995, 10_000_000, 5):
        with atomic_folder(checkpoint_path(tmp_path, step), "checkpoint") as draft:
            (draft / "state.json").write_text("{}")
    for name in ("checkpoint-500", "checkpoint-best", "checkpoint-0000005-keep", "checkpoint-0000005.bak",
                 "checkpoint-00000005"):  # fmt: skip
        shutil.copytree(checkpoint_path(tmp_path, 5), tmp_path / name)
    (tmp_path / "checkpoint-0000007").mkdir()  # not ours
    (tmp_path / "checkpoint-0000008").symlink_to("checkpoint-0000005")
    (tmp_path / "checkpoint-0000009").write_text("a file")
    assert checkpoint_names(tmp_path) == ["checkpoint-0000005", "checkpoint-9999995", "checkpoint-10000000"]
    assert step_of(Path("checkpoint-1" + "0" * 400)) is None


def test_folders_of_others_are_not_rotated_resumed_from_or_in_the_way(run: tuple[TrainConfig, Path]) -> None:
    config, out = run
    strangers = ("checkpoint-best", "checkpoint-good", "checkpoint-0000006-keep", "checkpoint-0000003.bak")
    for name in strangers:
        shutil.copytree(out / "checkpoint-0000003", out / name)
    (out / "checkpoint-500").mkdir()
    (out / "checkpoint-500" / "optimizer.bin").write_text("precious")
    (out / "checkpoint-0000008").mkdir()  # empty
    before = {name: names(out / name) for name in (*strangers, "checkpoint-500")}
    for resume in (True, False):
        train(dataclasses.replace(longer(config), checkpoint_every=1), out, resume=resume, device="cpu")
        assert checkpoint_names(out) == ["checkpoint-0000007", "checkpoint-0000008"]
        assert {name: names(out / name) for name in (*strangers, "checkpoint-500")} == before
    assert [entry["step"] for entry in read_log(out)] == list(range(1, 9))


def test_a_checkpoint_of_others_in_the_way_is_refused_before_the_first_step(
    config: TrainConfig, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    (out / "checkpoint-0000006").mkdir(parents=True)
    (out / "checkpoint-0000006" / "weights.bin").write_text("precious")
    with pytest.raises(FileExistsError, match=r"checkpoint-0000006 was not written by skipdit.*weights\.bin"):
        train(config, out, device="cpu")
    assert names(out) in (["checkpoint-0000006"], ["checkpoint-0000006", MARKER])


def test_notes_in_a_checkpoint_outlive_its_rotation(run: tuple[TrainConfig, Path]) -> None:
    config, out = run
    (out / "checkpoint-0000003" / "notes.txt").write_text("mine")
    train(longer(config), out, device="cpu")
    assert names(out / "checkpoint-0000003") == ["notes.txt"]
    assert checkpoint_names(out) == ["checkpoint-0000006", "checkpoint-0000008"]


# ----------------------------------------------------------------------------------------------------------------------
# Beginning anew


def test_old_checkpoints_stay_until_a_new_one_stands(
    run: tuple[TrainConfig, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = run
    kept = tensors_of(out / "checkpoint-0000006")

    def fails(config: TrainConfig, step: int) -> float:
        if step == 2:
            raise KeyboardInterrupt
        return learning_rate_at(config, step)

    monkeypatch.setattr(skipdit.training.loop, "learning_rate_at", fails)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(config, out, resume=False, device="cpu")
        assert checkpoint_names(out) == []
        assert checkpoint_names(out / PREVIOUS) == ["checkpoint-0000003", "checkpoint-0000006"]
    monkeypatch.undo()
    back = tensors_of(out / PREVIOUS / "checkpoint-0000006")
    assert all(torch.equal(tensor, back[name]) for name, tensor in kept.items())
    train(dataclasses.replace(config, max_steps=4, seed=1), out, resume=False, device="cpu")
    assert checkpoint_names(out) == ["checkpoint-0000003", "checkpoint-0000004"]
    assert not (out / PREVIOUS).exists()


def test_a_stop_or_a_kill_after_no_resume_destroys_no_earlier_run(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out, config = tmp_path / "run", dataclasses.replace(config, ema_snapshots_every=3)
    train(config, out, device="cpu")
    before = tree(out)
    kept = [name for name in before if name.startswith(("checkpoint", "ema-snapshots/", "log"))]

    def interrupted(act: Callable[[], None]) -> Callable[[TrainConfig, int], float]:
        def rate(config: TrainConfig, step: int) -> float:
            if step == 1:
                act()
            return learning_rate_at(config, step)

        return rate

    def kill() -> None:
        raise RuntimeError("as if killed")

    monkeypatch.setattr(skipdit.training.loop, "learning_rate_at", interrupted(kill))
    with pytest.raises(RuntimeError, match="as if killed"):
        train(longer(config, 100), out, resume=False, device="cpu")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"an earlier run are in .*previous-run, and .* has none: move"):
        train(config, out, device="cpu")
    monkeypatch.setattr(
        skipdit.training.loop, "learning_rate_at", interrupted(lambda: os.kill(os.getpid(), signal.SIGTERM))
    )
    for _ in range(2):
        with pytest.raises(Stopped, match=r"the checkpoints of an earlier run are in .*previous-run"):
            train(longer(config, 100), out, resume=False, device="cpu")
        assert checkpoint_names(out) == ["checkpoint-0000002"]
        assert {name: tree(out / PREVIOUS)[name] for name in kept} == {name: before[name] for name in kept}
    assert checkpoint_names(out / f"{PREVIOUS}-2") == ["checkpoint-0000002"]
    monkeypatch.undo()
    back = tmp_path / "back"
    shutil.copytree(out, back)
    for path in (path for path in sorted((back / PREVIOUS).rglob("*")) if path.is_file()):
        if (name := path.relative_to(back / PREVIOUS)) != Path(MARKER):
            (back / name).parent.mkdir(exist_ok=True)
            path.rename(back / name)
    train(longer(config), back, device="cpu")
    assert "previous-run-2, until the next" in caplog.text
    assert [entry["step"] for entry in read_log(back)] == [*range(1, 9)]
    train(config, out, device="cpu")
    assert not list(out.glob(f"{PREVIOUS}*"))


def tree(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_folder_of_one_class_may_be_renamed(tmp_path: Path) -> None:
    """As one that has moved, unless its name is what its pictures are called."""
    data = make_data(tmp_path / "data") / "red"
    for path in list(data.glob("*.png")):
        path.with_suffix(".txt").write_text("a red one")
    config, out = make_config(data, max_steps=3), tmp_path / "run"
    train(config, out, device="cpu")
    renamed = data.rename(tmp_path / "crimson")
    train(make_config(renamed, max_steps=4), out, device="cpu")
    assert [entry["step"] for entry in read_log(out)] == [1, 2, 3, 4]
    (renamed / "0.txt").unlink()
    with pytest.raises(ValueError, match="other labels or captions now"):
        train(make_config(renamed, max_steps=5), out, device="cpu")


def test_a_folder_of_a_user_for_a_previous_run_stays(run: tuple[TrainConfig, Path]) -> None:
    config, out = run
    shutil.copytree(out / "checkpoint-0000003", out / PREVIOUS / "checkpoint-0000003")
    train(longer(config), out, device="cpu")
    assert checkpoint_names(out / PREVIOUS) == ["checkpoint-0000003"]
    with pytest.raises(FileExistsError, match="previous-run was not written by skipdit"):
        train(config, out, resume=False, device="cpu")
    assert checkpoint_names(out) == ["checkpoint-0000006", "checkpoint-0000008"]
    assert checkpoint_names(out / PREVIOUS) == ["checkpoint-0000003"]


# ----------------------------------------------------------------------------------------------------------------------
# Which checkpoints are believed


def cut(checkpoint: Path) -> None:
    path = checkpoint / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:40])


def flip_a_bit(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def empty_the_moments(checkpoint: Path) -> None:
    save_file({}, checkpoint / "optimizer.safetensors")


def lose_a_moment(checkpoint: Path) -> None:
    moments = load_file(checkpoint / "optimizer.safetensors")
    moments.popitem()
    save_file(moments, checkpoint / "optimizer.safetensors")
    sign_anew(checkpoint)


def forget_all_moments(checkpoint: Path) -> None:
    empty_the_moments(checkpoint)
    sign_anew(checkpoint)


def spoil_a_weight(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = math.nan
    save_file(weights, checkpoint / "model.safetensors")
    sign_anew(checkpoint)


def reshape_a_weight(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name][None]}, checkpoint / "model.safetensors")
    sign_anew(checkpoint)


def state_of(**changes: object) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        state = json.loads((checkpoint / "state.json").read_text()) | changes
        (checkpoint / "state.json").write_text(json.dumps(state))
        sign_anew(checkpoint)

    return change


def text_of(text: str) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        (checkpoint / "state.json").write_text(text)
        sign_anew(checkpoint)

    return change


def take_files_of_another(checkpoint: Path) -> None:
    for name in ("model", "ema", "optimizer"):
        shutil.copy(checkpoint.parent / "checkpoint-0000003" / f"{name}.safetensors", checkpoint)


DAMAGES = {
    "cut": (cut, "ema.safetensors is missing or has changed"),
    "bit": (flip_a_bit, "model.safetensors is missing or has changed"),
    "empty moments": (empty_the_moments, "optimizer.safetensors is missing or has changed"),
    "files of another": (take_files_of_another, "safetensors is missing or has changed"),
    "no state": (lambda checkpoint: (checkpoint / "state.json").unlink(), "state.json is missing"),
    "a moment less": (lose_a_moment, "optimizer.safetensors does not fit this model"),
    "no moments": (forget_all_moments, "optimizer.safetensors does not fit this model"),
    "NaN": (spoil_a_weight, "non-finite numbers"),
    "shape": (reshape_a_weight, "model.safetensors does not fit this model"),
    "step": (state_of(step=3), "is of step 3"),
    "step inf": (text_of('{"step": Infinity}'), "Infinity"),
    "ema_step": (state_of(ema_step=0), "says 0 of 6 steps were averaged"),
    "config null": (state_of(config=None), "state.json is not as expected"),
    "list": (text_of("[]"), "state.json is not as expected"),
    "number": (text_of("5"), "state.json is not as expected"),
    "step -5": (state_of(step=-5), "state.json is of step -5"),
    "null": (text_of("null"), "state.json is not as expected"),
    "nested": (text_of("[" * 1000 + "]" * 1000), "nested"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_of_a_damaged_checkpoint_the_one_before_is_taken(
    name: str, run: tuple[TrainConfig, Path], finished: tuple[TrainConfig, Path], caplog: pytest.LogCaptureFixture
) -> None:
    config, out = run
    damage, message = DAMAGES[name]
    damage(out / "checkpoint-0000006")
    train(config, out, device="cpu")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith("checkpoint-0000006 cannot be used (")
    assert message in warning
    assert warning.endswith("the run resumes from checkpoint-0000003")
    assert "\n" not in warning
    assert_same_run(finished[1], out)


def test_where_no_checkpoint_fits_it_is_said(run: tuple[TrainConfig, Path]) -> None:
    config, out = run
    for path in list_checkpoints(out):
        cut(path)
    with pytest.raises(ValueError, match=r"0006 cannot be used .*; checkpoint-0000003 cannot be used .*--no-resume"):
        train(config, out, device="cpu")
    assert checkpoint_names(out) == ["checkpoint-0000003", "checkpoint-0000006"]


@pytest.mark.parametrize("name", ["cut", "files of another", "no state", "step", "config null", "null", "nested"])
def test_a_model_is_read_from_the_one_before_too(
    name: str, run: tuple[TrainConfig, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """The newest was an error if its weights were damaged, and passed over in silence if it had no state."""
    out = run[1]
    shutil.rmtree(out / "pipeline")  # as of a run that was stopped
    expected, newest = load_model(out / "checkpoint-0000003").state_dict(), load_model(out).state_dict()
    assert any(not torch.equal(newest[key], tensor) for key, tensor in expected.items())
    assert not caplog.records
    DAMAGES[name][0](out / "checkpoint-0000006")
    for model in (load_model(out), load_source(str(out), device="cpu").sampler.pipeline.transformer):
        assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in expected.items())
    first, second = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert first == second
    assert first.startswith(f"{out}/checkpoint-0000006 cannot be used (")
    assert ("state.json" if name not in ("cut", "files of another") else "ema.safetensors") in first
    assert first.endswith(": taking checkpoint-0000003")


def test_where_no_checkpoint_can_be_read_it_is_said(run: tuple[TrainConfig, Path]) -> None:
    out = run[1]
    shutil.rmtree(out / "pipeline")
    for path in list_checkpoints(out):
        cut(path)
    with pytest.raises(ValueError, match=r"0006 cannot be used .*; .*0003 cannot be used .*: give another checkpoint"):
        load_source(str(out), device="cpu")
    with pytest.raises(ValueError, match=r"0003/ema\.safetensors has changed since its run wrote it$"):
        load_model(out / "checkpoint-0000003")  # no other one than was asked for


def test_a_damaged_later_checkpoint_does_not_drive_out_new_ones(run: tuple[TrainConfig, Path]) -> None:
    config, out = run
    cut(out / "checkpoint-0000006")
    config = dataclasses.replace(config, num_checkpoints=1, checkpoint_every=1)
    seen = []
    save = checkpointing.save_checkpoint

    def watch(*arguments: object, **options: object) -> None:
        save(*arguments, **options)  # pyright: ignore
        seen.append(checkpoint_names(out))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing, "save_checkpoint", watch)
        train(config, out, device="cpu")
    assert seen == [["checkpoint-0000004", "checkpoint-0000006"], ["checkpoint-0000005", "checkpoint-0000006"],
                    ["checkpoint-0000006"]]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Going on with other settings or data


def test_settings_change_when_that_is_asked_for(
    run: tuple[TrainConfig, Path], caplog: pytest.LogCaptureFixture
) -> None:
    config, out = run
    slower = dataclasses.replace(longer(config), learning_rate=1e-5, gradient_clip=0.5)
    with pytest.raises(ValueError, match=r"other settings \(learning_rate, gradient_clip\): give --allow-changes"):
        train(slower, out, device="cpu")
    with pytest.raises(ValueError, match=r"other settings \(seed\): give another --out"):
        train(dataclasses.replace(slower, seed=3), out, device="cpu", allow_changes=True)
    train(slower, out, device="cpu", allow_changes=True)
    assert "from step 6 on, learning_rate is 1e-05 instead of 0.002" in caplog.messages
    assert [entry["learning_rate"] for entry in read_log(out)[6:]] == [
        learning_rate_at(slower, step) for step in (6, 7)
    ]
    train(longer(slower, 9), out, device="cpu")  # it is the run's own rate now


def test_a_checkpoint_that_is_older_than_a_setting_goes_on(run: tuple[TrainConfig, Path]) -> None:
    config, out = run
    path = out / "checkpoint-0000006" / "state.json"
    state = json.loads(path.read_text())
    for part, name in (("objective", "min_snr_gamma"), ("model", "long_skip")):
        assert (
            state["config"][part].pop(name) == json.loads(json.dumps(dataclasses.asdict(getattr(config, part))))[name]
        )
    path.write_text(json.dumps(state))
    sign_anew(path.parent)
    train(longer(config, 7), out, device="cpu")
    assert [entry["step"] for entry in read_log(out)] == [1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(ValueError, match=r"other settings \(objective\)"):
        train(longer(dataclasses.replace(config, objective=dataclasses.replace(config.objective, min_snr_gamma=5.0))),
              out, device="cpu")  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: (data / "blue").rename(data / "violet"), "now without blue and with violet"),
        (lambda data: (data / "blue" / "0.png").unlink(), "12 items then, 11 now"),
        (lambda data: (data / "red" / "0.png").rename(data / "blue" / "7.png"), "other labels or captions now"),
        (lambda data: (data / "red" / "0.txt").write_text("a red square"), "other labels or captions now"),
    ],
)
def test_other_data_is_refused(
    change: Callable[[Path], object], message: str, config: TrainConfig, tmp_path: Path
) -> None:
    train(config, tmp_path / "run", device="cpu")
    change(tmp_path / "data")
    with pytest.raises(ValueError, match=f"was trained on other data .{message}"):
        train(longer(config), tmp_path / "run", device="cpu")


def test_data_that_has_moved_is_the_same(config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(config, tmp_path / "run", device="cpu")
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    moved = dataclasses.replace(longer(config), data=DataConfig(source=str(tmp_path / "elsewhere"), image_size=8))
    train(moved, tmp_path / "run", device="cpu")
    assert any("the data is the same, but is now at" in message for message in caplog.messages)
    larger = dataclasses.replace(moved, data=dataclasses.replace(moved.data, image_size=16))
    with pytest.raises(ValueError, match=r"other settings \(data\.image_size\)"):
        train(larger, tmp_path / "run", device="cpu")


# ----------------------------------------------------------------------------------------------------------------------
# Other outputs


@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "samples/step-0000006.png"])
def test_files_of_others_are_refused_before_the_first_step(
    name: str, config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, out = dataclasses.replace(config, sample_every=3), tmp_path / "run"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text('{"event": 1}')
    with pytest.raises(FileExistsError, match=rf"{name}, which an earlier training did not write.*--overwrite"):
        train(config, out, device="cpu")
    assert (out / name).read_text() == '{"event": 1}'
    assert checkpoint_names(out) == []
    train(config, out, device="cpu", overwrite=True)
    assert f"{out / name} will be overwritten" in caplog.messages
    assert '{"event": 1}' not in (out / name).read_bytes().decode("latin-1")
    train(longer(config), out, device="cpu")  # ours now


def test_a_pipeline_of_others_is_refused_before_the_first_step(config: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "pipeline" / "vae").mkdir(parents=True)
    for name in ("model_index.json", "notes.txt", "vae/weights"):
        (out / "pipeline" / name).write_text("mine")
    with pytest.raises(FileExistsError, match="pipeline was not written by skipdit"):
        train(config, out, device="cpu")
    assert checkpoint_names(out) == []
    train(config, out, device="cpu", overwrite=True)
    assert (out / "pipeline" / "notes.txt").read_text() == (out / "pipeline" / "vae" / "weights").read_text() == "mine"
    ClassToImagePipeline.from_pretrained(out / "pipeline")


def test_odd_lines_in_our_log_stay_and_stop_nothing(run: tuple[TrainConfig, Path]) -> None:
    config, out = run
    odd = ["5", "{}", "null", "plain words", '{"event": 1}', "[" * 2000, "\xff\x00", ""]
    with (out / "log.jsonl").open("a", encoding="latin-1") as file:
        file.write("\n".join([*odd, '{"step": 7, "lo']))
    train(longer(config), out, device="cpu")
    lines = (out / "log.jsonl").read_text(encoding="latin-1").split("\n")
    assert lines[6:14] == odd
    assert [json.loads(line)["step"] for line in lines[:6] + lines[14:-1]] == list(range(1, 9))
    (out / "log.jsonl").write_text("")
    train(longer(config, 9), out, device="cpu")
    assert [entry["step"] for entry in read_log(out)] == [9]


def test_the_marker_of_a_run_lists_what_it_wrote(config: TrainConfig, tmp_path: Path) -> None:
    train(dataclasses.replace(config, sample_every=3), tmp_path / "run", device="cpu")
    listed = read_marker(tmp_path / "run")["files"]["training"]
    assert sorted(listed) == ["config.json", "log.jsonl", "samples/step-0000003.png", "samples/step-0000006.png"]


def test_a_run_in_use_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    with locked(tmp_path / "run"), pytest.raises(BlockingIOError, match="run is in use by process"):
        train(config, tmp_path / "run", device="cpu")


@pytest.mark.parametrize("inside", ["pipeline", "checkpoint-0000006", "", "samples"])
def test_an_input_that_would_be_replaced_is_refused(inside: str, run: tuple[TrainConfig, Path]) -> None:
    config, out = run
    (out / "samples").mkdir(exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    other = dataclasses.replace(config.data, source=str(out / inside))
    for changed in ({"start_from": str(out / inside)}, {"data": other}):
        with pytest.raises(ValueError, match="input"):
            train(dataclasses.replace(config, **changed), out, device="cpu")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_run_in_its_data_is_refused_and_leaves_nothing_there(config: TrainConfig) -> None:
    data = Path(config.data.source)
    with pytest.raises(ValueError, match="lies in the data"):
        train(config, data / "runs" / "first", device="cpu")
    assert names(data) == ["blue", "green", "red"]


@pytest.mark.parametrize("name", ["emoji", "emoji-clips"])
def test_a_run_may_be_called_as_what_is_bundled(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = RECIPES[name]()
    for folder in ("emoji", "emoji-clips"):
        Path(folder).mkdir()
        refuse_inputs(Path(folder), config)
    with pytest.raises(ValueError, match="is an input"):
        refuse_inputs(Path("emoji"), dataclasses.replace(config, start_from="emoji"))


# ----------------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        *((TrainConfig, name) for name in ("learning_rate", "weight_decay", "gradient_clip", "ema_decay")),
        *((TrainConfig, name) for name in ("label_dropout", "sample_guidance_scale")),
        *((Objective, name) for name in ("min_sigma", "logit_mean", "logit_std")),
        *((SpectralConfig, name) for name in ("maximum", "penalty_weight")),
        (TextToImageModelConfig, "mlp_ratio"),
    ],
)
def test_options_that_are_not_finite_are_refused(owner: type, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        owner(**{name: value})


def test_betas_and_seeds_are_checked() -> None:
    for betas in ((0.9, 1.0), (-0.1, 0.9), (0.9, math.nan)):
        with pytest.raises(ValueError, match="adam_betas"):
            TrainConfig(adam_betas=betas)
    for seed in (-1, 2**31):
        with pytest.raises(ValueError, match="seed must be"):
            TrainConfig(seed=seed)


def test_a_start_of_another_size_is_resized_and_released_so(run: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    config, out = run
    source = make_data(tmp_path / "large", 16)
    larger = dataclasses.replace(
        config, data=DataConfig(source=str(source), image_size=16), start_from=str(out / "pipeline"), max_steps=1
    )
    pipeline = ClassToImagePipeline.from_pretrained(train(larger, tmp_path / "on", device="cpu"))
    assert pipeline.transformer.config.sample_size == 16
    assert pipeline.transformer.position_embedding.shape[0] == 16
    odd = dataclasses.replace(larger, data=DataConfig(source=str(source), image_size=18))
    with pytest.raises(ValueError, match="divisible by patch_size 4, got 18"):
        train(odd, tmp_path / "odd", device="cpu")


def test_sizes_that_would_have_no_effect_are_refused(run: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    config, out = run
    start = dataclasses.replace(config, start_from=str(out / "pipeline"), max_steps=1)
    with pytest.raises(ValueError, match=r"start_from has num_layers 4, not 2: give model\.num_layers"):
        train(dataclasses.replace(start, model=dataclasses.replace(config.model, num_layers=2)), tmp_path / "b")
    train(dataclasses.replace(start, model=ModelConfig()), tmp_path / "c", device="cpu")
