"""What every measurement leaves behind: one report, written as JSON and as Markdown."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from skipdit.files.output import OutputFolder, to_json
from skipdit.metrics.table import Scores


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was measured, where, with which settings, and what it says."""

    config: Any
    """a dataclass, or its fields"""
    environment: Mapping[str, Any] | None = None
    """as of `skipdit.environment.describe_environment`; `None` where the parts tell it"""
    data: Mapping[str, Any] = field(default_factory=dict)
    """further keys of the JSON"""
    title: str | None = None
    """first line of the Markdown"""
    parts: Sequence[str] = ()
    """paragraphs and tables of the Markdown, in this order; empty ones are left out"""

    def to_dict(self) -> dict[str, Any]:
        """Return what the JSON holds."""
        environment = {} if self.environment is None else {"environment": self.environment}
        return environment | {"config": self.config} | dict(self.data)

    def to_markdown(self) -> str:
        """Return the page: title, command and machine, then the parts."""
        about = self.environment or {}
        lines = [f"- {name}: {text}" for name, text in about.items() if name != "command"]
        first = [f"# {self.title}" if self.title else "", f"`{about['command']}`" if about else "", "\n".join(lines)]
        return "\n\n".join(part for part in (*first, *self.parts) if part) + "\n"

    def write(self, out: OutputFolder, name: str) -> None:
        """Write `{name}.json` and `{name}.md`."""
        out.write_text(f"{name}.json", to_json(self.to_dict()))
        out.write_text(f"{name}.md", self.to_markdown())


def record(row: Any, *properties: str) -> dict[str, Any]:
    """Return a row as the JSON has it: its fields, its scores one by one, and these properties.

    row: a dataclass; its field `scores`, where it has one, is `Scores`.
    """
    fields = {each.name: getattr(row, each.name) for each in dataclasses.fields(row)}
    scores: Scores = fields.pop("scores", {})
    return fields | dict(scores) | {name: getattr(row, name) for name in properties}


def table(records: Sequence[Mapping[str, object]]) -> str:
    """Return a Markdown table of records with the same keys; nothing where there are none."""
    if not records:
        return ""
    lines = [list(records[0]), ["---"] * len(records[0]), *(map(str, each.values()) for each in records)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def listed(items: Mapping[str, object]) -> str:
    """Return a Markdown list of names and what is said of each."""
    return "\n".join(f"- {name}: {text}" for name, text in items.items())


def numbers(values: Mapping[str, float], digits: int = 3) -> dict[str, object]:
    """Return the cells of a table's row, each number with so many digits after the point."""
    return {name: f"{value:.{digits}f}" for name, value in values.items()}


def judge(what: str, values: Mapping[Any, float], target: float) -> str:
    """Return a sentence that names what reaches the target and what does not."""
    if not values:
        return f"{what}: not measured."
    reached, missed = (
        ", ".join(f"{name} ({value:.3f})" for name, value in values.items() if (value >= target) is is_reached)
        for is_reached in (True, False)
    )
    return f"{what}, target {target:g}: reached by {reached or 'none'}; missed by {missed or 'none'}."
