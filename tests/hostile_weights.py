"""Hostile weights, configs, indices, pipelines, schedules and specs, from a seed.

Each builder yields as many as it is asked for, by name: the bytes of a file, or the files of a folder by their path in
it. A reader may refuse them with `ValueError` or `OSError`, or read what is harmless; it may do nothing else.
"""

import io
import itertools
import json
import pickle
import random
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tiny import TINY_FAMILIES, tiny_dit

from skipdit.checkpoints import to_official
from skipdit.diffusion import Objective, make_scheduler
from skipdit.models.surgery import add_long_skips
from skipdit.pipelines import ClassToImagePipeline
from skipdit.tasks.class_to_image import TASK as CLASS_TO_IMAGE
from skipdit.tasks.task import Sampler

Files = dict[str, bytes]
DEEP = "[" * 2000 + "]" * 2000
# what a JSON field may be instead, as it is written
ODD = [
    "null", "true", "-1", "0", "1", "3", "0.9", "1.0", "1e400", "NaN", "Infinity", "-Infinity", "1000000000", "3000",
    "32768", "9" * 400, '"2"', '"02"', '"\\u001b[2J"', '"../../x"', f'"{"k" * 5000}"', "[]", "[[]]", "[null]", '["a"]',
    "[1, 2]", "{}", '{"a": 1}', '{"a": 1, "a": 2}', DEEP, f"[{'1, ' * 3000}1]",
]  # fmt: skip
FAMILIES = tuple(TINY_FAMILIES)


# --- files ------------------------------------------------------------------------------------------------------------


@cache
def official() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {key: tensor.clone() for key, tensor in to_official(tiny_dit(num_layers=2)).items()}


