"""Writes docs/models.md, the table of families: `python benchmarks/list_models.py`."""

import re
import warnings
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models import transformers

from skipdit.files.output import write_text
from skipdit.models.costs import Costs
from skipdit.models.families import FAMILIES, OUT_OF_SCOPE, Family
from skipdit.models.forward_plan import Units
from skipdit.models.surgery import open_units

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
HEAD = """# Transformers of diffusers

Written by `python benchmarks/list_models.py` (diffusers {version}). Every row is built at tiny size in
`tests/test_families.py`: first and full steps are bit-equal to the plain model, reuse steps equal a reference made of
plain hooks, `compute_ratio` is within 2% of counted FLOPs, and long skips with `fusion="residual"` change no bit.

- *units*: their number at the class's default sizes, by segment. A cache spans all segments; long skips pair within
  each.
- *reusable*: the share of the matrix weights that `delta:N2` leaves out on a reuse step, when the first and the last
  unit run. It approximates the share of compute; `cache_summary` reports what a run really saved.
- *streams*: the tensors that a block passes on; + means that the model joins them for that segment.
- *pipelines*: the pipelines of diffusers whose source names the class. Our tests do not run all of them; they run
  `FluxPipeline`, `StableDiffusion3Pipeline`, `WanPipeline`, `PixArtSigmaPipeline`, `DiTPipeline`, `LattePipeline` and
  `HunyuanDiTPipeline`.

| class | units | reusable | streams | pipelines |
|---|---|---|---|---|
"""
TAIL = """
`add_long_skips` refuses `HunyuanDiT2DModel`, which has long skips of its own and is cached with them, and
`LongCatAudioDiTTransformer`, whose config has an entry `long_skip` with another meaning. FLOPs that torch cannot count
(flex attention) are estimated from the weights: {uncounted}. "-" means that the class cannot be built from its
defaults.

Transformers without a row, and why:

{reasons}

What does not work: passes that write keys and values for later calls (Flux2 klein-kv, QwenImage-2.1 and GLM-Image with
condition images, AnyFlow-FAR, the extract pass of WanAnimate2) must run without a cache. The decoder layers of
MotifVideo are not units.
"""


def facts(name: str, family: Family) -> tuple[str, str]:
    """Return the units by segment and the reusable share, at the class's default sizes."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: Any = getattr(transformers, name, None) or getattr(diffusers, name)
            model = model()
        open_units(model)
    except Exception:  # some classes have no defaults that build
        return "-", "-"
    links = model.long_skip_links
    sizes = " + ".join(str(stop - start) for start, stop in pairwise((0, *links.segment_starts, links.num_units)))
    if links.num_units < 3:
        return sizes, "-"
    left_out = Units(start=1, stop=links.num_units - 1)
    return sizes, f"{1 - Costs.by_weights(model).of_step((left_out,)):.0%}"


def pipelines_of(name: str) -> list[str]:
    names = set()
    for path in (Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py"):
        text = path.read_text(encoding="utf-8")
        if re.search(rf"\b{name}\b", text):
            names |= set(re.findall(r"^class (\w+Pipeline)\(", text, re.MULTILINE))
    return sorted(names)


def main() -> None:
    rows = []
    for name, family in sorted(FAMILIES.items()):
        units, share = facts(name, family)
        streams = "; ".join(("+" if part.joins else "") + ", ".join(part.streams) for part in family.segments)
        pipelines = pipelines_of(name)
        shown = ", ".join(pipelines[:3]) + (f" and {len(pipelines) - 3} more" if len(pipelines) > 3 else "")
        rows.append(f"| `{name}` | {units} | {share} | {streams} | {shown or '-'} |")
    reasons = "\n".join(f"- `{name}`: {reason}" for name, reason in OUT_OF_SCOPE.items())
    uncounted = ", ".join(f"`{name}`" for name, family in sorted(FAMILIES.items()) if not family.counted)
    page = HEAD.format(version=version("diffusers")) + "\n".join(rows) + "\n"
    write_text(PAGE, page + TAIL.format(uncounted=uncounted, reasons=reasons))


if __name__ == "__main__":
    main()
