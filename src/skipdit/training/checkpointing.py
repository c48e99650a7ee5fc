"""Checkpoints: safetensors and JSON only, written whole or not at all, and believed only where they fit."""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from skipdit.data.latents import LabelledLatents
from skipdit.files import output
from skipdit.files.untrusted import printable, read_json
from skipdit.tasks.training import Items
from skipdit.training.config import TrainConfig
from skipdit.training.guard import GuardState
from skipdit.training.learner import MOMENTS, POWERS, Learner, Tensors, all_finite
from skipdit.training.posthoc_ema import LENGTHS
from skipdit.training.precision import ScaleState

LOGGER = logging.getLogger(__name__)

KIND = "checkpoint"  # in the marker of each
PREVIOUS = "previous-run"  # a folder beside them

# what may change when a run goes on; and what may change when that is asked for
FREE_TO_CHANGE = {"max_steps", "log_every", "sample_every", "num_samples", "sample_steps", "sample_guidance_scale"}
FREE_TO_CHANGE |= {"checkpoint_every", "num_checkpoints", "num_workers", "data_on_device", "release_dtype"}
FREE_TO_CHANGE |= {"tensorboard", "num_accumulation_steps", "parallel"}
CHANGED_ON_REQUEST = {"learning_rate", "rate_schedule", "warmup_steps", "weight_decay", "adam_betas", "gradient_clip"}
CHANGED_ON_REQUEST |= {"ema_decay", "label_dropout", "flip", "precision", "gradient_checkpointing", "compile"}
CHANGED_ON_REQUEST |= {"gradient_guard"}


class Fingerprint(TypedDict):
    """Which data a run learns. digest: SHA-256 of every label and caption."""

    num_items: int
    class_names: list[str]
    digest: str


class State(TypedDict):
    """`state.json` of a checkpoint. flops: of all steps so far. without_moments: trained parameters that no gradient
    has reached yet. guard: of the gradient's norm, where there is one. loss_scale: in fp16."""

    step: int
    flops: NotRequired[float]
    ema_step: int
    config: dict[str, Any]
    data: Fingerprint
    without_moments: list[str]
    guard: NotRequired[GuardState]
    loss_scale: NotRequired[ScaleState]


def fingerprint(items: Items) -> Fingerprint:
    digest = hashlib.sha256()
    for label, captions in zip(items.labels, items.captions, strict=True):
        digest.update(json.dumps([int(label), *captions]).encode())
    if isinstance(items, LabelledLatents):
        digest.update(items.content.encode())
    return Fingerprint(num_items=len(items), class_names=list(items.label_names), digest=digest.hexdigest())


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step:07d}"


