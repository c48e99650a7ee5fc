"""`skipdit latents`: pictures, clips and captions encoded once, for training on latents."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from skipdit.command_options import OutputOptions, parse
from skipdit.files.output import check_apart, output_folder


def latents(arguments: Sequence[str]) -> None:
    """Encode pictures, clips and captions once, for training on latents; goes on where it was stopped.

    Example: skipdit latents --source path/to/imagenet/train --vae sd-vae-ft-ema --flip --out latents/imagenet-256
    """
    from skipdit.encoding.config import EncodeConfig
    from skipdit.encoding.encode import encode

    @dataclass(frozen=True, kw_only=True)
    class Options(OutputOptions):
        """What is encoded and where it goes."""

        config: Annotated[EncodeConfig, tyro.conf.arg(name="")]
        out: Path = Path("latents")
        """folder of the shards"""
        device: str = "auto"
        """cpu, cuda, or auto: a GPU where there is one"""

    options = parse("latents", latents.__doc__, arguments, Options)
    check_apart(options.out, [path for path in map(Path, (options.config.source, options.config.vae)) if path.exists()])
    with output_folder(options.out, "latents", overwrite=options.overwrite) as out:
        info = encode(options.config, out, device=options.device)
    count = sum(shard["num_items"] for shard in info["shards"])
    shape, classes = " x ".join(map(str, info["shape"])), len(info["class_names"])
    print(f"encoded: {count:,} items of {shape} in {len(info['shards'])} shards, {classes} classes, in {options.out}")
