"""Write and read checkpoints: safetensors and JSON only, written whole or not at all, and checked before use."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from skipdit.files import output
from skipdit.files.untrusted import as_type_or_none, file_digest, printable, read_json
from skipdit.interfaces import Fields
from skipdit.tasks.training import Items
from skipdit.training.config import TrainConfig
from skipdit.training.guard import GuardState
from skipdit.training.learner import MOMENTS, POWERS, Learner, Tensors, all_finite
from skipdit.training.posthoc_ema import LENGTHS
from skipdit.training.precision import ScaleState

LOGGER = logging.getLogger(__name__)

KIND = "checkpoint"  # in the marker of each checkpoint
PREVIOUS = "previous-run"  # folder for an earlier run
LOG = "log.jsonl"

# settings that may change when a run is resumed; and those that may with --allow-changes
FREE_TO_CHANGE = {
    "max_steps",
    "log_every",
    "sample_every",
    "num_samples",
    "num_inference_steps",
    "sample_guidance_scale",
}
FREE_TO_CHANGE |= {"checkpoint_every", "num_checkpoints", "num_workers", "data_on_device", "release_dtype"}
FREE_TO_CHANGE |= {"tensorboard", "num_accumulation_steps", "parallel"}
LATENT_CHECKS = {"num_channels", "sample_size", "num_frames", "num_classes", "verify"}  # of `LatentConfig`
CHANGED_ON_REQUEST = {"learning_rate", "rate_schedule", "warmup_steps", "weight_decay", "adam_betas", "gradient_clip"}
CHANGED_ON_REQUEST |= {"ema_decay", "label_dropout", "flip", "precision", "gradient_checkpointing", "compile"}
CHANGED_ON_REQUEST |= {"gradient_guard"}


class Fingerprint(TypedDict):
    """The data that a run learns from."""

    num_items: int
    class_names: list[str]
    digest: str
    """SHA-256 of all labels and captions, and of the contents of latents"""


class State(TypedDict):
    """`state.json` of a checkpoint."""

    step: int
    flops: NotRequired[float]
    """of all steps so far"""
    ema_step: int
    config: Fields
    data: Fingerprint
    without_moments: list[str]
    """trained parameters that have had no gradient yet"""
    guard: NotRequired[GuardState]
    """of a run with a gradient guard"""
    loss_scale: NotRequired[ScaleState]
    """of a run in fp16"""


def fingerprint(items: Items) -> Fingerprint:
    digest = hashlib.sha256()
    for label, captions in zip(items.labels, items.captions, strict=True):
        digest.update(json.dumps([int(label), *captions]).encode())
    digest.update(items.content.encode())
    return Fingerprint(num_items=len(items), class_names=list(items.label_names), digest=digest.hexdigest())


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step:07d}"


def step_of(path: Path) -> int | None:
    """Return the step in the name of a checkpoint; `None` if it is not such a name."""
    match = re.fullmatch(r"checkpoint-([0-9]{7,18})", path.name)
    return int(match[1]) if match and path.name == f"checkpoint-{int(match[1]):07d}" else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first: the folders with such a name and our marker."""
    steps = {step: path for path in folder.glob("checkpoint-*") if (step := step_of(path)) is not None}
    folders = {step: path for step, path in steps.items() if path.is_dir() and not path.is_symlink()}
    return [folders[step] for step in sorted(folders) if KIND in output.read_marker(folders[step])["files"]]


def check_places(folder: Path, max_steps: int) -> None:
    """Raise `FileExistsError` if something that is not ours has the name of a checkpoint that may be written."""
    for path in sorted(folder.glob("checkpoint-*")):
        if (step := step_of(path)) is not None and step <= max_steps:
            output.check_replaceable(path, KIND, even_damaged=True)


def previous_runs(folder: Path) -> list[Path]:
    """Return the folders into which `set_aside` has moved earlier runs."""
    paths = [path for path in sorted(folder.glob(f"{PREVIOUS}*")) if re.fullmatch(rf"{PREVIOUS}(-[0-9]+)?", path.name)]
    return [path for path in paths if not path.is_symlink() and PREVIOUS in output.read_marker(path)["files"]]