def archive(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def repacked(content: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive whose records are changed and whose checksums are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for record in old.infolist():
            new.writestr(record.filename, change(record.filename, old.read(record)))
    return buffer.getvalue()


def padded_pickle(content: bytes, size: int) -> bytes:
    return repacked(
        content, lambda name, data: data + bytes(size) if name.endswith("data.pkl") else data, zipfile.ZIP_DEFLATED
    )


class Calls:
    """What unpickles to the result of a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def nested(depth: int) -> Any:
    content: Any = {}
    for _ in range(depth):
        content = {"model": content}
    return content


def widened(width: int) -> dict[str, torch.Tensor]:
    """A state dict of `width` instead of 32, one number large."""
    one = torch.zeros(())
    return {
        key: one.expand(*(width * side // 32 if side % 32 == 0 else side for side in tensor.shape))
        for key, tensor in official().items()
    }


def many_layers(number: int) -> dict[str, torch.Tensor]:
    return official() | {f"blocks.{layer}.attn.qkv.weight": torch.zeros(1) for layer in range(number)}


def archives(seed: int = 0, count: int = 500) -> Iterator[tuple[str, bytes]]:
    """Archives of torch.save: some by hand, then bit flips, cuts and other numbers in the pickle."""
    whole, generator = archive({"ema": official()}), random.Random(seed)
    makers: dict[str, Callable[[], bytes]] = {
        "stride 0": lambda: archive(widened(16384)),
        "many positions": lambda: archive(official() | {"pos_embed": torch.zeros(()).expand(1, 2**20, 32)}),
        "2^40 positions": lambda: archive(official() | {"pos_embed": torch.zeros(()).expand(1, 2**40, 32)}),
        "one storage, many keys": lambda: archive(dict.fromkeys(map(str, range(2000)), torch.zeros(2**16))),
        "deflated pickle": lambda: padded_pickle(whole, 2**26),
        "large pickle": lambda: repacked(whole, lambda name, data: data + bytes(2**24 * name.endswith(".pkl"))),
        "many records": lambda: archive({f"blocks.{n}.a": torch.zeros(1) for n in range(21_000)}),
        "many layers": lambda: archive(many_layers(3000)),
        "sparse": lambda: archive(official() | {"pos_embed": torch.eye(3).to_sparse()}),
        "sparse rows": lambda: archive({"model": {"x": torch.eye(3).to_sparse_csr()}}),
        "meta": lambda: archive({key: tensor.to("meta") for key, tensor in official().items()}),
        "nested tensor": lambda: archive({"x": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])}),
        "quantized": lambda: archive({"x": torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)}),
        "bytearray": lambda: archive({"model": Calls(bytearray, 2**33)}),
        "print": lambda: archive({"model": official(), "args": Calls(print, "code was run")}),
        "deep": lambda: archive(nested(400)),
        "escape in a key": lambda: archive(official() | {"\x1b[2J\x1b]0;owned\x07": torch.zeros(1)}),
        "long key": lambda: archive(official() | {"k" * 10**6: torch.zeros(1)}),
        "number as key": lambda: archive(official() | {5: torch.zeros(1)}),
        "legacy pickle": lambda: pickle.dumps({"model": 1}),
        "other zip": lambda: repacked(whole, lambda name, data: data).replace(b"data.pkl", b"atad.pkl"),
    }  # fmt: skip
    for name, make in itertools.islice(makers.items(), count):
        with warnings.catch_warnings(action="ignore"):  # sparse rows, nested and quantized tensors are not final
            yield name, make()
    for number in range(count - len(makers)):
        content = bytearray(whole)
        kind = number % 3
        if kind == 0:
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        elif kind == 1:
            del content[generator.randrange(len(content)) :]
        else:
            place, byte = generator.random(), generator.randrange(256)
            content = bytearray(repacked(whole, lambda name, data: _with_byte(name, data, place, byte)))  # noqa: B023
        yield f"{('flip', 'cut', 'pickle')[kind]} {number}", bytes(content)


def _with_byte(name: str, data: bytes, place: float, byte: int) -> bytes:
    if not name.endswith("data.pkl"):
        return data
    position = int(place * len(data))
    return data[:position] + bytes([byte]) + data[position + 1 :]


def safetensors(seed: int = 0, count: int = 500) -> Iterator[tuple[str, bytes]]:
    """Files of safetensors with other headers, cut or with other bits."""
    whole, generator = save(official()), random.Random(seed)
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def with_header(text: str) -> bytes:
        return struct.pack("<Q", len(text.encode())) + text.encode() + data

    special = {
        "empty": b"",
        "length of 2^63": struct.pack("<Q", 2**63) + whole[8:],
        "deep": with_header(f'{{"a": {DEEP}}}'),
        "a list": with_header("[]"),
        "escape in a key": save(official() | {"\x1b[2J": torch.zeros(1)}),
        "long key": save(official() | {"k" * 10**6: torch.zeros(1)}),
        "many layers": save(many_layers(3000)),
        "no width": save({key: tensor[..., :0].contiguous() for key, tensor in official().items()}),
    }
    yield from itertools.islice(special.items(), count)
    for number in range(count - len(special)):
        kind, content = number % 4, bytearray(whole)
        if kind == 0:
            content[generator.randrange(8 + length)] ^= 1 << generator.randrange(8)
        elif kind == 1:
            del content[generator.randrange(len(content)) :]
        else:
            changed = json.loads(json.dumps(header))
            key = generator.choice([key for key in changed if key != "__metadata__"])
            if kind == 2:
                changed[key][generator.choice(["dtype", "shape", "data_offsets"])] = "ODD"
            else:
                shape = changed[key]["shape"]
                shape[generator.randrange(len(shape))] = generator.choice([0, 1, 2**31, 2**62, -1])
            content = bytearray(with_header(json.dumps(changed).replace('"ODD"', generator.choice(ODD))))
        yield f"{('flip', 'cut', 'odd', 'shape')[kind]} {number}", bytes(content)


# --- folders ----------------------------------------------------------------------------------------------------------


def _files(folder: Path) -> Files:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@cache
def family_folder(name: str) -> Files:
    """What `save_pretrained` writes of a small model, with long skips where it is not ours and has none."""
    model = TINY_FAMILIES[name].build(num_units=2)
    if name in ("PixArtTransformer2DModel", "LatteTransformer3DModel"):
        add_long_skips(model)
    if name == "DiTTransformer2DModel":  # trained, all blocks have the same embedders
        model.transformer_blocks[1].norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return _files(Path(folder))


@cache
def pipeline_folder() -> Files:
    """A class-to-image pipeline with an autoencoder, names of classes and a calibrated schedule."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, **blocks)
    scheduler = make_scheduler(Objective(learned_variance=True), "ddim")
    labels = {str(number): f"class {number}" for number in range(10)}
    pipeline = ClassToImagePipeline(tiny_dit(num_layers=4), scheduler, vae, labels)
    with tempfile.TemporaryDirectory() as folder:
        Sampler(CLASS_TO_IMAGE, pipeline).save(Path(folder), "10GB")
        pipeline.vae.save_pretrained(Path(folder) / "vae")
        (Path(folder) / "schedules").mkdir()
        (Path(folder) / "schedules" / "1.8x.json").write_bytes(schedule_bytes())
        return _files(Path(folder))


def changed_json(content: bytes, generator: random.Random) -> bytes:
    """A JSON object with one odd field more or instead of another, or broken."""
    fields = json.loads(content)
    kind = generator.randrange(10)
    if kind == 0:
        return content[: generator.randrange(len(content))]
    if kind == 1:
        return generator.choice(ODD).encode()
    if kind == 2:
        flipped = bytearray(content)
        flipped[generator.randrange(len(flipped))] ^= 1 << generator.randrange(8)
        return bytes(flipped)
    key = generator.choice([*fields, "methd", "num_layers", "sample_size", "long_skip"])
    inner = fields.get(key)
    if isinstance(inner, dict) and inner and kind < 6:
        inner[generator.choice(list(inner))] = "ODD"
    elif isinstance(inner, list) and inner and kind < 6:
        inner[generator.randrange(len(inner))] = "ODD"
    elif kind == 9:
        fields.pop(key, None)
    else:
        fields[key] = "ODD"
    return json.dumps(fields).replace('"ODD"', generator.choice(ODD)).encode()


def configs(seed: int = 0, count: int = 500) -> Iterator[tuple[str, Files]]:
    """Folders of all families whose config.json is odd."""
    generator = random.Random(seed)
    for number in range(count):
        name = FAMILIES[number % len(FAMILIES)]
        files = family_folder(name)
        yield f"{name} {number}", files | {"config.json": changed_json(files["config.json"], generator)}


def indices(seed: int = 0, count: int = 500) -> Iterator[tuple[str, Files]]:
    """Folders of two shards whose index is odd."""
    generator, files = random.Random(seed), family_folder("DiT")
    stem = "diffusion_pytorch_model"
    shard = f"{stem}-00001-of-00001.safetensors"
    content = {name: data for name, data in files.items() if name == "config.json"}
    content[shard] = files[f"{stem}.safetensors"]
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": {"a": shard, "b": shard}}).encode()
    for number in range(count):
        yield f"index {number}", content | {f"{stem}.safetensors.index.json": changed_json(index, generator)}


def pipelines(seed: int = 0, count: int = 500) -> Iterator[tuple[str, Files]]:
    """Folders of pipelines one of whose JSON files is odd."""
    generator, files = random.Random(seed), pipeline_folder()
    names = [name for name in files if name.endswith(".json")]
    for number in range(count):
        name = names[number % len(names)]
        yield f"{name} {number}", files | {name: changed_json(files[name], generator)}


# --- schedules and specs ----------------------------------------------------------------------------------------------


def schedule_bytes() -> bytes:
    fields = {
        "method": "skip-taylor",
        "num_shallow_units": [1],
        "order": 2,
        "full_steps": [0, 2],
        "variants": [None, 0, None, 0],
        "num_inference_steps": 4,
        "timesteps": [999, 749, 499, 249],
    }
    return json.dumps(fields).encode()


def schedules(seed: int = 0, count: int = 10_000) -> Iterator[tuple[str, bytes]]:
    """Files of schedules: one of 60,000 steps, and odd ones."""
    generator, steps = random.Random(seed), 60_000
    long = {
        "full_steps": list(range(0, steps, 2)),
        "num_inference_steps": steps,
        "variants": [None if step % 2 == 0 else 0 for step in range(steps)],
    }
    yield "60,000 steps", json.dumps(long).encode()
    parts = json.dumps({"num_inference_steps": 4, "parts": [{"kinds": ["mlp"], "full_steps": [0]}]}).encode()
    for number in range(count - 1):
        yield f"schedule {number}", changed_json(parts if number % 4 == 0 else schedule_bytes(), generator)


def specs(seed: int = 0, count: int = 10_000) -> Iterator[tuple[str, str]]:
    """Specs of caches: of the form with odd numbers, and pieces in any order."""
    generator = random.Random(seed)
    names = ("", "skip:", "skip-taylor:", "delta:", "pab:", "tgate:", "fbcache:", "teacache:", "auto", "auto:", "x:")
    numbers = ("0", "1", "2", "50", "700", "1000", "9" * 400, "-1", "0.1", "1e5", "nan", "inf", "٣", "½", "", " 2")
    pieces = ("N", "-", "-k", "-o", ":", ".", "\x1b[2J", "\0", "\udcff", "k" * 5000, ".json", "/", *names, *numbers)

    def number() -> str:
        return generator.choice(numbers)

    for count_so_far in range(count):
        if count_so_far % 2:
            spec = "".join(generator.choice(pieces) for _ in range(generator.randrange(1, 8)))
        else:
            spec = f"{generator.choice(names)}N{number()}-{number()}-{number()}-k{number()}-o{number()}"
            spec = spec[: generator.randrange(1, len(spec) + 1)] if generator.random() < 0.3 else spec
        yield f"spec {count_so_far}", spec
