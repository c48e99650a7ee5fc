"""How a training ends before its time: signals, numbers that are not finite, a full disk, dead workers, two runs."""

import dataclasses
import math
import os
import pty
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_runs import (
    assert_same_run,
    checkpoint_names,
    make_config,
    make_data,
    names,
    read_log,
    send,
    start_training,
    tensors_of,
    wait_for,
)

import skipdit.training.loop
from skipdit.files.output import DRAFT
from skipdit.files.processes import LOCK, locked
from skipdit.training import Stopped, TrainConfig, train
from skipdit.training.checkpointing import PREVIOUS, list_checkpoints
from skipdit.training.loader import has_failed
from skipdit.training.stopping import stoppable


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return make_config(make_data(tmp_path / "data"))


@pytest.fixture(autouse=True)
def _as_in_a_terminal() -> Iterator[None]:
    """Signals that a shell's background job or nohup ignores."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def endless(config: TrainConfig) -> TrainConfig:
    """Never at its end in a test; without a checkpoint of its own accord."""
    return dataclasses.replace(config, max_steps=100_000, checkpoint_every=100_000)


def no_drafts(out: Path) -> bool:
    return not list(out.rglob(f"{DRAFT}*"))


# ----------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_signal_leaves_a_checkpoint_of_its_step(
    number: int, status: int, num_workers: int, config: TrainConfig, tmp_path: Path
) -> None:
    config, out, said = (
        dataclasses.replace(endless(config), num_workers=num_workers),
        tmp_path / "run",
        tmp_path / "said",
    )
    process = start_training(config, out, said)
    wait_for(lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_size > 0)
    assert send(process, number) == status, said.read_text()
    (name,) = checkpoint_names(out)
    done = read_log(out)[-1]["step"]
    assert name == f"checkpoint-{done:07d}"
    line = said.read_text().splitlines()[-1]
    assert line.startswith(f"stopped by {signal.Signals(number).name} after step {done} of 100000, which is saved in")
    assert line.endswith("the same command resumes it")
    assert "Traceback" not in said.read_text()
    assert no_drafts(out)
    assert not (out / LOCK).exists()


def test_a_stopped_run_equals_an_uninterrupted_one(config: TrainConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "whole", device="cpu")
    rate_at = skipdit.training.loop.learning_rate_at

    def rate(config: TrainConfig, step: int) -> float:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate_at(config, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skipdit.training.loop, "learning_rate_at", rate)
        with pytest.raises(Stopped, match="stopped by SIGTERM after step 4 of 6") as stopped:
            train(config, tmp_path / "stopped", device="cpu")
    assert stopped.value.status == 143
    assert checkpoint_names(tmp_path / "stopped") == ["checkpoint-0000003", "checkpoint-0000004"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(config, tmp_path / "stopped", device="cpu")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_second_ctrl_c_stops_at_once_and_ignored_signals_stay_ignored() -> None:
    with pytest.raises(KeyboardInterrupt), stoppable() as stop:  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.signal == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_in_a_thread_has_no_signals(config: TrainConfig, tmp_path: Path) -> None:
    thread = threading.Thread(target=train, args=(config, tmp_path / "run"), kwargs={"device": "cpu"})
    thread.start()
    thread.join()
    assert checkpoint_names(tmp_path / "run") == ["checkpoint-0000003", "checkpoint-0000006"]


COMMAND = """
import sys
from skipdit.cli import main
main(["train", "emoji", "--data.source", sys.argv[1], "--data.image-size", "8", "--model.num-layers", "2",
      "--model.num-attention-heads", "2", "--model.attention-head-dim", "8", "--model.patch-size", "4", "--batch-size",
      "4", "--routing.mode", "off", "--sample-every", "0", "--checkpoint-every", "1000000", "--max-steps", "1000000",
      "--log-every", "1", "--device", "cpu", "--out", sys.argv[2]])
