"""`skipdit latents`: encode pictures, clips and captions once, for training on latents."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from skipdit.command_options import OutputOptions, config_of, parse
from skipdit.encoding.config import EncodeConfig
from skipdit.files.output import check_apart, output_folder


@dataclass(frozen=True, kw_only=True)
class LatentsOptions(EncodeConfig, OutputOptions):
    """What to encode, and where the latents go."""

    out: Path = Path("latents")
    """folder of the shards"""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one"""


def latents(arguments: Sequence[str]) -> None:
    """Encode pictures, clips and captions once, for training on latents; continues where it was stopped.

    Example: skipdit latents --source path/to/imagenet/train --vae sd-vae-ft-ema --flip --out latents/imagenet-256
    """
    options = parse("latents", latents.__doc__, arguments, LatentsOptions)
    from skipdit.encoding.encode import encode

    config = config_of(options, EncodeConfig)
    check_apart(options.out, [path for path in map(Path, (config.source, config.vae)) if path.exists()])
    with output_folder(options.out, "latents", overwrite=options.overwrite) as out:
        info = encode(config, out, device=options.device)
    count = sum(shard["num_items"] for shard in info["shards"])
    shape, classes = " x ".join(map(str, info["shape"])), len(info["class_names"])
    print(f"encoded: {count:,} items of {shape} in {len(info['shards'])} shards, {classes} classes, in {options.out}")
