"""Latents in a folder, as `skipdit latents` writes them, memory-mapped in training.

`latents.json` says what is in the folder. `shard-00000.safetensors` holds `mean` and, where the autoencoder tells one,
`std`, each (items, mirrored, *shape) as the autoencoder makes them; `shard-00000.json` holds classes and captions, and
`vae` a copy of the autoencoder. Where captions were encoded too, shards hold their states, one after the other, and
`nothing.safetensors` those of the empty prompt.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from skipdit.checkpoints.parts import Autoencoder, read_autoencoder
from skipdit.data import pad_captions, pictures_beside
from skipdit.options import check_positive
from skipdit.text import MAX_PROMPT_TOKENS, WIDTH, PromptStates
from skipdit.untrusted import check_regular, file_digest, printable, printable_path, read_json

INFO, VERSION = "latents.json", 1
VAE, NOTHING = "vae", "nothing.safetensors"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
STORED = {"float32": "F32", "float16": "F16"}  # as safetensors calls them
MAX_SHARDS, MAX_CLASSES, MAX_FRAMES, MAX_CHANNELS, MAX_SIDE = 2**17, 100_000, 2**10, 2**10, 2**12
MAX_INFO_BYTES = 2**26
VERIFYING_THREADS = 4


class Shard(TypedDict):
    """num_items: of the shard. latents, texts: SHA-256 of its .safetensors and of its .json."""

    name: str
    num_items: int
    latents: str
    texts: str


class Text(TypedDict):
    """Sizes of the states of one caption."""

    num_tokens: int
    width: int


class Scale(TypedDict):
    """How latents of the autoencoder become those that transformers are trained on: as in its config."""

    scaling_factor: float
    shift_factor: float
    latents_mean: list[float] | None
    latents_std: list[float] | None


class Info(TypedDict):
    """`latents.json`. settings: with which `skipdit latents` was called. shape: (c h w) of a picture, (f c h w) of a
    clip. has_std: whether the autoencoder tells a standard deviation. flipped: whether mirrored ones are there too.
    others: SHA-256 of the files that are no shards."""

    version: int
    settings: dict[str, Any]
    shape: list[int]
    dtype: str
    has_std: bool
    flipped: bool
    scale: Scale
    text: Text | None
    class_names: list[str]
    shards: list[Shard]
    others: dict[str, str]


class Texts(TypedDict):
    """`shard-00000.json`. end: how far the source had been read after it. captions: of each item, `None` where they are
    the class names."""

    end: int
    classes: list[str]
    captions: list[list[str]] | None


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Latents, as `skipdit latents` wrote them."""

    source: str
    """their folder"""
    num_channels: int | None = None
    """of the latents; others are refused, None takes any"""
    sample_size: int | None = None
    """side of the latents; others are refused, None takes any"""
    num_frames: int | None = None
    """of each clip; others are refused, None takes any"""
    num_classes: int | None = None
    """classes; another number is refused, None takes any"""
    num_pictures: int = 0
    """single frames of other clips that come along with each clip, for joint image-video training"""
    verify: bool = True
    """compare every file with its SHA-256 first"""

    def __post_init__(self) -> None:
        check_positive(self, "num_channels", "sample_size", "num_frames", "num_classes")
        if self.num_pictures < 0:
            raise ValueError(f"num_pictures must be at least 0, got {self.num_pictures}")


