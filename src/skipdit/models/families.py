"""Where the units are in the transformers of diffusers. Data only; `surgery.py` acts on it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from skipdit.models.long_skip import BranchKind

Named = Mapping[BranchKind, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Blocks that run one after another; long skips pair within a segment, a cache spans all of them."""

    lists: tuple[str, ...] = ("transformer_blocks",)
    """Attributes of the model, each a `ModuleList`. The i-th blocks of all lists, in this order, are one unit."""
    streams: tuple[str, ...] = ("hidden_states",)
    """Token streams: the names under which a block takes them, in the order in which it returns them."""
    fused: str | None = None
    """The stream that long skips fuse; by default `hidden_states`, or the only one."""
    joins: tuple[str, ...] = ()
    """Where a segment has one stream and the one before had several: which of those the model concatenates along their
    tokens, in this order."""
    branches: Named = field(
        default_factory=lambda: {"attention": ("attn1",), "cross_attention": ("attn2",), "mlp": ("ff",)}
    )
    """By kind the attributes of a block, where it has them; the attention of a unit's second block is over time. What
    they output can be reused: a tensor, or a tuple."""

    def __post_init__(self) -> None:
        if not self.lists:
            raise ValueError("lists must name at least one ModuleList of the model")
        if not self.streams:
            raise ValueError("streams must name at least one argument of a block")
        if self.fused_stream not in self.streams:
            raise ValueError(f"fused must be one of the streams {', '.join(self.streams)}, got {self.fused_stream!r}")

    @property
    def fused_stream(self) -> str:
        return self.fused or (self.streams[0] if len(self.streams) == 1 else "hidden_states")


@dataclass(frozen=True, kw_only=True)
class Family:
    """What skipdit must know of one class of transformers."""

    segments: tuple[Segment, ...] = (Segment(),)
    """In the order in which they run; units number through all of them."""
    hidden_size: tuple[str, ...] = ("num_attention_heads", "attention_head_dim")
    """Entries of the config whose product is the hidden size."""
    native_pairs: bool = False
    """Whether blocks fuse skips of their own, which the model hands them: all pairs but the two middle units
    (HunyuanDiT, arXiv 2405.08748)."""
    latents: str = "hidden_states"
    """The argument of the model that holds the noisy latents."""
    timestep: str = "timestep"
    """The argument of the model that holds the timestep."""
    timestep_scale: float = 1.0
    """What one unit of that argument is on the scale from 0 to 1000; below 0 where it is 1 minus the noise level and
    rises (Lumina)."""
    writes_in_place: bool | None = None
    """Whether blocks write their input, or a buffer of theirs, in place. By default that is found out as a model runs,
    and what is stored is copied until then, or always under `torch.compile`."""
    changing: tuple[str, ...] = ()
    """Arguments that are new at every step and no condition: a second timestep, a control signal, audio latents."""

    def __post_init__(self) -> None:
        if not self.segments:
            raise ValueError("segments must have at least one Segment")
        for before, segment in zip(self.segments, self.segments[1:], strict=False):
            if segment.joins and (len(segment.streams) != 1 or not set(segment.joins) <= set(before.streams)):
                raise ValueError(
                    f"joins must be streams of the segment before, {', '.join(before.streams)}, for one stream, "
                    f"got {', '.join(segment.joins)} for {', '.join(segment.streams)}"
                )


JOINT: Named = {"attention": ("attn", "attn2"), "mlp": ("ff", "ff_context")}
SINGLE: Named = {"attention": ("attn",), "mlp": ("proj_mlp",)}
WAN: Named = {"attention": ("attn1",), "cross_attention": ("attn2",), "mlp": ("ffn",)}
TEXT_FIRST = ("encoder_hidden_states", "hidden_states")

FAMILIES: dict[str, Family] = {
    "DiTTransformer2DModel": Family(),
    "LatteTransformer3DModel": Family(segments=(Segment(lists=("transformer_blocks", "temporal_transformer_blocks")),)),
    "PixArtTransformer2DModel": Family(),
    "SD3Transformer2DModel": Family(segments=(Segment(streams=TEXT_FIRST, branches=JOINT),)),
    "FluxTransformer2DModel": Family(
        segments=(
            Segment(streams=TEXT_FIRST, branches=JOINT),
            Segment(lists=("single_transformer_blocks",), streams=TEXT_FIRST, branches=SINGLE),
        ),
        timestep_scale=1000.0,
    ),
    "WanTransformer3DModel": Family(segments=(Segment(lists=("blocks",), branches=WAN),)),
    "HunyuanDiT2DModel": Family(segments=(Segment(lists=("blocks",)),), native_pairs=True),
}
FAMILIES |= {name: replace(family, writes_in_place=False) for name, family in FAMILIES.items()}


def declare_family(model_class: type[nn.Module], family: Family) -> None:
    """Make a class that skipdit does not list, and its subclasses, known to `add_long_skips` and `enable_cache`.

    Its forward must run the units in order. `skipdit.check_family(model, example_inputs)` tells whether it fits.
    """
    FAMILIES[model_class.__name__] = family


def find_family(model_class: type[nn.Module]) -> Family | None:
    """Return the family of a class, or of the nearest class that it is made from; `None` where there is none."""
    return next((FAMILIES[base.__name__] for base in model_class.__mro__ if base.__name__ in FAMILIES), None)


def get_family(model_class: type[nn.Module]) -> Family:
    """As `find_family`; `ValueError` where there is none."""
    family = find_family(model_class)
    if family is None:
        raise ValueError(
            f"{model_class.__name__} is no family that skipdit knows: declare its units with "
            "skipdit.declare_family(model_class, skipdit.Family(...))"
        )
    return family