def step_of(path: Path) -> int | None:
    """Return the step in the name of a checkpoint; `None` where it is not the name of one."""
    found = re.fullmatch(r"checkpoint-([0-9]{7,18})", path.name)
    return int(found[1]) if found and path.name == f"checkpoint-{int(found[1]):07d}" else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first: by their names and markers, whatever else is called so."""
    steps = {step: path for path in folder.glob("checkpoint-*") if (step := step_of(path)) is not None}
    ours = {step: path for step, path in steps.items() if path.is_dir() and not path.is_symlink()}
    return [ours[step] for step in sorted(ours) if KIND in output.read_marker(ours[step])["files"]]


def check_places(folder: Path, max_steps: int) -> None:
    """Raise `FileExistsError` where something of others has the name of a checkpoint that may be written."""
    for path in sorted(folder.glob("checkpoint-*")):
        if (step := step_of(path)) is not None and step <= max_steps:
            output.check_replaceable(path, KIND, even_damaged=True)


def set_aside(folder: Path) -> None:
    """Move the checkpoints of an earlier run into `previous-run`, where they stay until a new one stands."""
    if checkpoints := list_checkpoints(folder):
        place = folder / PREVIOUS
        output.check_replaceable(place, PREVIOUS)
        drop_previous(folder)
        place.mkdir(exist_ok=True)
        output.write_marker(place, {PREVIOUS: {}})
        for path in checkpoints:
            path.rename(place / path.name)
        LOGGER.warning("until a new checkpoint stands, those of before are in %s", printable(place))


def drop_previous(folder: Path) -> None:
    """Delete what `set_aside` has moved."""
    place = folder / PREVIOUS
    if not place.is_symlink() and PREVIOUS in output.read_marker(place)["files"]:
        for path in list_checkpoints(place):
            output.remove_ours(path)
        output.remove_ours(place)


# ----------------------------------------------------------------------------------------------------------------------
# Writing


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Inside, an error of writing names the file or folder."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        if isinstance(error, FileExistsError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OSError(f"{printable(path)} could not be written: {reason}") from error


def save_checkpoint(
    folder: Path, step: int, flops: float, learner: Learner, tensors: Tensors, config: TrainConfig, data: Fingerprint
) -> None:
    """Write a checkpoint whole or not at all; then delete all but the last few up to its step. tensors: of the learner,
    whole ones."""
    unreached = [name for name in learner.trained if f"{name}.step" not in tensors["optimizer"]]
    state = State(
        step=step,
        flops=flops,
        ema_step=learner.ema.optimization_step,
        config=asdict(config),
        data=data,
        without_moments=unreached,
    )
    if learner.guard is not None:
        state["guard"] = learner.guard.state()
    if learner.loss_scale is not None:
        state["loss_scale"] = learner.loss_scale.state()
    path = checkpoint_path(folder, step)
    with written(path), output.atomic_folder(path, KIND, even_damaged=True) as draft:
        for name in learner.files:
            save_file(tensors[name], draft / f"{name}.safetensors")
        (draft / "state.json").write_text(output.to_json(state), encoding="utf-8")
    drop_previous(folder)
    # one of a later step, which was not fit to go on from, is none of the last few
    reached = [each for each in list_checkpoints(folder) if (step_of(each) or 0) <= step]
    for old in reached[: -config.num_checkpoints]:
        output.remove_ours(old)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def go_on(
    folder: Path, learner: Learner, config: TrainConfig, data: Fingerprint, *, allow_changes: bool = False
) -> tuple[int, float, list[str]]:
    """Restore the last checkpoint that fits; return the number of steps done, 0 where there is none, their FLOPs, and
    what to say.

    `ValueError` where it belongs to another run than this config's, or where no checkpoint fits.
    """
    unfit: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            state = read_state(path)
        except (OSError, ValueError) as error:
            unfit.append(f"{path.name} cannot be used ({error})")
            continue
        notes = check_settings(path, state, config, data, allow_changes=allow_changes)
        try:
            tensors = read_tensors(path, state, learner)
        except (OSError, ValueError, SafetensorError) as error:
            unfit.append(f"{path.name} cannot be used ({error})")
            continue
        learner.take(tensors, state["ema_step"])
        if learner.guard is not None and "guard" in state:
            learner.guard.take(state["guard"])
        if learner.loss_scale is not None and "loss_scale" in state:
            learner.loss_scale.take(state["loss_scale"])
        if unfit:
            notes.insert(0, f"{'; '.join(unfit)}: the run goes on from {path.name}")
        return state["step"], state.get("flops", 0.0), notes
    if unfit:
        raise ValueError(f"{'; '.join(unfit)}: give another --out, or --no-resume")
    return 0, 0.0, []


def read_state(path: Path) -> State:
    """Read what a checkpoint says of itself; `ValueError` where it is not whole or contradicts itself."""
    output.check_whole(path, KIND)
    state = read_json(path / "state.json", State)
    if state["step"] != step_of(path):
        raise ValueError(f"{path.name}/state.json is of step {state['step']}")
    if state["ema_step"] != state["step"]:
        raise ValueError(f"{path.name}/state.json has averaged {state['ema_step']} of {state['step']} steps")
    return state


def check_settings(
    path: Path, state: State, config: TrainConfig, data: Fingerprint, *, allow_changes: bool
) -> list[str]:
    """Return what to say of settings that have changed; `ValueError` where this is no way to go on."""
    now: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    # a setting that is newer than the checkpoint was its default
    before: dict[str, Any] = json.loads(json.dumps(asdict(TrainConfig()))) | state["config"]
    for name in ("model", "objective"):
        if isinstance(part := before.get(name), dict):
            before[name] = json.loads(json.dumps(asdict(type(getattr(config, name))()))) | part
    changed = [name for name, value in now.items() if name != "data" and before.get(name) != value]
    was = before.get("data")
    given = was if isinstance(was, dict) else {}
    changed += [f"data.{name}" for name, value in now["data"].items() if name != "source" and given.get(name) != value]
    asked = sorted(set(changed) & CHANGED_ON_REQUEST)
    forbidden = [name for name in changed if name not in FREE_TO_CHANGE | (set(asked) if allow_changes else set())]
    if forbidden or state["step"] > config.max_steps:
        what = ", ".join(forbidden) or f"fewer than its {state['step']} steps"
        way = "--allow-changes, another --out" if forbidden and set(forbidden) <= set(asked) else "another --out"
        raise ValueError(f"{printable(path)} cannot go on with other settings ({what}): give {way}, or --no-resume")
    if different := difference(state["data"], data):
        raise ValueError(f"{printable(path)} learned other data ({different}): give another --out, or --no-resume")
    notes = [f"from step {state['step']} on, {name} is {now[name]} instead of {before.get(name)}" for name in asked]
    if given.get("source") != now["data"]["source"]:
        notes.append(f"the data is the same, though it is at {printable(now['data']['source'])} now")
    return notes


def difference(before: Fingerprint, now: Fingerprint) -> str:
    """Say how data differs from that of before; nothing where it is the same."""
    gone = [name for name in before["class_names"] if name not in now["class_names"]]
    new = [name for name in now["class_names"] if name not in before["class_names"]]
    said = [f"{word} {', '.join(map(printable, names))}" for word, names in (("without", gone), ("with", new)) if names]
    if said:
        return f"now {' and '.join(said)}"
    if before["class_names"] != now["class_names"]:
        return "its classes are in another order now"
    if before["num_items"] != now["num_items"]:
        return f"{before['num_items']} items then, {now['num_items']} now"
    return "" if before["digest"] == now["digest"] else "other labels or captions now"


def read_tensors(path: Path, state: State, learner: Learner) -> Tensors:
    """Read a checkpoint's tensors; `ValueError` where one is missing, too many, of another shape or not finite."""
    tensors = {name: load_file(path / f"{name}.safetensors") for name in learner.files}
    wanted = {name: (parameter.shape, parameter.dtype) for name, parameter in learner.model.named_parameters()}
    moments = {
        f"{name}.{key}": (torch.Size(), torch.float32) if key == "step" else wanted[name]
        for name in learner.trained
        if name not in state["without_moments"]
        for key in MOMENTS
    }
    expectations = {"model": wanted, "ema": wanted, "optimizer": moments}
    expectations[POWERS] = {f"{length}.{name}": kind for length in LENGTHS for name, kind in wanted.items()}
    for file, expected in ((name, expectations[name]) for name in learner.files):
        found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors[file].items()}
        if wrong := sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name)):
            raise ValueError(
                f"{file}.safetensors is not of this model: {printable(wrong[0])} and {len(wrong) - 1} more"
            )
    if not all_finite(tensors):
        raise ValueError("it holds numbers that are not finite")
    return tensors
