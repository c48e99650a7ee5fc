"""Find the state dict in a trainer's checkpoint, and strip the prefixes of wrapped modules.

The names are those of published trainers: facebookresearch/DiT, SiT and Latte (`model`, `ema`), Lightning
(`state_dict`), timm and MMEngine (`state_dict_ema`, `ema_state_dict`), DeepSpeed (`module`), diffusers' `EMAModel`
(`shadow_params`), torch's `AveragedModel` (`n_averaged`).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, TypeVar

from torch import Tensor

from skipdit.files.untrusted import printable
from skipdit.interfaces import Fields

Preference = Literal["ema", "model"]
StateDict = Mapping[str, Tensor]
Value = TypeVar("Value")

NAMES: dict[Preference, tuple[str, ...]] = {
    "ema": ("ema", "ema_state_dict", "model_ema", "ema_model", "state_dict_ema", "model_ema_state_dict"),
    "model": ("model", "state_dict", "model_state_dict", "module", "net"),
}
# key segments that wrappers add: torch.compile, DistributedDataParallel, FSDP and checkpoint_wrapper
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# names of the attribute in which trainers keep the transformer
HOLDERS: dict[Preference, tuple[str, ...]] = {
    "ema": ("ema", "ema_model", "ema_net", "model_ema", "ema_denoiser"),
    "model": ("model", "net", "transformer", "dit", "denoiser", "diffusion_model"),
}
MAX_DEPTH = 4  # of nested wrappings
CONTAINERS = (Mapping, list, tuple)


def list_first(keys: Iterable[object], num_shown: int = 3) -> str:
    """Return the first few keys for a message, each cut and made printable."""
    texts = list(keys)
    return ", ".join(printable(key, 80) for key in texts[:num_shown]) + (", ..." if len(texts) > num_shown else "")


def pick_weights(checkpoint: object, prefer: Preference) -> StateDict:
    """Return the state dict: the checkpoint itself, or the preferred one inside, under the keys of the bare model."""
    content, averages = _find(checkpoint, prefer, MAX_DEPTH)
    if averages is not None:
        content = _name_averages(averages, content)
    return strip_prefixes(as_state_dict(content), prefer)


def _find(checkpoint: object, prefer: Preference, depth: int) -> tuple[object, Sequence[Tensor] | None]:
    """Return the state dict unchanged, and the `shadow_params` that replace its tensors if those are preferred."""
    entries = {kind: _present(checkpoint, names) if depth else {} for kind, names in NAMES.items()}
    if not any(entries.values()):
        return checkpoint, None
    other: Preference = "model" if prefer == "ema" else "ema"
    candidates = entries[prefer] or entries[other]
    if len(candidates) > 1:
        raise ValueError(f"has more than one state dict to choose from: {list_first(candidates)}")
    (content,) = candidates.values()
    match content:
        case {"shadow_params": list() | tuple() as shadow}:
            if not entries["model"]:
                raise ValueError(
                    "its shadow_params have no names: save the model beside them, or save EMAModel as a folder"
                )
            return _find(next(iter(entries["model"].values())), "model", depth - 1)[0], shadow
    return _find(content, prefer, depth - 1)


def _present(checkpoint: object, names: Collection[str]) -> Fields:
    """Return the containers with these names that are not empty; none if the checkpoint itself is no mapping."""
    match checkpoint:
        case Mapping():
            entries = {name: checkpoint[name] for name in names if name in checkpoint}
            return {name: value for name, value in entries.items() if isinstance(value, CONTAINERS) and value}
    return {}


def _name_averages(averages: Sequence[Tensor], model: object) -> dict[str, Tensor]:
    """Return the averages by name: `EMAModel.state_dict()` lists them in the order of the model's parameters."""
    names = as_state_dict(model)
    shapes = [getattr(average, "shape", None) for average in averages]
    if shapes != [tensor.shape for tensor in names.values()]:
        raise ValueError(
            f"its {len(averages)} shadow_params do not match, one by one, the {len(names)} tensors of the model"
        )
    return dict(zip(names, averages, strict=True))


def as_state_dict(checkpoint: object) -> StateDict:
    """Return the checkpoint itself; `ValueError` unless it maps names to tensors."""
    match checkpoint:
        case Mapping():
            entries = checkpoint.items()
            foreign = [key for key, value in entries if not (isinstance(key, str) and isinstance(value, Tensor))]
            if foreign or not checkpoint:
                found = list_first(foreign) or "nothing"
                raise ValueError(f"must contain tensors, or a state dict called model or ema, got {found}")
            return checkpoint
    raise ValueError(f"must contain a state dict, got {type(checkpoint).__name__}")


def strip_prefixes(tensors: Mapping[str, Value], prefer: Preference = "ema") -> dict[str, Value]:
    """Return the tensors under the keys of the bare model.

    Drop the segments of wrappers, wherever they are, then the name of the attribute that held the model. If there are
    both the model and its average, return the preferred one.
    """
    pairs = [(".".join(part for part in key.split(".") if part not in WRAPPERS), key) for key in tensors]
    if any(key == "n_averaged" for key, _ in pairs):  # AveragedModel counts its updates
        pairs = [(key, name) for key, name in pairs if key != "n_averaged"]
    for _ in range(MAX_DEPTH):
        roots = {key.partition(".")[0] for key, _ in pairs}
        holders = {kind: roots & set(names) for kind, names in HOLDERS.items()}
        if not roots or roots - holders["ema"] - holders["model"]:
            break
        other: Preference = "model" if prefer == "ema" else "ema"
        candidates = holders[prefer] or holders[other]
        if len(candidates) > 1:
            raise ValueError(f"has more than one model to choose from: {list_first(sorted(candidates))}")
        prefix = f"{next(iter(candidates))}."
        pairs = [(key.removeprefix(prefix), name) for key, name in pairs if key.startswith(prefix)]
    stripped = {key: tensors[name] for key, name in pairs}
    if len(stripped) < len(pairs):
        raise ValueError("two of its keys are equal without the prefixes of wrapped modules")
    return stripped