def set_aside(folder: Path, files: Collection[str] = ()) -> None:
    """Move the checkpoints of an earlier run, and other files of it, into `previous-run` (with a number if there is one
    already) until a checkpoint of this run is due."""
    checkpoints = list_checkpoints(folder)
    if not checkpoints and set(files) <= {LOG}:
        return
    previous, number = folder / PREVIOUS, 1
    while PREVIOUS in output.read_marker(previous)["files"]:
        number += 1
        previous = folder / f"{PREVIOUS}-{number}"
    output.check_replaceable(previous, PREVIOUS)
    previous.mkdir(exist_ok=True)
    output.write_marker(previous, {PREVIOUS: {name: file_digest(folder / name) for name in files}})
    # killed in between, the run resumes from what is left, with all of its log
    for name in (*(path.name for path in checkpoints), *files):
        (previous / name).parent.mkdir(exist_ok=True)
        (folder / name).rename(previous / name)
    LOGGER.warning("the earlier run is kept in %s until the first new checkpoint is due", printable(previous))


def drop_previous(folder: Path) -> None:
    """Delete what `set_aside` has moved."""
    for previous in previous_runs(folder):
        for path in list_checkpoints(previous):
            output.remove_ours(path)
        output.remove_ours(previous)


def previous_note(folder: Path) -> str:
    """Return a message on earlier runs that were set aside and have checkpoints; empty if there are none."""
    paths = [path for path in previous_runs(folder) if list_checkpoints(path)]
    names = " and ".join(printable(path) for path in paths)
    return f"the checkpoints of an earlier run are in {names}" if paths else ""


# ----------------------------------------------------------------------------------------------------------------------
# Writing


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Make errors of writing name the file or folder."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(f"{printable(path)} could not be written: {error.strerror or error}") from error
    except SafetensorError as error:
        raise OSError(f"{printable(path)} could not be written: {error}") from error


