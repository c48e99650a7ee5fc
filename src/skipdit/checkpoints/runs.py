"""Find the newest checkpoint of `skipdit train` (`run/checkpoint-NNNNNNN`), and read its weights and config."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import NotRequired, TypedDict

from skipdit.checkpoints.keys import LoadHints, find_num_classes
from skipdit.checkpoints.reading import Preference, StateDict, read_state_dict
from skipdit.files.output import read_marker
from skipdit.files.untrusted import file_digest, printable, read_json
from skipdit.interfaces import Fields
from skipdit.models.shallow_path import ShallowPath, default_shallow_units

LOGGER = logging.getLogger(__name__)

KIND, STATE_NAME = "checkpoint", "state.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d{7,12})", re.ASCII)


class RunModel(TypedDict):
    """The fields read from a run's model config."""

    num_attention_heads: int | None
    long_skip: NotRequired[Fields | None]


class RunData(TypedDict, total=False):
    """The fields read from a run's data config."""

    image_size: int
    sample_size: int | None
    num_frames: int | None


class RunRouting(TypedDict, total=False):
    """The fields read from a run's routing config."""

    mode: str
    deep_drop: float
    num_shallow_units: int | None


class RunConfig(TypedDict):
    """The fields read from a run's config."""

    model: RunModel
    data: RunData
    routing: NotRequired[RunRouting]
    objective: NotRequired[Fields]


class RunClasses(TypedDict, total=False):
    """The fields read from a run's data fingerprint."""

    class_names: list[str]


class RunState(TypedDict):
    """The fields read from `state.json`."""

    step: NotRequired[int]
    config: RunConfig
    data: NotRequired[RunClasses]


def find_checkpoint(folder: Path, prefer: Preference = "ema") -> Path | None:
    """Return `folder` if it is a checkpoint, the newest whole checkpoint of a run without a finished pipeline, or None.

    prefer: the weights that will be read. A warning names each newer checkpoint of which these, or `state.json`, are
    damaged; `ValueError` if no checkpoint is whole.
    """
    if (folder / STATE_NAME).exists():
        return folder
    if any((place / "model_index.json").exists() for place in (folder, folder / "pipeline")):
        return None
    steps = {
        int(match[1]): path
        for path in folder.iterdir()
        if (match := CHECKPOINT_NAME.fullmatch(path.name))
        and ((path / STATE_NAME).is_file() or KIND in read_marker(path)["files"])
    }
    problems: list[str] = []
    for step in sorted(steps, reverse=True):
        try:
            if read_json(steps[step] / STATE_NAME, RunState).get("step", step) != step:
                raise ValueError(f"{STATE_NAME} is of another step")
            _check_weights(steps[step], prefer)
        except (OSError, ValueError) as error:
            problems.append(f"{printable(steps[step])} cannot be used ({error})")
            continue
        if problems:
            LOGGER.warning("%s: taking %s", "; ".join(problems), steps[step].name)
        return steps[step]
    if problems:
        raise ValueError(f"{'; '.join(problems)}: give another checkpoint")
    return None


def _check_weights(folder: Path, prefer: Preference) -> Path:
    """Return the file of a checkpoint's preferred weights. `OSError` or `ValueError` if it is missing, or is not as its
    run wrote it."""
    weights = folder / f"{prefer}.safetensors"
    listed = read_marker(folder)["files"].get(KIND, {}).get(weights.name)
    if listed is None:
        read_state_dict(weights, prefer)  # a run of an early version
    elif file_digest(weights) != listed:
        raise ValueError(f"{printable(weights)} has changed since its run wrote it")
    return weights


def read_checkpoint(folder: Path, prefer: Preference, hints: LoadHints) -> tuple[StateDict, LoadHints]:
    """Return the preferred weights under the model's keys, and the hints completed from the run's config.

    `ValueError` if a hint contradicts the config, or the weights have changed since the run wrote them.
    """
    state = read_json(folder / STATE_NAME, RunState)
    model, data = state["config"]["model"], state["config"]["data"]
    state_dict = read_state_dict(_check_weights(folder, prefer), prefer)
    names = state.get("data", {}).get("class_names")
    recorded = {
        "num_attention_heads": model["num_attention_heads"],
        "sample_size": data.get("sample_size", data.get("image_size")),
        "num_frames": data.get("num_frames"),
        "num_classes": None if names is None else find_num_classes(len(names), state_dict),
        "fusion": (model.get("long_skip") or {}).get("fusion"),
    }
    for name, value in recorded.items():
        hint = getattr(hints, name)
        if hint is not None and value is not None and hint != value:
            raise ValueError(f"{name} is {printable(repr(value))} in this checkpoint, got {hint!r}")
    return state_dict, replace(hints, **{name: value for name, value in recorded.items() if value is not None})


def read_run_config(folder: Path) -> RunConfig:
    """Return the config of the run that wrote a checkpoint."""
    return read_json(folder / STATE_NAME, RunState)["config"]


def read_shallow_path(folder: Path, num_units: int) -> ShallowPath | None:
    """Return the shallow path that a run trains in its model of `num_units` units; None if there is none."""
    routing = read_run_config(folder).get("routing", RunRouting())
    if routing.get("mode") not in ("bypass", "fill") or not routing.get("deep_drop"):
        return None
    number = routing.get("num_shallow_units")
    number = default_shallow_units(num_units) if number is None else number
    try:
        return ShallowPath(num_shallow_units=number, fill=routing.get("mode") == "fill")
    except ValueError as error:
        raise ValueError(f"{printable(folder / STATE_NAME)}: routing: {printable(error)}") from error
