"""Read the folders of latents that `skipdit latents` writes, memory-mapped in training.

`latents.json` describes the folder. `shard-00000.safetensors` has `mean` and, if the autoencoder returns one, `std`,
each (items, mirrored, *shape) before scaling. `shard-00000.json` has classes and captions, and `vae` is a copy of the
autoencoder. If captions were encoded too, shards have their concatenated states, and `nothing.safetensors` has those of
the empty prompt.
"""

import hashlib
import json
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from itertools import accumulate, chain
from pathlib import Path
from typing import TypedDict

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from skipdit.checkpoints.parts import Autoencoder, read_autoencoder
from skipdit.data.config import LatentConfig as LatentConfig
from skipdit.data.pictures import Draws, LabelledItems, pad_captions, pictures_beside
from skipdit.files.untrusted import check_regular, file_digest, printable, printable_path, read_json
from skipdit.interfaces import Fields
from skipdit.text import MAX_PROMPT_TOKENS, WIDTH, PromptStates

INFO, VERSION = "latents.json", 1
VAE, NOTHING = "vae", "nothing.safetensors"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
STORED = {"float32": "F32", "float16": "F16"}  # safetensors' names
MAX_SHARDS, MAX_CLASSES, MAX_FRAMES, MAX_CHANNELS, MAX_SIDE = 2**17, 100_000, 2**10, 2**10, 2**12
MAX_INFO_BYTES = 2**26
VERIFYING_THREADS = 4


class Shard(TypedDict):
    """The entry of a shard in `latents.json`."""

    name: str
    num_items: int
    latents: str
    """SHA-256 of its .safetensors file"""
    texts: str
    """SHA-256 of its .json file"""


class Text(TypedDict):
    """The sizes of a caption's states."""

    num_tokens: int
    width: int


class Scale(TypedDict):
    """How latents are scaled for transformers, from the autoencoder's config; `scale_latents` applies it."""

    scaling_factor: float
    shift_factor: float
    latents_mean: list[float] | None
    latents_std: list[float] | None


class Info(TypedDict):
    """Contents of `latents.json`."""

    version: int
    settings: Fields
    """options of `skipdit latents`"""
    shape: list[int]
    """(c h w) of a picture, (f c h w) of a clip"""
    dtype: str
    has_std: bool
    """true if the autoencoder returns a standard deviation"""
    flipped: bool
    """true if mirrored items are encoded too"""
    scale: Scale
    text: Text | None
    class_names: list[str]
    shards: list[Shard]
    others: dict[str, str]
    """SHA-256 of the other files, by name"""


class Texts(TypedDict):
    """Contents of `shard-00000.json`."""

    end: int
    """position in the source after the shard"""
    classes: list[str]
    """class name of each item"""
    captions: list[list[str]] | None
    """texts of each item; null if they are the class names"""