"""


@pytest.mark.parametrize("hung_up", [False, True])
def test_on_a_terminal_the_cursor_comes_back_and_a_lost_terminal_does_no_harm(
    hung_up: bool, config: TrainConfig, tmp_path: Path
) -> None:
    out, said = tmp_path / "run", bytearray()
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", COMMAND, str(tmp_path / "data"), str(out)])

    def read() -> None:
        try:
            while content := os.read(terminal, 4096):
                said.extend(content)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read, daemon=True)
    if not hung_up:
        reader.start()
    wait_for(lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_size > 0, 120)
    if hung_up:
        os.close(terminal)
    else:
        os.write(terminal, b"\x03")
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == (129 if hung_up else 130), said.decode(errors="replace")
    assert len(checkpoint_names(out)) == 1
    if not hung_up:
        reader.join()
        assert said.rfind(b"\x1b[?25h") > said.rfind(b"\x1b[?25l") >= 0
        assert b"skipdit: stopped by SIGINT after step" in said
        assert b"Traceback" not in said


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("log_every", [1, 100])
@pytest.mark.parametrize("max_steps", [30, 2])
def test_what_is_not_finite_is_never_saved_and_the_advice_can_be_followed(
    log_every: int, max_steps: int, config: TrainConfig, tmp_path: Path
) -> None:
    """A rate of 1e8 makes weights so large that the next loss is not finite."""
    config = dataclasses.replace(
        config, learning_rate=1e38, warmup_steps=0, checkpoint_every=1 if log_every == 1 else 100, log_every=log_every,
        num_checkpoints=1, max_steps=max_steps, sample_every=1,
    )  # fmt: skip
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=r"no longer finite, and was not saved: .*--learning-rate \(it was"):
        train(config, out, device="cpu")
    assert not (out / "pipeline").exists()
    for path in list_checkpoints(out):
        assert all(tensor.isfinite().all() for tensor in tensors_of(path).values())
    assert all(math.isfinite(entry["loss"]) for entry in read_log(out))


def test_a_run_goes_on_after_nan_with_a_lower_rate(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = skipdit.training.loop.prepare_batch
    count = iter(range(100))

    def spoil(pixels: Tensor, *rest: object) -> object:
        return draw(pixels * math.nan if next(count) == 4 else pixels, *rest)  # pyright: ignore

    out = tmp_path / "run"
    monkeypatch.setattr(skipdit.training.loop, "prepare_batch", spoil)
    message = "the loss or its gradient at step 5 is .* resume from .*checkpoint-0000003 with --allow-changes"
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(config, log_every=100), out, device="cpu")
    assert checkpoint_names(out) == ["checkpoint-0000003"]
    assert not (out / "pipeline").exists()
    train(dataclasses.replace(config, learning_rate=1e-4, gradient_clip=0.1), out, allow_changes=True, device="cpu")
    assert [entry["step"] for entry in read_log(out)] == [3, 4, 5, 6]


def test_nan_at_the_first_step_loses_no_checkpoint(config: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(config, out, device="cpu")
    with pytest.raises(ValueError, match="no longer finite"):
        train(dataclasses.replace(config, learning_rate=1e38, warmup_steps=0), out, resume=False, device="cpu")
    assert checkpoint_names(out / PREVIOUS) == ["checkpoint-0000003", "checkpoint-0000006"]


def test_no_number_is_asked_for_between_lines_of_the_log(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`_local_scalar_dense` is what a GPU would have to be waited for."""
    from torch.utils._python_dispatch import TorchDispatchMode

    asked: list[int] = []
    rate_at, at = skipdit.training.loop.learning_rate_at, [0]

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
                asked.append(at[0])
            return function(*arguments, **(options or {}))

    def rate(config: TrainConfig, step: int) -> float:
        at[0] = step + 1
        return rate_at(config, step)

    monkeypatch.setattr(skipdit.training.loop, "learning_rate_at", rate)
    with Count():
        train(
            dataclasses.replace(config, log_every=3, max_steps=12, checkpoint_every=12), tmp_path / "run", device="cpu"
        )
    assert {step for step in asked if 1 < step < 12} <= {3, 6, 9}


def test_a_clock_that_stands_still_does_no_harm(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skipdit.training.reporter.time.perf_counter", lambda: 5.0)
    train(config, tmp_path / "run", device="cpu")
    assert {entry["images_per_second"] for entry in read_log(tmp_path / "run")} == {0.0}


# ----------------------------------------------------------------------------------------------------------------------
# The machine


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("size", [100, 4_000, 300_000])
def test_a_full_disk_ends_in_one_line_and_leaves_the_checkpoint_before(
    size: int, config: TrainConfig, tmp_path: Path
) -> None:
    """A limit on the size of files stands in for it: of the log, of the state, of the weights."""
    out, said = tmp_path / "run", tmp_path / "said"
    train(config, out, device="cpu")
    before = {name: tensors_of(out / name) for name in checkpoint_names(out)}
    longer = dataclasses.replace(config, max_steps=9)
    process = start_training(longer, out, said, lambda: limit_files(size))
    process.join(60)
    assert process.exitcode == 2
    assert said.read_text().splitlines()[-1].startswith("OSError("), said.read_text()
    assert checkpoint_names(out) == list(before)
    assert all(
        torch.equal(tensor, tensors_of(out / name)[key]) for name in before for key, tensor in before[name].items()
    )
    assert no_drafts(out)
    train(longer, out, device="cpu")
    train(longer, tmp_path / "whole", device="cpu")
    assert names(out) == names(tmp_path / "whole")


def test_a_dead_data_worker_is_said_in_one_line(config: TrainConfig, tmp_path: Path) -> None:
    config, out, said = dataclasses.replace(endless(config), num_workers=2), tmp_path / "run", tmp_path / "said"
    process = start_training(config, out, said)
    wait_for(lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_size > 0)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("needs a kernel that lists children")
    workers = [int(pid) for pid in children.read_text().split()]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    process.join(60)
    assert process.exitcode == 2
    line = said.read_text().splitlines()[-1]
    assert "ChildProcessError(" in line  # PyTorch may raise while the progress bar writes its last line
    assert "a process that loads data died" in line
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))