class LabelledLatents(Dataset[tuple[Tensor, int | Tensor]]):
    """What pictures or clips became under an autoencoder, with their class.

    An item is (mirrored, parts, c, h, w), or (mirrored, parts, frames + num_pictures, c, h, w) of a clip: of the
    picture as it is and, where that was encoded, mirrored, the mean and, where the autoencoder tells one, the standard
    deviation. What a step learns is drawn of it by `draw`. Labels and pictures beside a clip as of `LabelledClips`.

    size: side of the latents. num_frames: `None` of pictures. content: SHA-256 of what is learned.
    `ValueError` / `OSError` with one line where a file is missing, damaged, or not as `latents.json` says.
    """

    def __init__(self, folder: Path, info: Info, num_pictures: int = 0) -> None:
        self.folder, self.info, self.num_pictures = folder, info, num_pictures
        self.num_channels, self.size = info["shape"][-3], info["shape"][-1]
        self.num_frames = info["shape"][0] if len(info["shape"]) == 4 else None
        self.label_names = info["class_names"]
        texts = [_read_texts(folder, shard) for shard in info["shards"]]
        classes = {name: label for label, name in enumerate(self.label_names)}
        found = list(chain.from_iterable(text["classes"] for text in texts))
        if unknown := set(found) - classes.keys():
            raise ValueError(f"{printable_path(folder / INFO)} has no class {printable(min(unknown), 60)}")
        self.labels = [classes[name] for name in found]
        self._own_captions = [text["captions"] or [[name] for name in text["classes"]] for text in texts]
        self.captions = pad_captions(list(chain.from_iterable(self._own_captions)))
        self._ends = list(accumulate(shard["num_items"] for shard in info["shards"]))
        self._shards = [
            _open_tensors(folder / f"{shard['name']}.safetensors", _shapes(info, shard["num_items"], own))
            for shard, own in zip(info["shards"], self._own_captions, strict=True)
        ]
        self.content = hashlib.sha256(json.dumps([info["shards"], info["others"]], sort_keys=True).encode()).hexdigest()

    def names(self, index: int) -> str:
        """Return what an error calls an item."""
        return f"{index} of {printable_path(self.folder)}"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        return self.stored(index)

    def stored(self, index: int) -> tuple[Tensor, int | Tensor]:
        """Return an item as it is stored, with its class or classes."""
        index = range(len(self))[index]
        if not self.num_pictures:
            return self._read(index), self.labels[index]
        others = pictures_beside(index, len(self), self.num_frames or 1, self.num_pictures)
        frames = [self._read(index), *(self._read(other)[:, :, frame : frame + 1] for other, frame in others)]
        labels = [self.labels[index], *(self.labels[other] for other, _ in others)]
        return torch.cat(frames, dim=2), torch.tensor(labels)

    def _read(self, index: int) -> Tensor:
        number = bisect_right(self._ends, index)
        row = index - (self._ends[number - 1] if number else 0)
        return torch.stack([self._shards[number].get_slice(name)[row] for name in _moments(self.info)], dim=1)

    def draw(self, stored: Tensor, flip: bool, generator: torch.Generator) -> Tensor:
        """Return latents (b c h w) or (b f c h w), as transformers are trained on them, from the items of a batch.

        `ValueError` where mirrored ones are asked for and none were encoded.
        """
        if flip and not self.info["flipped"]:
            raise ValueError(f"{printable_path(self.folder)} has no mirrored ones: encode with --flip, or set no flip")
        rows = torch.arange(len(stored), device=stored.device)
        at = generator.device
        is_flipped = torch.rand(len(stored), generator=generator, device=at) < (0.5 if flip else 0)
        moments = stored[rows, is_flipped.to(stored.device, torch.long)].float()
        latents = moments[:, 0]
        if self.info["has_std"]:
            noise = torch.randn(latents.shape, generator=generator, device=at)
            latents = latents + moments[:, 1] * noise.to(stored.device)
        return scale_latents(latents, self.info["scale"])

    @cached_property
    def vae(self) -> Autoencoder:
        """The autoencoder that made these latents, in float32 on the CPU."""
        return read_autoencoder(self.folder / VAE, torch.float32)

    @cached_property
    def states(self) -> PromptStates | None:
        """Those of every caption in `captions`, item by item, and of the empty prompt; `None` where no captions were
        encoded."""
        if self.info["text"] is None:
            return None
        num_variants, parts = len(self.captions[0]), []
        for tensors, own in zip(self._shards, self._own_captions, strict=True):
            starts = accumulate(map(len, own), initial=0)
            each = zip(starts, own, strict=False)
            rows = [start + min(variant, len(given) - 1) for start, given in each for variant in range(num_variants)]
            parts.append([tensors.get_tensor(name)[rows] for name in TEXT])
        nothing = _open_tensors(self.folder / NOTHING, _text_shapes(self.info["text"], self.info["dtype"], 1))
        parts.append([nothing.get_tensor(name) for name in TEXT])
        tokens, mask, pooled = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return PromptStates(tokens=tokens.float(), mask=mask.long(), pooled=pooled.float())