class LabelledLatents(LabelledItems):
    """Encoded pictures or clips with their class.

    An item is (mirrored, parts, c, h, w), or (mirrored, parts, frames + num_pictures, c, h, w) for a clip: the original
    and, if encoded, the mirrored one; parts are the mean and, if the autoencoder returns one, the standard deviation.
    `draw` turns items into latents for a training step. Labels, and pictures beside a clip: see `LabelledClips`.

    size: side of the latents. num_frames: None for pictures. content: SHA-256 of the data.
    `ValueError` / `OSError` with a one-line message if a file is missing, damaged, or does not match `latents.json`.
    """

    def __init__(self, folder: Path, info: Info, num_pictures: int = 0) -> None:
        self.folder, self.info, self.num_pictures = folder, info, num_pictures
        self.num_channels, self.size = info["shape"][-3], info["shape"][-1]
        self.num_frames = info["shape"][0] if len(info["shape"]) == 4 else None
        self.label_names = info["class_names"]
        texts = [_read_texts(folder, shard) for shard in info["shards"]]
        classes = {name: label for label, name in enumerate(self.label_names)}
        names = list(chain.from_iterable(text["classes"] for text in texts))
        if unknown := set(names) - classes.keys():
            raise ValueError(f"{printable_path(folder / INFO)} has no class {printable(min(unknown), 60)}")
        self.labels = [classes[name] for name in names]
        self._shard_captions = [text["captions"] or [[name] for name in text["classes"]] for text in texts]
        self.captions = pad_captions(list(chain.from_iterable(self._shard_captions)))
        self._ends = list(accumulate(shard["num_items"] for shard in info["shards"]))
        self._shards = [
            _open_tensors(folder / f"{shard['name']}.safetensors", _shapes(info, shard["num_items"], captions))
            for shard, captions in zip(info["shards"], self._shard_captions, strict=True)
        ]
        self.content = hashlib.sha256(json.dumps([info["shards"], info["others"]], sort_keys=True).encode()).hexdigest()

    def names(self, index: int) -> str:
        """Return what errors call an item."""
        return f"{index} of {printable_path(self.folder)}"

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        return self.stored(index)

    def stored(self, index: int) -> tuple[Tensor, int | Tensor]:
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

    def draw(self, stored: Tensor, flip: bool, draws: Draws) -> Tensor:
        """Return scaled latents (b c h w) or (b f c h w) from the items of a batch, drawn from their distribution.

        `ValueError` if `flip` is set and no mirrored items were encoded.
        """
        if flip and not self.info["flipped"]:
            raise ValueError(
                f"{printable_path(self.folder)} has no mirrored items: encode with --flip, or train without flip"
            )
        rows = torch.arange(len(stored), device=stored.device)
        is_flipped = draws.rand() < (0.5 if flip else 0)
        moments = stored[rows, is_flipped.to(stored.device, torch.long)].float()
        latents = moments[:, 0]
        if self.info["has_std"]:
            latents = latents + moments[:, 1] * draws.randn(*latents.shape[1:]).to(stored.device)
        return scale_latents(latents, self.info["scale"])

    @cached_property
    def vae(self) -> Autoencoder:
        """The autoencoder of these latents, in float32 on the CPU."""
        return read_autoencoder(self.folder / VAE, torch.float32)

    @cached_property
    def states(self) -> PromptStates | None:
        """The states of every caption in `captions`, item by item, and then of the empty prompt; None if no captions
        were encoded."""
        if self.info["text"] is None:
            return None
        num_variants, parts = len(self.captions[0]), []
        for tensors, captions in zip(self._shards, self._shard_captions, strict=True):
            lengths = list(map(len, captions))
            spans = zip(accumulate(lengths, initial=0), lengths, strict=False)
            rows = [start + min(variant, length - 1) for start, length in spans for variant in range(num_variants)]
            parts.append([tensors.get_tensor(name)[rows] for name in TEXT])
        nothing = _open_tensors(self.folder / NOTHING, _text_shapes(self.info["text"], self.info["dtype"], 1))
        parts.append([nothing.get_tensor(name) for name in TEXT])
        tokens, mask, pooled = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return PromptStates(tokens=tokens.float(), mask=mask.long(), pooled=pooled.float())


class PlannedLatents(LabelledItems):
    """One item of zeros with the sizes of a config, for a dry run. `ValueError` if the config lacks a size."""

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

    def stored(self, index: int) -> tuple[Tensor, int | Tensor]:
        frames = [] if self.num_frames is None else [self.num_frames + self.num_pictures]
        labels = torch.zeros(1 + self.num_pictures, dtype=torch.long) if self.num_pictures else 0
        return torch.zeros(*frames, self.num_channels, self.size, self.size), labels

    def draw(self, stored: Tensor, flip: bool, draws: Draws) -> Tensor:
        return stored


TEXT = ("text_tokens", "text_mask", "text_pooled")
Shapes = dict[str, tuple[list[int], str]]