class NoticedLate(ForkProcess):
    """A process whose end Python learns of no earlier than when it is first waited for."""

    noticed = False

    def join(self, timeout: float | None = None) -> None:
        if not self.noticed:
            self.noticed = True
            signal.raise_signal(signal.SIGCHLD)
        super().join(timeout)


def test_a_data_worker_whose_end_is_noticed_late_has_failed() -> None:
    """The broken pipe of a dead worker may be seen before its signal, at which PyTorch raises wherever Python is."""

    def raise_as_torch_does(*_: object) -> None:
        raise RuntimeError("DataLoader worker is killed by signal: Killed.")

    worker, other = NoticedLate(target=time.sleep, args=(60,)), ForkProcess(target=time.sleep, args=(60,))
    worker.start()
    other.start()
    assert not has_failed([other])
    worker.kill()
    os.waitid(os.P_PID, worker.pid or 0, os.WEXITED | os.WNOWAIT)
    before = signal.signal(signal.SIGCHLD, raise_as_torch_does)
    try:
        assert has_failed([worker, other])
    finally:
        signal.signal(signal.SIGCHLD, before)
        other.kill()
        other.join()
    assert worker.noticed


def test_no_worker_is_left_after_a_run(config: TrainConfig, tmp_path: Path) -> None:
    import multiprocessing

    train(dataclasses.replace(config, num_workers=2), tmp_path / "run", device="cpu")
    assert multiprocessing.active_children() == []
    train(config, tmp_path / "alone", device="cpu")
    assert_same_run(tmp_path / "run", tmp_path / "alone")


def test_data_workers_do_not_hold_the_lock_of_a_run_that_died(config: TrainConfig, tmp_path: Path) -> None:
    config, out = dataclasses.replace(endless(config), num_workers=2), tmp_path / "run"
    process = start_training(config, out, tmp_path / "said")
    wait_for(lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_size > 0)
    send(process, signal.SIGKILL)
    with locked(out):  # its workers notice after some seconds only
        pass


def test_several_processes_learn_that_the_folder_is_in_use(tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617"]
    script = tmp_path / "script.py"
    script.write_text(COMMAND)
    with locked(out):
        began = time.monotonic()
        result = subprocess.run(
            [*command, str(script), str(tmp_path / "data"), str(out)], capture_output=True, text=True, timeout=200
        )
    assert result.returncode == 1
    assert "run is in use by process" in result.stderr
    assert "ValueError" not in result.stderr
    assert time.monotonic() - began < 120


def test_the_command_line_follows_its_own_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from skipdit.cli import main

    options = ["train", "emoji", "--data.source", str(make_data(tmp_path / "data")), "--data.image-size", "8",
               "--model.num-layers", "2", "--model.num-attention-heads", "2", "--model.attention-head-dim", "8",
               "--model.patch-size", "4", "--batch-size", "4", "--sample-every", "0", "--checkpoint-every", "1",
               "--routing.mode", "off",
               "--log-every", "1", "--max-steps", "4", "--warmup-steps", "0", "--precision", "no", "--device", "cpu",
               "--out", str(tmp_path / "run")]  # fmt: skip
    main([*options, "--max-steps", "1"])
    with pytest.raises(SystemExit) as exit:
        main([*options, "--learning-rate", "1e8", "--checkpoint-every", "100", "--allow-changes"])
    assert exit.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "checkpoint-0000001 with --allow-changes and a lower --learning-rate (it was 1e+08)" in line
    main([*options, "--learning-rate", "1e-5", "--allow-changes"])
    said = capsys.readouterr()
    assert "from step 1 on, learning_rate is 1e-05 instead of 0.0008" in said.err
    assert "trained: skipdit sample --model" in said.out
