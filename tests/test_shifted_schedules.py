"""The bench of `auto` under shifted schedules: how it goes on, and that its published table is that of its rows."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from skipdit.files.json_lines import read_lines
from skipdit.report import table

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script, which is not in the package."""
    sys.path.append(str(BENCHMARKS))  # as of a script
    spec = importlib.util.spec_from_file_location("shifted_schedules", BENCHMARKS / "shifted_schedules.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["shifted_schedules"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_row_that_is_there_is_not_measured_again(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    size = ["--shifts", "3", "--steps", "4", "--num-samples", "1"]
    common = ["shifted_schedules.py", "emoji", *size, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*common, "--caches", "N2"])
    script.main()
    first = (tmp_path / "out" / script.RESULTS).read_text()
    monkeypatch.setattr(sys, "argv", [*common, "--caches", "N2", "output:N2", "--report", str(tmp_path / "report")])
    script.main()
    rows = [script.Row(**line) for line in read_lines(tmp_path / "out" / script.RESULTS)]
    assert (tmp_path / "out" / script.RESULTS).read_text().startswith(first)
    assert [(row.cache, row.full_steps, row.fewer_steps) for row in rows] == [("N2", 2, 3), ("output:N2", 2, 2)]
    assert rows[0].psnr_db != rows[1].psnr_db
    assert "| emoji | 3 | 4 | output:N2 | 2 | 2.00x |" in capsys.readouterr().out


def test_the_published_table_is_that_of_its_rows(script: ModuleType) -> None:
    rows = [script.Row(**row) for row in json.loads((BENCHMARKS / "shifted_schedules.json").read_text())["rows"]]
    assert table([row.cells() for row in rows]).strip() in (BENCHMARKS / "shifted_schedules.md").read_text()
