"""Files of JSON lines: what a kill has cut is left out, and what comes after it is not lost."""

from dataclasses import dataclass
from pathlib import Path

from skipdit.files.json_lines import append_line, read_lines


@dataclass(frozen=True)
class Row:
    name: str
    value: float


def test_a_line_that_was_cut_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert read_lines(path) == []
    append_line(path, Row("two  spaces\nand a line", 1.5))
    append_line(path, {"name": "b", "value": 2.0})
    assert path.read_text().count("\n") == 2
    path.write_bytes(path.read_bytes()[:-5])
    first = {"name": "two  spaces\nand a line", "value": 1.5}
    assert read_lines(path) == [first]
    append_line(path, Row("c", 3.0))
    assert read_lines(path) == [first, {"name": "c", "value": 3.0}]