class PlannedLatents(Dataset[tuple[Tensor, int | Tensor]]):
    """One item of zeros as a config expects it, for a dry run. `ValueError` where the config does not tell its size."""

    vae = None

    def __init__(self, config: LatentConfig) -> None:
        if config.num_channels is None or config.sample_size is None:
            raise ValueError("without the latents, data.num_channels and data.sample_size must be given")
        self.num_channels, self.size = config.num_channels, config.sample_size
        self.num_frames, self.num_pictures = config.num_frames, config.num_pictures
        self.label_names = [str(label) for label in range(config.num_classes or 1)]
        self.labels, self.captions = [0], [("",)]
        tokens = torch.zeros(2, MAX_PROMPT_TOKENS, WIDTH)
        self.states = PromptStates(tokens=tokens, mask=torch.ones(2, MAX_PROMPT_TOKENS).long(), pooled=tokens[:, 0])

    def names(self, index: int) -> str:
        return f"{index} of a dry run"

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        return self.stored(index)

    def stored(self, index: int) -> tuple[Tensor, int | Tensor]:
        frames = [] if self.num_frames is None else [self.num_frames + self.num_pictures]
        labels = torch.zeros(1 + self.num_pictures, dtype=torch.long) if self.num_pictures else 0
        return torch.zeros(*frames, self.num_channels, self.size, self.size), labels

    def draw(self, stored: Tensor, flip: bool, generator: torch.Generator) -> Tensor:
        return stored


TEXT = ("text_tokens", "text_mask", "text_pooled")
Shapes = dict[str, tuple[list[int], str]]


def _moments(info: Info) -> tuple[str, ...]:
    return ("mean", "std") if info["has_std"] else ("mean",)


def _shapes(info: Info, num_items: int, captions: list[list[str]]) -> Shapes:
    """What a shard must hold."""
    shape = [num_items, 2 if info["flipped"] else 1, *info["shape"]]
    shapes: Shapes = dict.fromkeys(_moments(info), (shape, STORED[info["dtype"]]))
    if info["text"] is not None:
        shapes |= _text_shapes(info["text"], info["dtype"], sum(map(len, captions)))
    return shapes


def _text_shapes(text: Text, dtype: str, num_captions: int) -> Shapes:
    length, width = text["num_tokens"], text["width"]
    shapes = ([num_captions, length, width], [num_captions, length], [num_captions, width])
    return dict(zip(TEXT, zip(shapes, (STORED[dtype], "U8", STORED[dtype]), strict=True), strict=True))


def scale_latents(latents: Tensor, scale: Scale) -> Tensor:
    """Latents (... c h w) that transformers are trained on, from those of the autoencoder: what
    `skipdit.pipelines.unscale_latents` undoes."""
    latents = latents - scale["shift_factor"]
    if scale["latents_mean"] is not None:
        latents = latents - latents.new_tensor(scale["latents_mean"]).view(-1, 1, 1)
    latents = latents * scale["scaling_factor"]
    if scale["latents_std"] is not None:
        latents = latents / latents.new_tensor(scale["latents_std"]).view(-1, 1, 1)
    return latents


# ----------------------------------------------------------------------------------------------------------------------
# Opening


def is_latents(folder: Path) -> bool:
    """Whether `skipdit latents` has finished a folder."""
    return (folder / INFO).is_file()


def open_latents(config: LatentConfig) -> LabelledLatents:
    """Return the latents that a config names. `FileNotFoundError` / `ValueError` with one line where they cannot be had
    or are others than the config says."""
    folder = Path(config.source)
    if not is_latents(folder):
        begun = any(folder.glob("shard-*.safetensors"))
        what = "are not finished: run the same skipdit latents again" if begun else "are missing: see skipdit latents"
        raise FileNotFoundError(f"the latents in {printable_path(folder)} {what}")
    info = read_info(folder)
    shape = info["shape"]
    if config.num_pictures and len(shape) != 4:
        raise ValueError(f"num_pictures needs latents of clips, {printable_path(folder)} has those of pictures")
    found = {
        "num_channels": shape[-3],
        "sample_size": shape[-1],
        "num_frames": shape[0] if len(shape) == 4 else None,
        "num_classes": len(info["class_names"]),
    }
    for name, value in found.items():
        if (wanted := getattr(config, name)) is not None and wanted != value:
            told = f"{printable_path(folder)} has {name} {value}, not {wanted}"
            raise ValueError(f"{told}: set data.{name} to {value}")
    if config.verify:
        _verify(folder, info)
    return LabelledLatents(folder, info, config.num_pictures)