def save_checkpoint(
    folder: Path,
    step: int,
    flops: float,
    learner: Learner,
    tensors: Tensors,
    config: TrainConfig,
    data: Fingerprint,
    *,
    is_due: bool,
) -> None:
    """Write a checkpoint, whole or not at all, then delete older ones beyond `config.num_checkpoints`.

    tensors: those of the learner, not in shards. is_due: delete earlier runs that were set aside too; without it, as
    when a run is stopped, they stay.
    """
    without_moments = [name for name in learner.trained if f"{name}.step" not in tensors["optimizer"]]
    state = State(
        step=step,
        flops=flops,
        ema_step=learner.ema.optimization_step,
        config=asdict(config),
        data=data,
        without_moments=without_moments,
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
    if is_due:
        drop_previous(folder)
    # a checkpoint of a later step is one that could not be resumed from: it does not count
    reached = [checkpoint for checkpoint in list_checkpoints(folder) if (step_of(checkpoint) or 0) <= step]
    for checkpoint in reached[: -config.num_checkpoints]:
        output.remove_ours(checkpoint)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def resume(
    folder: Path, learner: Learner, config: TrainConfig, data: Fingerprint, *, allow_changes: bool = False
) -> tuple[int, float, list[str]]:
    """Restore the last usable checkpoint; return its step (0 if there is no checkpoint), the FLOPs so far, and messages
    for the user.

    `ValueError` if the checkpoint has other settings or data than this run, or if no checkpoint is usable, or the only
    ones were set aside.
    """
    problems: list[str] = []
    earlier = previous_note(folder)
    for path in reversed(list_checkpoints(folder)):
        try:
            state = read_state(path)
        except (OSError, ValueError) as error:
            problems.append(f"{path.name} cannot be used ({error})")
            continue
        notes = check_settings(path, state, config, data, allow_changes=allow_changes)
        try:
            tensors = read_tensors(path, state, learner)
        except (OSError, ValueError, SafetensorError) as error:
            problems.append(f"{path.name} cannot be used ({error})")
            continue
        learner.restore(tensors, state["ema_step"])
        if learner.guard is not None and "guard" in state:
            learner.guard.restore(state["guard"])
        if learner.loss_scale is not None and "loss_scale" in state:
            learner.loss_scale.restore(state["loss_scale"])
        if problems:
            notes.insert(0, f"{'; '.join(problems)}: the run resumes from {path.name}")
        if earlier:
            notes.append(f"{earlier}, until the next checkpoint of this one ({path.name}) is due")
        return state["step"], state.get("flops", 0.0), notes
    if problems:
        raise ValueError(f"{'; '.join(problems)}: give another --out, or --no-resume")
    if earlier:
        raise ValueError(
            f"{earlier}, and {printable(folder)} has none: move all of it but {output.MARKER} back to resume it, or "
            "give --no-resume"
        )
    return 0, 0.0, []


def read_state(path: Path) -> State:
    """Return the state of a checkpoint; `ValueError` if it is incomplete or contradicts itself."""
    output.check_whole(path, KIND)
    state = read_json(path / "state.json", State)
    if state["step"] != step_of(path):
        raise ValueError(f"{path.name}/state.json is of step {state['step']}")
    if state["ema_step"] != state["step"]:
        raise ValueError(f"{path.name}/state.json says {state['ema_step']} of {state['step']} steps were averaged")
    return state


def check_settings(
    path: Path, state: State, config: TrainConfig, data: Fingerprint, *, allow_changes: bool
) -> list[str]:
    """Return messages on settings that have changed; `ValueError` if they, or the data, forbid resuming."""
    now: Fields = json.loads(json.dumps(asdict(config)))
    # a setting that is newer than the checkpoint had its default value
    before: Fields = json.loads(json.dumps(asdict(TrainConfig()))) | state["config"]
    for name in ("model", "objective"):
        if (part := as_type_or_none(before.get(name), Fields)) is not None:
            before[name] = json.loads(json.dumps(asdict(type(getattr(config, name))()))) | part
    if same_path(before.get("start_from"), now["start_from"]):
        before["start_from"] = now["start_from"]
    changed = [name for name, value in now.items() if name != "data" and before.get(name) != value]
    data_before = as_type_or_none(before.get("data"), Fields) or {}
    free = {"source", *(LATENT_CHECKS if "verify" in now["data"] else ())}  # only latents are verified
    changed += [
        f"data.{name}" for name, value in now["data"].items() if name not in free and data_before.get(name) != value
    ]
    on_request = sorted(set(changed) & CHANGED_ON_REQUEST)
    allowed = FREE_TO_CHANGE | (set(on_request) if allow_changes else set())
    forbidden = [name for name in changed if name not in allowed]
    if forbidden or state["step"] > config.max_steps:
        what = ", ".join(forbidden) or f"fewer than its {state['step']} steps"
        remedy = (
            "--allow-changes, another --out" if forbidden and set(forbidden) <= set(on_request) else "another --out"
        )
        raise ValueError(
            f"{printable(path)} cannot be resumed with other settings ({what}): give {remedy}, or --no-resume"
        )
    if different := difference(state["data"], data):
        raise ValueError(
            f"{printable(path)} was trained on other data ({different}): give another --out, or --no-resume"
        )
    notes = [
        f"from step {state['step']} on, {name} is {now[name]} instead of {before.get(name)}" for name in on_request
    ]
    if data_before.get("source") != now["data"]["source"]:
        notes.append(f"the data is the same, but is now at {printable(now['data']['source'])}")
    return notes


def same_path(before: object, now: object) -> bool:
    """Return True if two paths are the same, however they are written."""
    paths = [as_type_or_none(path, str) for path in (before, now)]
    return None not in paths and len({os.path.abspath(str(path)) for path in paths}) == 1


def difference(before: Fingerprint, now: Fingerprint) -> str:
    """Return how the data has changed, as text; empty if it is the same."""
    # a folder without classes has its own name as the only one, and may be renamed
    names_before, names = ([] if len(data["class_names"]) == 1 else data["class_names"] for data in (before, now))
    removed = [name for name in names_before if name not in names]
    added = [name for name in names if name not in names_before]
    texts = [
        f"{word} {', '.join(map(printable, names))}" for word, names in (("without", removed), ("with", added)) if names
    ]
    if texts:
        return f"now {' and '.join(texts)}"
    if names_before != names:
        return "its classes are now in another order"
    if before["num_items"] != now["num_items"]:
        return f"{before['num_items']} items then, {now['num_items']} now"
    return "" if before["digest"] == now["digest"] else "other labels or captions now"


def read_tensors(path: Path, state: State, learner: Learner) -> Tensors:
    """Return a checkpoint's tensors; `ValueError` if one is missing, unknown, misshapen or not finite."""
    tensors = {name: load_file(path / f"{name}.safetensors") for name in learner.files}
    weights = {name: (parameter.shape, parameter.dtype) for name, parameter in learner.model.named_parameters()}
    moments = {
        f"{name}.{key}": (torch.Size(), torch.float32) if key == "step" else weights[name]
        for name in learner.trained
        if name not in state["without_moments"]
        for key in MOMENTS
    }
    expectations = {"model": weights, "ema": weights, "optimizer": moments}
    expectations[POWERS] = {f"{length}.{name}": kind for length in LENGTHS for name, kind in weights.items()}
    for file, expected in ((name, expectations[name]) for name in learner.files):
        actual = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors[file].items()}
        if wrong := sorted(name for name in actual.keys() | expected if actual.get(name) != expected.get(name)):
            raise ValueError(
                f"{file}.safetensors does not fit this model: {printable(wrong[0])} and {len(wrong) - 1} more"
            )
    if not all_finite(tensors):
        raise ValueError("it contains non-finite numbers")
    return tensors
