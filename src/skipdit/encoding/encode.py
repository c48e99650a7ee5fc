"""Encode pictures, clips and captions into a folder of latents, shard by shard, each written whole or not at all."""

import hashlib
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from torch import Tensor

from skipdit.checkpoints.parts import downsampling, read_autoencoder
from skipdit.data import latents
from skipdit.encoding.checks import check_captions
from skipdit.encoding.config import FREE_TO_CHANGE, EncodeConfig
from skipdit.encoding.sources import Job, Sample, open_source
from skipdit.environment import resolve_device
from skipdit.files.output import OutputFolder, to_json
from skipdit.files.untrusted import file_digest, printable, printable_path, read_json
from skipdit.interfaces import VAE, Fields
from skipdit.terminal import progress_bar
from skipdit.text import MAX_PROMPT_TOKENS, WIDTH, SentenceEncoder, check_text_installed, load_encoder

LOGGER = logging.getLogger(__name__)
SETTINGS = "settings.json"
AHEAD = 4  # samples read ahead per thread


class Fingerprint(TypedDict):
    """Contents of `settings.json`: only an encoding with the same settings may resume in a folder."""

    settings: Fields
    source: str
    """SHA-256 of the source"""
    vae: str
    """SHA-256 of the autoencoder"""


@dataclass(frozen=True)
class LatentMoments:
    """The distribution of latents that an autoencoder returns."""

    mean: Tensor
    """(b c h w)"""
    std: Tensor | None
    """(b c h w); None if the autoencoder returns none"""


def encode(config: EncodeConfig, out: OutputFolder, *, device: str = "auto") -> latents.Info:
    """Encode the source of a config, and return the contents of `latents.json`.

    An interrupted encoding resumes after its last complete shard, with the same result. `ValueError` if the folder has
    latents of other settings, or something cannot be read; `FileExistsError` if files that are not ours are in the way.
    """
    data = Path(config.source)
    if data.is_dir() and data.resolve() in out.path.resolve().parents:
        raise ValueError(f"{printable_path(out.path)} lies in the data, and would be read as data: give another --out")
    vae: VAE = read_autoencoder(Path(config.vae), torch.float32)
    scale = downsampling(vae)
    if config.image_size % scale:
        raise ValueError(f"image_size must be divisible by {scale} for this autoencoder, got {config.image_size}")
    if config.text:
        check_text_installed()
    source = open_source(config)
    fingerprint = Fingerprint(
        settings={name: value for name, value in asdict(config).items() if name not in FREE_TO_CHANGE},
        source=source.digest,
        vae=_digest_of(vae),
    )
    _begin(out, fingerprint)
    if out.holds(latents.INFO):
        return latents.read_info(out.path)
    others = _write_others(out, config, vae)
    writer = _Writer(config, out, vae.to(resolve_device(device)))
    position = writer.resume()
    with progress_bar() as progress:
        task = progress.add_task("encoding", total=source.num_jobs, completed=position)
        for end, sample in _read_ahead(source.jobs(position), config):
            progress.update(task, completed=end)
            if sample is not None:
                writer.add(end, sample)
    writer.flush()
    if not writer.shards:
        raise ValueError(f"nothing in {printable_path(config.source)} can be read")
    return _finish(out, config, writer, others, source.class_names)


def _begin(out: OutputFolder, fingerprint: Fingerprint) -> None:
    """Write the fingerprint into a folder, or compare it with the one there. `ValueError` if they differ,
    `FileExistsError` if files that are not ours are in the way."""
    names = [path.name for path in sorted(out.path.glob("shard-*"))]
    out.claim([SETTINGS, latents.INFO, latents.NOTHING, *names])
    if not out.holds(SETTINGS):
        out.write_text(SETTINGS, to_json(fingerprint))
        return
    old, new = read_json(out.path / SETTINGS, Fingerprint), fingerprint
    names = sorted(old["settings"].keys() | new["settings"].keys())
    changed = [name for name in names if old["settings"].get(name) != new["settings"].get(name)]
    free = {"source", "vae", *FREE_TO_CHANGE}  # the first two may have moved
    changed = [name for name in changed if name not in free]
    changed += ["source"] * (old["source"] != new["source"]) + ["vae"] * (old["vae"] != new["vae"])
    if changed:
        text = ", ".join(dict.fromkeys(changed))
        raise ValueError(f"{printable_path(out.path)} contains latents of other settings ({text}): give another --out")