def read_info(folder: Path) -> Info:
    """Read `latents.json`; `ValueError` where it contradicts itself or is beyond limits."""
    path = folder / INFO
    info = read_json(path, Info, max_bytes=MAX_INFO_BYTES)
    shape, names = info["shape"], info["class_names"]
    limits = (MAX_FRAMES, MAX_CHANNELS, MAX_SIDE, MAX_SIDE)[-len(shape) :]
    text = info["text"] or Text(num_tokens=1, width=1)
    wrong = {
        f"version {info['version']}, not {VERSION}": info["version"] != VERSION,
        f"the shape {shape[:5]}": len(shape) not in (3, 4)
        or shape[-1] != shape[-2]
        or not all(1 <= side <= limit for side, limit in zip(shape, limits, strict=True)),
        f"the dtype {printable(info['dtype'], 60)}": info["dtype"] not in DTYPES,
        f"{len(names)} classes": not 1 <= len(names) <= MAX_CLASSES or len(set(names)) < len(names),
        f"{len(info['shards'])} shards": not 1 <= len(info["shards"]) <= MAX_SHARDS,
        "shards without items": any(shard["num_items"] < 1 for shard in info["shards"]),
        "other names of shards": [shard["name"] for shard in info["shards"]]
        != [shard_name(number) for number in range(len(info["shards"]))],
        "other files": any(Path(name).is_absolute() or ".." in Path(name).parts for name in info["others"]),
        "other sizes of texts": not (1 <= text["num_tokens"] <= 2**12 and 1 <= text["width"] <= 2**14),
        "a scaling factor of 0": info["scale"]["scaling_factor"] == 0,
        "scales of other channels": any(
            values is not None and len(values) != shape[-3]
            for values in (info["scale"]["latents_mean"], info["scale"]["latents_std"])
        ),
    }
    if said := [what for what, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(f"{printable_path(path)} is not as skipdit latents writes it: it has {said[0]}")
    return info


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def _verify(folder: Path, info: Info) -> None:
    """`ValueError` naming a file that is not the one that was written."""
    wanted = dict(info["others"])
    for shard in info["shards"]:
        wanted |= {f"{shard['name']}.safetensors": shard["latents"], f"{shard['name']}.json": shard["texts"]}
    with ThreadPoolExecutor(VERIFYING_THREADS) as threads:
        for name, digest in zip(wanted, threads.map(lambda name: _digest(folder / name), wanted), strict=True):
            if digest != wanted[name]:
                raise ValueError(f"{printable_path(folder / name)} is damaged: its SHA-256 is not that of {INFO}")


def _digest(path: Path) -> str | None:
    try:
        return file_digest(path)
    except FileNotFoundError:
        return None


def _read_texts(folder: Path, shard: Shard) -> Texts:
    path = folder / f"{shard['name']}.json"
    texts = read_json(path, Texts, max_bytes=MAX_INFO_BYTES)
    captions = texts["captions"]
    if len(texts["classes"]) != shard["num_items"] or (
        captions is not None and (len(captions) != shard["num_items"] or not all(captions))
    ):
        raise ValueError(f"{printable_path(path)} is not of {shard['num_items']} items")
    return texts


def _open_tensors(path: Path, shapes: Shapes) -> Any:
    """A safetensors file, mapped into memory; `ValueError` where it holds other tensors than these."""
    with _refusing(path):
        check_regular(path)
        file = safe_open(path, "pt")  # holds no handle
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        if {name: (list(each.get_shape()), each.get_dtype()) for name, each in found.items()} != shapes:
            raise ValueError(f"{printable_path(path)} holds other tensors than {INFO} says")
        return file


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{printable_path(path)} is not a whole safetensors file: {printable(error)}") from error
