"""Where the units are in the transformers of diffusers. Data only; `surgery.py` acts on it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from skipdit.models.long_skip import BranchKind


@dataclass(frozen=True, kw_only=True)
class Family:
    """What `surgery` must know of one class of transformers.

    block_lists: attributes of the model, each a `ModuleList`; the i-th block of each list, in this order, is unit i.
    streams: the token streams that a block takes by these argument names and puts out in this order. Long skips fuse
        `hidden_states`; a reuse step reuses all of them.
    hidden_size: config entries whose product is the hidden size.
    native_pairs: the blocks fuse skips of their own, which the model's forward hands them: all pairs but the two middle
        units (HunyuanDiT, arXiv 2405.08748).
    timestep_scale: what one unit of the `timestep` argument is on the scale from 0 to 1000; below 0 where the argument
        rises as noise falls: -1000 where it is 1 - t (Lumina).
    writes_in_place: whether blocks write their input, or a buffer of theirs, in place; by default that is found out as
        the model runs, and what is stored is copied until then, or always under `torch.compile`.
    branches: of each kind the attributes of a block, where it has them; the attention of a unit's second block is over
        time. Their outputs can be reused: a tensor, or a tuple of one a stream.
    """

    block_lists: tuple[str, ...] = ("transformer_blocks",)
    streams: tuple[str, ...] = ("hidden_states",)
    hidden_size: tuple[str, ...] = ("num_attention_heads", "attention_head_dim")
    native_pairs: bool = False
    timestep_scale: float = 1.0
    writes_in_place: bool | None = None
    branches: Mapping[BranchKind, tuple[str, ...]] = field(
        default_factory=lambda: {"attention": ("attn1",), "cross_attention": ("attn2",), "mlp": ("ff",)}
    )

    def __post_init__(self) -> None:
        if not self.block_lists:
            raise ValueError("block_lists must name at least one ModuleList of the model")
        if "hidden_states" not in self.streams:
            raise ValueError(f"streams must hold 'hidden_states', got {', '.join(self.streams) or 'none'}")


JOINT_BRANCHES: Mapping[BranchKind, tuple[str, ...]] = {"attention": ("attn", "attn2"), "mlp": ("ff", "ff_context")}
WAN_BRANCHES: Mapping[BranchKind, tuple[str, ...]] = {
    "attention": ("attn1",),
    "cross_attention": ("attn2",),
    "mlp": ("ffn",),
}

# class name: its units. SD3 and Flux carry text and image tokens side by side; of Flux the double-stream blocks are
# the units, the single-stream blocks behind them always run.
FAMILIES: dict[str, Family] = {
    "DiTTransformer2DModel": Family(),
    "LatteTransformer3DModel": Family(block_lists=("transformer_blocks", "temporal_transformer_blocks")),
    "PixArtTransformer2DModel": Family(),
    "SD3Transformer2DModel": Family(streams=("encoder_hidden_states", "hidden_states"), branches=JOINT_BRANCHES),
    "FluxTransformer2DModel": Family(
        streams=("encoder_hidden_states", "hidden_states"), timestep_scale=1000.0, branches=JOINT_BRANCHES
    ),
    "WanTransformer3DModel": Family(block_lists=("blocks",), branches=WAN_BRANCHES),
    "HunyuanDiT2DModel": Family(block_lists=("blocks",), native_pairs=True),
}
FAMILIES |= {name: replace(family, writes_in_place=False) for name, family in FAMILIES.items()}


def declare_family(model_class: type[nn.Module], family: Family) -> None:
    """Makes a class that skipdit does not list, and its subclasses, known to `add_long_skips` and `enable_cache`.

    Its forward must take `hidden_states` and `timestep`, run the units in order, and return a tuple, or an output whose
    first entry is the sample, at `return_dict=False`.
    """
    FAMILIES[model_class.__name__] = family


def find_family(model_class: type[nn.Module]) -> Family | None:
    """The family of a class, or of the nearest class that it is made from; `None` where there is none."""
    return next((FAMILIES[base.__name__] for base in model_class.__mro__ if base.__name__ in FAMILIES), None)


def get_family(model_class: type[nn.Module]) -> Family:
    """As `find_family`; `ValueError` where there is none."""
    family = find_family(model_class)
    if family is None:
        raise ValueError(
            f"{model_class.__name__} is no family that skipdit knows ({', '.join(FAMILIES)}): "
            "declare its units with skipdit.declare_family(model_class, skipdit.Family(...))"
        )
    return family
