"""Checkpoints of `skipdit train` (`run/checkpoint-NNNNNNN`): find the newest and read its weights and config."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from skipdit.checkpoints.keys import LoadHints, find_num_classes
from skipdit.checkpoints.reading import Preference, StateDict, read_state_dict
from skipdit.files.output import read_marker
from skipdit.files.untrusted import file_digest, printable, read_json
from skipdit.models.shallow_path import ShallowPath, default_shallow_units

STATE_NAME = "state.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d{7,12})", re.ASCII)


class RunModel(TypedDict):
    """What is read of the config of a run's model."""

    num_attention_heads: int | None
    long_skip: NotRequired[dict[str, Any] | None]


class RunData(TypedDict, total=False):
    """What is read of the config of a run's data."""

    image_size: int
    sample_size: int | None
    num_frames: int | None


class RunRouting(TypedDict, total=False):
    """What is read of the config of a run's token routing."""

    mode: str
    deep_drop: float
    num_shallow_units: int | None


class RunConfig(TypedDict):
    """What is read of the settings of a run."""

    model: RunModel
    data: RunData
    routing: NotRequired[RunRouting]
    objective: NotRequired[dict[str, Any]]


class RunClasses(TypedDict, total=False):
    """What is read of a run's data."""

    class_names: list[str]


class RunState(TypedDict):
    """What is read of `state.json`."""

    config: RunConfig
    data: NotRequired[RunClasses]


def find_checkpoint(folder: Path) -> Path | None:
    """Return the folder itself if it is a checkpoint, the newest one of a run without a finished pipeline, or None."""
    if (folder / STATE_NAME).exists():
        return folder
    if any((place / "model_index.json").exists() for place in (folder, folder / "pipeline")):
        return None
    steps = {
        int(match[1]): path
        for path in folder.iterdir()
        if (match := CHECKPOINT_NAME.fullmatch(path.name)) and (path / STATE_NAME).is_file()
    }
    return steps[max(steps)] if steps else None


def read_checkpoint(folder: Path, prefer: Preference, hints: LoadHints) -> tuple[StateDict, LoadHints]:
    """Return the weights, averaged or not, under the model's keys, with the hints completed from the run's config.

    `ValueError` if a hint contradicts the config, or the weights have changed since the run wrote them.
    """
    state = read_json(folder / STATE_NAME, RunState)
    model, data = state["config"]["model"], state["config"]["data"]
    weights = folder / f"{prefer}.safetensors"
    listed = read_marker(folder)["files"].get("checkpoint", {}).get(weights.name)
    if listed is not None and file_digest(weights) != listed:
        raise ValueError(f"{printable(weights)} has changed since its run wrote it: give another checkpoint")
    state_dict = read_state_dict(weights, prefer)
    names = state.get("data", {}).get("class_names")
    found = {
        "num_attention_heads": model["num_attention_heads"],
        "sample_size": data.get("sample_size", data.get("image_size")),
        "num_frames": data.get("num_frames"),
        "num_classes": None if names is None else find_num_classes(len(names), state_dict),
        "fusion": (model.get("long_skip") or {}).get("fusion"),
    }
    for name, value in found.items():
        hint = getattr(hints, name)
        if hint is not None and value is not None and hint != value:
            raise ValueError(f"{name} is {printable(repr(value))} in this checkpoint, got {hint!r}")
    return state_dict, replace(hints, **{name: value for name, value in found.items() if value is not None})


def read_run_config(folder: Path) -> RunConfig:
    """Return the settings of the run that wrote a checkpoint."""
    return read_json(folder / STATE_NAME, RunState)["config"]


def read_shallow_path(folder: Path, num_units: int) -> ShallowPath | None:
    """Return the shallow path that a run trains in its model of `num_units` units; None if it trains none."""
    routing = read_run_config(folder).get("routing", RunRouting())
    if routing.get("mode") not in ("bypass", "fill") or not routing.get("deep_drop"):
        return None
    number = routing.get("num_shallow_units")
    number = default_shallow_units(num_units) if number is None else number
    try:
        return ShallowPath(num_shallow_units=number, fill=routing.get("mode") == "fill")
    except ValueError as error:
        raise ValueError(f"{printable(folder / STATE_NAME)}: routing: {printable(error)}") from error
