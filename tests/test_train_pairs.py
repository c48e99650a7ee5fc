"""The command that trains pairs: what differs within a pair, and that a run which was stopped is released."""

import subprocess
import sys
from pathlib import Path

import pytest

from skipdit.loading import load_source
from skipdit.training.dry_run import plan_run

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "train_pairs.py"


@pytest.mark.parametrize("data", ["pictures", "clips"])
def test_a_pair_differs_in_its_long_skips_alone(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import train_pairs  # pyright: ignore[reportMissingImports]

    skip, plain = (plan_run(train_pairs.config_of(kind, data, 3, None, None)) for kind in ("skip", "plain"))
    assert (skip.num_long_skips, plain.num_long_skips) == (2, 0)
    assert 1 < skip.num_parameters / plain.num_parameters < 1.05
    for field in ("model", "num_units", "num_tokens", "batch_size", "max_steps"):
        assert getattr(skip, field) == getattr(plain, field)


@pytest.mark.slow
def test_a_run_that_is_late_is_released_as_it_is(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "pictures", "--batch-size", "2", "--seconds", "90", "--out", str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "skip-pictures-0" in printed
    for name in ("skip-pictures-0", "plain-pictures-0"):
        assert "stopped by SIGTERM" in (tmp_path / f"{name}.log").read_text()
        assert load_source(str(tmp_path / name / "pipeline")).sampler.pipeline.transformer.config.num_layers == 24
