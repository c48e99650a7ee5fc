"""Files of one JSON value per line, which grow while something is measured. A kill may cut the last line."""

import json
from pathlib import Path
from typing import Any

from skipdit.files.output import to_json


def append_line(path: Path, value: object) -> None:
    """Append a value, on a line of its own also if the last one was cut."""
    line = json.dumps(json.loads(to_json(value)))
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            line = line if file.read() == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())


def read_lines(path: Path) -> list[Any]:
    """Return the values, without a line that was cut; none if there is no file."""
    values = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return values
