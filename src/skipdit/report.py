"""The report of a measurement, written as JSON and as Markdown."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from skipdit.files.output import OutputFolder, to_json
from skipdit.interfaces import Fields
from skipdit.metrics.table import Scores


@dataclass(frozen=True, kw_only=True)
class Report:
    """The settings, environment and results of a measurement."""

    config: Any
    """settings: a dataclass, or its fields"""
    environment: Mapping[str, Any] | None = None
    """result of `skipdit.environment.describe_environment`; `None` if the parts describe it"""
    data: Mapping[str, Any] = field(default_factory=dict)
    """further keys of the JSON"""
    title: str | None = None
    """first line of the Markdown"""
    parts: Sequence[str] = ()
    """paragraphs and tables of the Markdown, in order; empty ones are left out"""

    def to_dict(self) -> Fields:
        """Return the content of the JSON."""
        environment = {} if self.environment is None else {"environment": self.environment}
        return environment | {"config": self.config} | dict(self.data)

    def to_markdown(self) -> str:
        """Return the Markdown: title, command and environment, then the parts."""
        about = self.environment or {}
        lines = [f"- {name}: {text}" for name, text in about.items() if name != "command"]
        first = [f"# {self.title}" if self.title else "", f"`{about['command']}`" if about else "", "\n".join(lines)]
        return "\n\n".join(part for part in (*first, *self.parts) if part) + "\n"

    def write(self, out: OutputFolder, name: str) -> None:
        """Write `{name}.json` and `{name}.md`."""
        out.write_text(f"{name}.json", to_json(self.to_dict()))
        out.write_text(f"{name}.md", self.to_markdown())


def record(row: Any, *properties: str) -> Fields:
    """Return a row for the JSON: its fields, its scores one by one, and these properties.

    row: a dataclass; its field `scores`, if it has one, is `Scores`.
    """
    fields = {entry.name: getattr(row, entry.name) for entry in dataclasses.fields(row)}
    scores: Scores = fields.pop("scores", {})
    return fields | dict(scores) | {name: getattr(row, name) for name in properties}


def table(records: Sequence[Mapping[str, object]]) -> str:
    """Return a Markdown table of records with the same keys; an empty string if there are none."""
    if not records:
        return ""
    lines = [list(records[0]), ["---"] * len(records[0]), *(map(str, record.values()) for record in records)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def listed(items: Mapping[str, object]) -> str:
    """Return a Markdown list of names and their descriptions."""
    return "\n".join(f"- {name}: {text}" for name, text in items.items())


def numbers(values: Mapping[str, float]) -> dict[str, object]:
    """Return the numbers as cells of a table, with three digits after the decimal point."""
    return {name: f"{value:.3f}" for name, value in values.items()}


def judge(what: str, values: Mapping[Any, float], target: float) -> str:
    """Return a sentence that names the values that reach the target and those that do not."""
    if not values:
        return f"{what}: not measured."
    reached, missed = (
        ", ".join(f"{name} ({value:.3f})" for name, value in values.items() if (value >= target) is is_reached)
        for is_reached in (True, False)
    )
    return f"{what}, target {target:g}: reached by {reached or 'none'}; missed by {missed or 'none'}."
