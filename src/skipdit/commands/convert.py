"""`skipdit convert`: a checkpoint with other keys."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from skipdit.command_options import WeightsOptions, parse
from skipdit.files.output import atomic_folder, check_apart, check_replaceable, read_marker
from skipdit.files.untrusted import printable_path
from skipdit.options import Fusion


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(WeightsOptions):
    """The checkpoint to convert, and the format to convert it to."""

    model: tyro.conf.Positional[Path]
    """a .pt or .safetensors file, or a folder"""
    to: Literal["official", "skipdit", "diffusers"]
    """official (one .safetensors), skipdit or diffusers (a folder; the two are the same for a class of diffusers)"""
    out: Path
    """file or folder to write"""
    prefer: Literal["ema", "model"] = "ema"
    """weights to take from a training checkpoint: the averaged ones (ema) or the last ones (model)"""
    sample_size: int | None = None
    """side of the latents, if the file of bare weights does not show it"""
    num_frames: int | None = None
    """frames per clip, if the file of bare weights does not show it"""
    fusion: Fusion | None = None
    """fusion of the long skips, which a file of bare weights does not show"""
    variant: str | None = None
    """variant of a folder's weights, such as fp16"""
    overwrite: bool = False
    """replace a file, or the config and the weights in a folder, even if skipdit did not write them"""


def convert(arguments: Sequence[str]) -> None:
    """Convert a checkpoint between the official keys, a folder of skipdit and a folder of diffusers.

    With --objective a whole pipeline is written, which only --to skipdit can do.

    Example: skipdit convert DiT-XL-2-skip.pt --to skipdit --out DiT-XL-2-skip
    """
    options = parse("convert", convert.__doc__, arguments, ConvertOptions)
    if options.objective is not None and options.to != "skipdit":
        raise ValueError(f"--objective needs --to skipdit, which writes a pipeline, got --to {options.to}")
    names = ("config.json", "model_index.json", "*/config.json", "*.safetensors", "*.safetensors.index.json")
    overwritten = (*names, "*/*.safetensors", "*/*.json") if options.overwrite else ()
    check_apart(options.out, (options.model, *options.model.glob("*"), *options.model.glob("*/*")))
    if options.to != "official":
        check_replaceable(options.out, "model", overwritten)
        if options.objective is None:
            _check_not_hidden(options.out)
    elif os.path.lexists(options.out) and not options.overwrite:
        raise FileExistsError(f"{options.out} exists: give another --out, or --overwrite")
    from skipdit.checkpoints import load_model, save_official, to_diffusers

    model = load_model(
        options.model,
        prefer=options.prefer,
        num_attention_heads=options.num_attention_heads,
        sample_size=options.sample_size,
        num_frames=options.num_frames,
        num_classes=options.num_classes,
        fusion=options.fusion,
        drop=options.drop,
        variant=options.variant,
    )
    if options.to == "official":
        save_official(model, options.out)
    else:
        converted = model if options.to == "skipdit" else to_diffusers(model)
        with atomic_folder(options.out, "model", overwritten=overwritten) as draft:
            if options.objective is None:
                converted.save_pretrained(draft)
            else:
                from skipdit.loading import pipeline_of

                pipeline_of(model, options.objective).save(draft, "10GB")
    print(f"written: {options.out}")


def _check_not_hidden(out: Path) -> None:
    """Raise `FileExistsError` if a folder has a pipeline of others, which stays and would be opened instead of the new
    model."""
    ours = {name for names in read_marker(out)["files"].values() for name in names}
    for name in ("model_index.json", "pipeline/model_index.json"):
        if (out / name).exists() and name not in ours:
            raise FileExistsError(
                f"{printable_path(out)} has a pipeline ({name}), which would be opened instead: give another --out"
            )
