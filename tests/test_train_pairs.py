"""The command that trains pairs: what differs within a pair, and what it takes for finished."""

import json
import sys
from pathlib import Path

import pytest

from skipdit.training.dry_run import plan_run

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "train_pairs.py"


@pytest.mark.parametrize("data", ["pictures", "clips"])
def test_a_pair_differs_in_its_long_skips_alone(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import train_pairs  # pyright: ignore[reportMissingImports]

    skip, plain = (plan_run(train_pairs.config_of(kind, data, seed=3)) for kind in ("skip", "plain"))
    assert (skip.num_long_skips, plain.num_long_skips) == (2, 0)
    assert 1 < skip.num_parameters / plain.num_parameters < 1.05
    for field in ("model", "num_units", "num_tokens", "batch_size", "max_steps"):
        assert getattr(skip, field) == getattr(plain, field)


def test_a_finished_run_of_other_steps_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import train_pairs  # pyright: ignore[reportMissingImports]

    for kind in train_pairs.KINDS:
        folder = tmp_path / f"{kind}-pictures-0"
        (folder / "pipeline").mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"max_steps": 5, "batch_size": 256}))
    command = ["train_pairs.py", "pictures", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--steps", "5"])
    train_pairs.main()  # nothing is left to train
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="was trained with max_steps 5, not 2713: give another --out"):
        train_pairs.main()
