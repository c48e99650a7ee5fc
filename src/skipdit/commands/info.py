"""`skipdit info`: facts about the package, or about a model."""

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import tyro

from skipdit.command_options import WeightsOptions, parse


@dataclass(frozen=True, kw_only=True)
class InfoOptions(WeightsOptions):
    """What to show."""

    model: tyro.conf.Positional[str | None] = None
    """a bundled model, the folder of a pipeline, or a checkpoint; None shows what comes with skipdit"""


def info(arguments: Sequence[str]) -> None:
    """Show versions, bundled models, presets and cache methods; with a model, its sizes and long skips.

    Example: skipdit info DiT-XL-2-skip.pt
    """
    options = parse("info", info.__doc__, arguments, InfoOptions)
    if options.model is None:
        _print_package()
    else:
        _print_model(options.model, options)


def _print_package() -> None:
    from skipdit.cache.methods import METHODS, SPEC_FORM
    from skipdit.environment import versions
    from skipdit.loading import BUNDLED
    from skipdit.models.dit import PRESETS
    from skipdit.models.families import FAMILIES
    from skipdit.models.latte import LATTE_PRESETS

    print("versions: " + ", ".join(f"{name} {number}" for name, number in versions().items()))
    print("\nbundled models, for `skipdit sample --model NAME`:")
    _print_columns((name, model.task) for name, model in BUNDLED.items())
    print("\nsizes, for `DiT.from_preset` and `Latte.from_preset`:")
    _print_wrapped((*PRESETS, *LATTE_PRESETS))
    print(f"\ntransformers of diffusers ({len(FAMILIES)}), for `skipdit.enable_cache`; all but HunyuanDiT2DModel and")
    print("LongCatAudioDiTTransformer also for `skipdit.add_long_skips`:")
    _print_wrapped(sorted(FAMILIES, key=str.lower))
    print(f"\ncaches, for `--cache`: {SPEC_FORM}")
    _print_columns((f"{name}:{method.form}", method.source) for name, method in METHODS.items())


def _print_wrapped(names: Iterable[str]) -> None:
    lines = textwrap.wrap(", ".join(names), shutil.get_terminal_size().columns - 2, break_on_hyphens=False)
    print(textwrap.indent("\n".join(lines), "  "))


def _print_columns(rows: Iterable[tuple[str, str]]) -> None:
    """Print pairs side by side, or one below the other if the first is long."""
    for name, text in rows:
        width = max(shutil.get_terminal_size().columns - 24, 40)
        first, *more = textwrap.wrap(text, width)
        print(f"  {name:<20}  {first}" if len(name) <= 20 else f"  {name}\n{'':24}{first}")
        print("".join(f"{'':24}{line}\n" for line in more), end="")


def _print_model(path: str, options: InfoOptions) -> None:
    from skipdit.loading import load_source
    from skipdit.models.surgery import open_units

    model = load_source(path, weights=options, decodes=False)
    transformer = model.sampler.pipeline.transformer
    open_units(transformer)
    config, links = transformer.config, transformer.long_skip_links
    width = config.num_attention_heads * config.attention_head_dim
    num_parameters = sum(parameter.numel() for parameter in transformer.parameters())
    print(f"{type(transformer).__name__} ({model.sampler.task.name}): {links.num_units} units of ", end="")
    print(
        f"width {width}, {config.num_attention_heads} heads, patch {config.patch_size}, {num_parameters:,} parameters"
    )
    frames = [config[name] for name in ("num_frames", "video_length") if name in config]
    sizes = (*frames, config.in_channels, config.sample_size, config.sample_size)
    classes = f", {config.num_classes} classes" if config.get("num_classes") else ""
    print(f"input: {' x '.join(map(str, sizes))}{classes}")
    pairs = ", ".join(f"{source} -> {target}" for target, source in links.sources.items())
    fusion = config["long_skip"]["fusion"] if config.get("long_skip") else "its own"
    print(f"long skips: {pairs or 'none'}" + (f" ({fusion})" if pairs else ""))
    if (shallow := config.get("shallow_path")) is not None:
        print(f"shallow guidance: with the first {shallow['num_shallow_units']} and as many last units")
