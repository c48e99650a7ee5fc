"""Checkpoints of `skipdit train` (`run/checkpoint-NNNNNNN`): find the newest and read its weights and config."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from skipdit.checkpoints.keys import LoadHints, find_num_classes
from skipdit.checkpoints.reading import Preference, StateDict, read_state_dict
from skipdit.files.output import read_marker
from skipdit.files.untrusted import file_digest, printable, read_json
from skipdit.models.shallow_path import ShallowPath, default_shallow_units

Value = TypeVar("Value")
STATE_NAME = "state.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d{7,12})", re.ASCII)


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
    path = folder / STATE_NAME
    state = read_json(path, dict[str, Any])
    config = _field(state, "config", dict, path)
    model, data = (_field(config, name, dict, path) for name in ("model", "data"))
    long_skip = model.get("long_skip")
    weights = folder / f"{prefer}.safetensors"
    listed = read_marker(folder)["files"].get("checkpoint", {}).get(weights.name)
    if listed is not None and file_digest(weights) != listed:
        raise ValueError(f"{printable(weights)} has changed since its run wrote it: give another checkpoint")
    state_dict = read_state_dict(weights, prefer)
    trained_on = state.get("data")
    names = trained_on.get("class_names") if isinstance(trained_on, dict) else None
    found = {
        "num_attention_heads": _field(model, "num_attention_heads", int, path),
        "sample_size": _side_of(data, path),
        "num_frames": data.get("num_frames"),
        "num_classes": find_num_classes(len(names), state_dict) if isinstance(names, list) else None,
        "fusion": long_skip.get("fusion") if isinstance(long_skip, dict) else None,
    }
    for name, value in found.items():
        hint = getattr(hints, name)
        if hint is not None and value is not None and hint != value:
            raise ValueError(f"{name} is {printable(repr(value))} in this checkpoint, got {hint!r}")
    return state_dict, replace(hints, **{name: value for name, value in found.items() if value is not None})


def _side_of(data: Mapping[str, Any], path: Path) -> int | None:
    """Return the side of the data; None for latents if the run's config leaves it open."""
    if "sample_size" in data and data["sample_size"] is None:
        return None
    return _field(data, "sample_size" if "sample_size" in data else "image_size", int, path)


def read_run_config(folder: Path) -> dict[str, Any]:
    """Return the settings of the run that wrote a checkpoint."""
    return _field(read_json(folder / STATE_NAME, dict[str, Any]), "config", dict, folder / STATE_NAME)


def read_shallow_path(folder: Path, num_units: int) -> ShallowPath | None:
    """Return the shallow path that a run trains in its model of `num_units` units; None if it trains none."""
    routing = read_run_config(folder).get("routing")
    if not isinstance(routing, dict) or routing.get("mode") not in ("bypass", "fill") or not routing.get("deep_drop"):
        return None
    number: Any = routing.get("num_shallow_units")
    number = default_shallow_units(num_units) if number is None else number
    try:
        return ShallowPath(num_shallow_units=number, fill=routing["mode"] == "fill")
    except ValueError as error:
        raise ValueError(f"{printable(folder / STATE_NAME)}: routing: {printable(error)}") from error


def _field(fields: Mapping[str, Any], name: str, kind: type[Value], path: Path) -> Value:
    value = fields.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{printable(path)} does not have its run's {name}")
    return value
