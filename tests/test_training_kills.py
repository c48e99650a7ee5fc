"""A training that is killed or stopped at random moments, and started again, equals one that was never disturbed.

pytest -m slow tests/test_training_kills.py    # 20 x SIGKILL, 5 x SIGTERM; prints how far each came
"""

import random
import signal
import time
from pathlib import Path

import pytest
from training_runs import assert_same_run, make_config, make_data, send, start_training, wait_for

from skipdit.files.output import DRAFT
from skipdit.training import TrainConfig, train


def stamp(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def disturb(config: TrainConfig, folder: Path, signals: list[int], seed: int) -> list[str]:
    """Run `config` whole, and again with a signal at a random moment of each part; return what happened."""
    began = time.monotonic()
    train(config, folder / "whole", device="cpu")
    seconds = time.monotonic() - began
    out, log, happened = folder / "disturbed", folder / "output.txt", []
    delays = random.Random(seed)
    for number in signals:
        before = stamp(out / "log.jsonl")
        process = start_training(config, out, log)
        if number == signal.SIGTERM:  # before the first step it ends at once, as any program does
            wait_for(lambda before=before: stamp(out / "log.jsonl") != before)
        # short of the whole time by far, so that many parts make up the run
        time.sleep(delays.uniform(0, 1.3 * seconds / len(signals)))
        status = send(process, number)
        steps = len((out / "log.jsonl").read_text().splitlines()) if (out / "log.jsonl").exists() else 0
        happened.append(f"{signal.Signals(number).name} at step {steps}: status {status}")
        assert status in (-number, 128 + number, 0), log.read_text()
    process = start_training(config, out, log)
    process.join(120)
    assert process.exitcode == 0, log.read_text()
    assert_same_run(folder / "whole", out)
    assert sorted(path.name for path in out.rglob(f"{DRAFT}*")) == []
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (folder / "whole").iterdir())
    return happened


def test_a_run_that_is_killed_three_times_equals_an_undisturbed_one(tmp_path: Path) -> None:
    config = make_config(make_data(tmp_path / "data"), max_steps=30, checkpoint_every=3)
    happened = disturb(config, tmp_path, [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL], seed=1)
    assert not all(line.endswith("status 0") for line in happened), happened


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_and_five_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    happened = []
    for seed in range(5):
        folder = tmp_path / str(seed)
        config = make_config(make_data(folder / "data"), max_steps=120, checkpoint_every=2, seed=seed, sample_every=30)
        signals = [signal.SIGKILL] * 4 + [signal.SIGTERM]
        random.Random(seed).shuffle(signals)
        happened += disturb(config, folder, signals, seed)
    with capsys.disabled():
        print("", *happened, sep="\n")
    assert sum("SIGKILL" in line and "status -9" in line for line in happened) == 20, happened
    assert sum("SIGTERM" in line and "status 143" in line for line in happened) == 5, happened