def _moments(info: Info) -> tuple[str, ...]:
    return ("mean", "std") if info["has_std"] else ("mean",)


def _shapes(info: Info, num_items: int, captions: list[list[str]]) -> Shapes:
    """Return the shape and dtype of each tensor that a shard must have."""
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
    """Scale the autoencoder's latents (... c h w) for transformers; `skipdit.pipelines.unscale_latents` undoes this."""
    latents = latents - scale["shift_factor"]
    if scale["latents_mean"] is not None:
        latents = latents - _per_channel(tuple(scale["latents_mean"]), latents.device, latents.dtype)
    latents = latents * scale["scaling_factor"]
    if scale["latents_std"] is not None:
        latents = latents / _per_channel(tuple(scale["latents_std"]), latents.device, latents.dtype)
    return latents


@lru_cache(16)
def _per_channel(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return (c 1 1) on a device: copied once, since each copy of a list waits for the device."""
    return torch.tensor(values, device=device, dtype=dtype).view(-1, 1, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Opening


def is_latents(folder: Path) -> bool:
    """Return True if a folder was written completely by `skipdit latents`."""
    return (folder / INFO).is_file()


def open_latents(config: LatentConfig) -> LabelledLatents:
    """Open the latents of a config. `FileNotFoundError` / `ValueError` with a one-line message if that fails, or their
    sizes are not those that the config requires."""
    folder = Path(config.source)
    if not is_latents(folder):
        has_shards = any(folder.glob("shard-*.safetensors"))
        problem = (
            "are not finished: run the same skipdit latents again" if has_shards else "are missing: see skipdit latents"
        )
        raise FileNotFoundError(f"the latents in {printable_path(folder)} {problem}")
    info = read_info(folder)
    shape = info["shape"]
    if config.num_pictures and len(shape) != 4:
        raise ValueError(f"num_pictures needs latents of clips, but {printable_path(folder)} has those of pictures")
    sizes = {
        "num_channels": shape[-3],
        "sample_size": shape[-1],
        "num_frames": shape[0] if len(shape) == 4 else None,
        "num_classes": len(info["class_names"]),
    }
    for name, value in sizes.items():
        if (required := getattr(config, name)) is not None and required != value:
            raise ValueError(f"{printable_path(folder)} has {name} {value}, not {required}: set data.{name} to {value}")
    if config.verify:
        _verify(folder, info)
    return LabelledLatents(folder, info, config.num_pictures)


def read_info(folder: Path) -> Info:
    """Return the contents of `latents.json`; `ValueError` if it contradicts itself or exceeds a limit."""
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
    if problems := [problem for problem, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(f"{printable_path(path)} is invalid: it has {problems[0]}")
    return info


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def _verify(folder: Path, info: Info) -> None:
    """Raise `ValueError` if a file has changed since it was written."""
    expected = dict(info["others"])
    for shard in info["shards"]:
        expected |= {f"{shard['name']}.safetensors": shard["latents"], f"{shard['name']}.json": shard["texts"]}
    with ThreadPoolExecutor(VERIFYING_THREADS) as threads:
        for name, digest in zip(expected, threads.map(lambda name: _digest(folder / name), expected), strict=True):
            if digest != expected[name]:
                raise ValueError(f"{printable_path(folder / name)} is damaged: its SHA-256 is not the one in {INFO}")


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
        raise ValueError(f"{printable_path(path)} does not have {shard['num_items']} items")
    return texts


def _open_tensors(path: Path, shapes: Shapes) -> safe_open:
    """Memory-map a safetensors file; `ValueError` unless it has exactly these tensors."""
    check_regular(path)
    try:
        file = safe_open(path, "pt")  # keeps no handle
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{printable_path(path)} is not a complete safetensors file: {printable(error)}") from error
    if {name: (list(part.get_shape()), part.get_dtype()) for name, part in slices.items()} != shapes:
        raise ValueError(f"{printable_path(path)} does not have the tensors that {INFO} describes")
    return file