def _digest_of(vae: VAE) -> str:
    digest = hashlib.sha256(vae.to_json_string().encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def _write_others(out: OutputFolder, config: EncodeConfig, vae: VAE) -> dict[str, str]:
    """Write the autoencoder and the states of the empty prompt, unless they exist; return SHA-256 by file name."""
    names = {f"{latents.VAE}/{name}" for name in ("config.json", "diffusion_pytorch_model.safetensors")}
    names |= {latents.NOTHING} if config.text else set()
    for name in sorted(name for name in names if not out.holds(name)):
        with out.file(name) as draft:
            if name == latents.NOTHING:
                save_file(encode_texts(load_encoder(), [""], latents.DTYPES[config.dtype]), draft)
            elif name.endswith(".json"):
                draft.write_text(vae.to_json_string(), encoding="utf-8")
            else:
                tensors = {key: tensor.contiguous() for key, tensor in vae.state_dict().items()}
                save_file(tensors, draft, metadata={"format": "pt"})
    return {name: file_digest(out.path / name) for name in sorted(names)}


def _finish(
    out: OutputFolder,
    config: EncodeConfig,
    writer: "_Writer",
    others: dict[str, str],
    class_names: Sequence[str] | None,
) -> latents.Info:
    used = writer.class_names
    order = class_names if class_names is not None else sorted(used, key=_by_number)
    if unused := [name for name in order if name not in used]:
        LOGGER.warning("left out: %d classes without a readable item: %s", len(unused), printable(", ".join(unused)))
    vae = writer.vae
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    info = latents.Info(
        version=latents.VERSION,
        settings=asdict(config),
        shape=writer.shape,
        dtype=config.dtype,
        has_std=returns_std(vae),
        flipped=config.flip,
        scale=latents.Scale(
            scaling_factor=float(vae.config.scaling_factor),
            shift_factor=float(vae.config.get("shift_factor") or 0),
            latents_mean=None if mean is None else list(map(float, mean)),
            latents_std=None if std is None else list(map(float, std)),
        ),
        text=latents.Text(num_tokens=MAX_PROMPT_TOKENS, width=WIDTH) if config.text else None,
        class_names=[name for name in order if name in used],
        shards=writer.shards,
        others=others,
    )
    out.write_text(latents.INFO, to_json(info))
    return latents.read_info(out.path)


def _by_number(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if name.isascii() and name.isdecimal() else (1, 0, name)


class _Writer:
    """Encode samples, and write a shard whenever there are enough. end: position in the source.

    Every shard begins with a new batch, so that it does not depend on where an encoding was interrupted.
    """

    def __init__(self, config: EncodeConfig, out: OutputFolder, vae: VAE) -> None:
        self.config, self.out, self.vae = config, out, vae
        self.shards: list[latents.Shard] = []
        self.class_names: set[str] = set()
        self.waiting: list[Sample] = []
        self.moments: list[dict[str, Tensor]] = []  # this and the next two: of the current shard
        self.classes: list[str] = []
        self.captions: list[list[str]] = []
        self.end = 0
        side = config.image_size // downsampling(vae)
        frames = [] if config.num_frames is None else [config.num_frames]
        self.shape = [*frames, vae.config.latent_channels, side, side]

    def resume(self) -> int:
        """Take over the existing shards, and return the position in the source after them."""
        while self.out.holds(f"{(name := latents.shard_name(len(self.shards)))}.json"):
            if not self.out.holds(f"{name}.safetensors"):
                break
            texts = read_json(self.out.path / f"{name}.json", latents.Texts, max_bytes=latents.MAX_INFO_BYTES)
            self._list(name, texts)
        if self.shards:
            LOGGER.warning("resuming after %d existing shards", len(self.shards))
        return self.end

    def add(self, end: int, sample: Sample) -> None:
        self.waiting.append(sample)
        self.classes.append(sample.class_name)
        self.captions.append([sample.class_name] if sample.captions is None else sample.captions)
        self.end = end
        if len(self.waiting) * (self.config.num_frames or 1) >= self.config.batch_size:
            self._encode_waiting()
        if len(self.classes) == self.config.shard_size:
            self.flush()

    def flush(self) -> None:
        """Write the samples collected so far, if any, as a shard."""
        if not self.classes:
            return
        if self.waiting:
            self._encode_waiting()
        name = latents.shard_name(len(self.shards))
        tensors = {key: torch.cat([batch[key] for batch in self.moments]).contiguous() for key in self.moments[0]}
        if self.config.text:
            flat = [caption for captions in self.captions for caption in captions]
            tensors |= encode_texts(load_encoder(), flat, latents.DTYPES[self.config.dtype])
        is_plain = self.captions == [[name] for name in self.classes]
        texts = latents.Texts(end=self.end, classes=self.classes, captions=None if is_plain else self.captions)
        self.out.write_text(f"{name}.json", to_json(texts))
        with self.out.file(f"{name}.safetensors") as draft:
            save_file(tensors, draft)
        self._list(name, texts)
        self.moments, self.classes, self.captions = [], [], []

    def _list(self, name: str, texts: latents.Texts) -> None:
        self.shards.append(
            latents.Shard(
                name=name,
                num_items=len(texts["classes"]),
                latents=file_digest(self.out.path / f"{name}.safetensors"),
                texts=file_digest(self.out.path / f"{name}.json"),
            )
        )
        self.class_names |= set(texts["classes"])
        self.end = texts["end"]

    def _encode_waiting(self) -> None:
        """Encode the waiting samples as `mean` and `std`, (items, mirrored, *shape)."""
        pixels = torch.stack([sample.pixels for sample in self.waiting])
        versions = [pixels, pixels.flip(-1)] if self.config.flip else [pixels]
        encoded = [encode_pixels(self.vae, version.flatten(0, -4), self.config.batch_size) for version in versions]
        shape, dtype = (len(pixels), *self.shape), latents.DTYPES[self.config.dtype]
        parts = {"mean": [item.mean for item in encoded], "std": [i.std for i in encoded if i.std is not None]}
        moments = {
            name: torch.stack([tensor.reshape(shape) for tensor in tensors], dim=1).to(dtype)
            for name, tensors in parts.items()
            if tensors
        }
        if not all(tensor.isfinite().all() for tensor in moments.values()):
            first = len(self.classes) - len(self.waiting)
            name = f"one of the samples {first} to {len(self.classes) - 1} of {latents.shard_name(len(self.shards))}"
            raise ValueError(f"{name} is not finite in {self.config.dtype}: try another --dtype or autoencoder")
        self.moments.append(moments)
        self.waiting = []


def returns_std(vae: VAE) -> bool:
    return not isinstance(vae, AutoencoderTiny)


@torch.no_grad()
def encode_pixels(vae: VAE, pixels: Tensor, batch_size: int) -> LatentMoments:
    """Return the latents of uint8 pixels (b 3 h w), encoded in batches on the autoencoder's device, on the CPU."""
    means, stds = [], []
    for batch in pixels.split(batch_size):
        encoded = vae.encode(batch.to(vae.device).float() / 127.5 - 1)
        if returns_std(vae):
            means.append(encoded.latent_dist.mean.cpu())
            stds.append(encoded.latent_dist.std.cpu())
        else:
            means.append(encoded.latents.cpu())
    return LatentMoments(torch.cat(means), torch.cat(stds) if stds else None)


def encode_texts(encoder: SentenceEncoder, captions: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the states of captions as stored in a shard. `ValueError` if one is too long."""
    states = encoder.encode(captions, MAX_PROMPT_TOKENS)
    tensors = (states.tokens.to(dtype), states.mask.to(torch.uint8), states.pooled.to(dtype))
    return dict(zip(latents.TEXT, (tensor.contiguous() for tensor in tensors), strict=True))


def _read_ahead(jobs: Iterator[tuple[int, Job]], config: EncodeConfig) -> Iterator[tuple[int, Sample | None]]:
    """Yield (end, sample) in order while threads read ahead; the sample is None if it is broken and left out."""
    threads = ThreadPoolExecutor(config.num_workers) if config.num_workers else None
    waiting: deque[tuple[int, Job]] = deque()

    def take() -> tuple[int, Sample | None]:
        end, work = waiting.popleft()
        try:
            sample = work()
            if config.text:  # here, since a tokenizer must not run in several threads at once
                captions = [sample.class_name] if sample.captions is None else sample.captions
                check_captions([captions], lambda _: sample.name)
            return end, sample
        except ValueError as error:
            if config.on_broken == "refuse":
                raise
            LOGGER.warning("left out: %s", error)
            return end, None

    with threads or nullcontext():
        try:
            for end, job in jobs:
                waiting.append((end, threads.submit(job).result if threads else job))
                if len(waiting) >= max(1, AHEAD * config.num_workers):
                    yield take()
            while waiting:
                yield take()
        finally:
            if threads:
                threads.shutdown(wait=False, cancel_futures=True)
