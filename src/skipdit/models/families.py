"""The units of diffusers' transformers, one row per class. Data only; `surgery` uses it."""

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field, replace
from typing import Any

from torch import nn

from skipdit.interfaces import Fields
from skipdit.models.long_skip import BranchKind
from skipdit.models.routing import ByToken, TokenRoute

Named = Mapping[BranchKind, tuple[str, ...]]


BRANCHES: Named = {
    "attention": ("attn", "attn1", "self_attn", "attention", "self_attention", "audio_attn1"),
    "cross_attention": (
        *("attn2", "cross_attn", "cross_attention", "audio_attn2"),
        *("audio_to_video_attn", "video_to_audio_attn"),
    ),
    "mlp": (
        *("ff", "ff_context", "ffn", "feed_forward", "mlp", "proj_mlp"),
        *("img_mlp", "txt_mlp", "txt_ff", "audio_ff", "mlp_moe_gen"),
    ),
}
"""Names of branches in diffusers' blocks."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Blocks that run one after another. Long skips pair units within a segment; a cache spans all segments."""

    lists: tuple[str, ...] = ("transformer_blocks",)
    """Attributes of the model, each a `ModuleList`. The i-th blocks of all lists, in this order, are one unit."""
    streams: tuple[str, ...] = ("hidden_states",)
    """Token streams: a block's argument names for them, in the order in which it returns them."""
    fused: str | None = None
    """The stream into which long skips are fused; by default the only one, or else `hidden_states`."""
    joins: tuple[str, ...] = ()
    """For a segment with one stream that follows one with several: the streams that the model concatenates along their
    tokens, in this order."""
    branches: Named = field(default_factory=lambda: BRANCHES)
    """Attributes of a block by kind of branch, with dots for nested ones; those that a block lacks are ignored. The
    attention of a unit's second block counts as temporal. The outputs, tensors or tuples, can be reused."""
    by_token: Mapping[str, ByToken] | None = None
    """Arguments of a block, other than its streams, that have an entry per token of the fused stream, as needed to
    route tokens; `None` if they are unknown, or if routing would be wrong."""

    def __post_init__(self) -> None:
        _check_names(lists=self.lists, streams=self.streams, joins=self.joins, **self.branches)
        if not self.lists:
            raise ValueError("lists must name at least one ModuleList of the model")
        if not self.streams:
            raise ValueError("streams must name at least one argument of a block")
        if self.fused_stream not in self.streams:
            raise ValueError(f"fused must be one of the streams {', '.join(self.streams)}, got {self.fused_stream!r}")

    @property
    def fused_stream(self) -> str:
        return self.fused or (self.streams[0] if len(self.streams) == 1 else "hidden_states")


def _check_names(**names: tuple[str, ...]) -> None:
    """Raise `ValueError` on a string in place of a tuple: each of its letters would be taken for a name."""
    for role, value in names.items():
        if isinstance(value, str):
            raise ValueError(f"{role} must be a tuple of names such as ({value!r},), got {value!r}")


ONE_SEGMENT = (Segment(),)


@dataclass(frozen=True, kw_only=True)
class Family:
    """The facts that skipdit needs about one class of transformers.

    A family of one segment has a short form: `block_lists`, `streams` and `branches` in place of `segments`. Raises
    `ValueError` if both are set.
    """

    segments: tuple[Segment, ...] = ONE_SEGMENT
    """Segments in the order in which they run; units are numbered through all of them."""
    block_lists: InitVar[tuple[str, ...] | None] = None
    """Short form: the `lists` of the only segment."""
    streams: InitVar[tuple[str, ...] | None] = None
    """Short form: the `streams` of the only segment."""
    branches: InitVar[Named | None] = None
    """Short form: the `branches` of the only segment."""
    hidden_size: tuple[str, ...] = ("num_attention_heads", "attention_head_dim")
    """Entries of the config whose product is the hidden size."""
    native_pairs: bool = False
    """True if the model itself passes skips to its blocks, which fuse them, for all pairs except the two middle units
    (HunyuanDiT, arXiv 2405.08748)."""
    latents: str = "hidden_states"
    """The argument of the model that holds the noisy latents."""
    timestep: str = "timestep"
    """The argument of the model that holds the timestep."""
    timestep_scale: float = 1.0
    """Factor from that argument to the scale from 0 to 1000; negative if the argument is 1 minus the noise level, which
    increases during sampling (Lumina)."""
    counted: bool = True
    """False if torch cannot count its FLOPs (flex attention); costs are then estimated from the weights."""
    timestep_by_token: bool = False
    """True if a flat timestep lists levels of tokens, not of samples (MiniMax-H3): the noisiest one counts."""
    writes_in_place: bool | None = None
    """True if blocks write to their input or to a buffer in place. `None`: skipdit finds out while the model runs, and
    until then, or always under `torch.compile`, copies stored values."""
    changing: tuple[str, ...] = ()
    """Arguments that change at every step but are not conditioning: a second timestep, a control signal, audio
    latents."""

    def __post_init__(
        self, block_lists: tuple[str, ...] | None, streams: tuple[str, ...] | None, branches: Named | None
    ) -> None:
        _check_names(hidden_size=self.hidden_size, changing=self.changing)
        short = {"block_lists": block_lists, "streams": streams, "branches": branches}
        fields: Fields = {name: value for name, value in short.items() if value is not None}
        if fields and self.segments is not ONE_SEGMENT:
            raise ValueError(
                "pass either segments or block_lists, streams and branches, the short form of one segment: "
                f"got segments and {', '.join(fields)}"
            )
        if fields:
            options = {name.removeprefix("block_"): value for name, value in fields.items()}
            object.__setattr__(self, "segments", (Segment(**options),))
        if not self.segments:
            raise ValueError("segments must have at least one Segment")
        for before, segment in zip(self.segments, self.segments[1:], strict=False):
            if segment.joins and (len(segment.streams) != 1 or not set(segment.joins) <= set(before.streams)):
                raise ValueError(
                    f"joins must be streams of the segment before ({', '.join(before.streams)}) that become one "
                    f"stream, got {', '.join(segment.joins)} for {', '.join(segment.streams)}"
                )

    def check_route(self, name: str, segment_starts: tuple[int, ...], route: TokenRoute) -> None:
        """Raise `ValueError` if the tokens of a model of this class, `name`, cannot be routed past these units."""
        if any(segment.by_token is None for segment in self.segments):
            raise ValueError(
                f"the tokens of {name} cannot be routed: its blocks need all of them, or skipdit cannot know which of "
                "their arguments have an entry per token (Segment.by_token)"
            )
        for segment, start in zip(self.segments[1:], segment_starts, strict=True):
            if segment.joins and route.start >= start:
                raise ValueError(
                    f"tokens of {name} must leave before unit {start}, where text joins them, got unit {route.start}"
                )

    @property
    def shares_tokens(self) -> bool:
        """Return true if the samples of a batch share per-token inputs, such as positions, so that they must keep the
        same tokens."""
        inputs = [by_token for segment in self.segments for by_token in (segment.by_token or {}).values()]
        return any(by_token.dim == 0 and not by_token.of_rows for by_token in inputs)


TEXT_FIRST = ("encoder_hidden_states", "hidden_states")
IMAGE_FIRST = ("hidden_states", "encoder_hidden_states")
CONTROL = "controlnet_block_samples", "controlnet_single_block_samples"
RISES = -1000.0  # the argument is 1 - t / 1000


def _units(*lists: str, **options: Any) -> tuple[Segment, ...]:
    return (Segment(lists=lists, **options),)


def _two(first: str, second: str, streams: tuple[str, ...], *, joined: bool = False) -> tuple[Segment, ...]:
    """Return a segment of double-stream blocks and one of single-stream blocks. joined: the model concatenates the
    streams for the latter."""
    single = Segment(lists=(second,), joins=streams) if joined else Segment(lists=(second,), streams=streams)
    return Segment(lists=(first,), streams=streams), single


BLOCKS = "transformer_blocks", "single_transformer_blocks"
PLAIN, TEXT_STREAM, IMAGE_STREAM = (
    _units("transformer_blocks", streams=streams) for streams in (("hidden_states",), TEXT_FIRST, IMAGE_FIRST)
)
FLUX, FLUX_JOINED, HUNYUAN = (
    _two(*BLOCKS, TEXT_FIRST),
    _two(*BLOCKS, TEXT_FIRST, joined=True),
    _two(*BLOCKS, IMAGE_FIRST),
)
WAN, LAYERS, LAYERS_OF_X = _units("blocks"), _units("layers"), _units("layers", streams=("x",))

FAMILIES: dict[str, Family] = {
    # pictures
    "AuraFlowTransformer2DModel": Family(
        segments=_two("joint_transformer_blocks", "single_transformer_blocks", TEXT_FIRST, joined=True),
        timestep_scale=1000.0,
    ),
    "BriaFibo2Transformer2DModel": Family(segments=LAYERS_OF_X, hidden_size=("dim",), timestep_scale=1000.0),
    "BriaFiboTransformer2DModel": Family(segments=FLUX_JOINED),
    "BriaTransformer2DModel": Family(segments=FLUX, changing=CONTROL),
    "ChromaTransformer2DModel": Family(segments=FLUX_JOINED, timestep_scale=1000.0, changing=CONTROL),
    "CogView3PlusTransformer2DModel": Family(segments=IMAGE_STREAM),
    "CogView4Transformer2DModel": Family(segments=IMAGE_STREAM),
    "DiTTransformer2DModel": Family(),
    "ErnieImageTransformer2DModel": Family(segments=LAYERS_OF_X, hidden_size=("hidden_size",)),
    "Flux2Transformer2DModel": Family(segments=FLUX_JOINED, timestep_scale=1000.0),
    "Flux3Transformer2DModel": Family(
        segments=_units("single_transformer_blocks", streams=TEXT_FIRST),
        timestep_scale=1000.0,
        changing=("target_timestep",),
    ),
    "FluxTransformer2DModel": Family(segments=FLUX, timestep_scale=1000.0, changing=CONTROL),
    "GlmImageTransformer2DModel": Family(segments=IMAGE_STREAM),
    "HiDreamImageTransformer2DModel": Family(
        segments=tuple(
            replace(segment, branches={"attention": ("block.attn1",), "mlp": ("block.ff_i", "block.ff_t")})
            for segment in _two("double_stream_blocks", "single_stream_blocks", IMAGE_FIRST, joined=True)
        ),
        timestep="timesteps",
    ),
    "HunyuanDiT2DModel": Family(segments=WAN, native_pairs=True, changing=CONTROL[:1]),
    "HunyuanImageTransformer2DModel": Family(segments=HUNYUAN, changing=("timestep_r",)),
    "Ideogram4Transformer2DModel": Family(segments=LAYERS, timestep_scale=RISES),
    "JoyImageEditPlusTransformer3DModel": Family(
        segments=_units("double_blocks", streams=IMAGE_FIRST), hidden_size=("hidden_size",)
    ),
    "JoyImageEditTransformer3DModel": Family(
        segments=_units("double_blocks", streams=IMAGE_FIRST), hidden_size=("hidden_size",)
    ),
    "Krea2Transformer2DModel": Family(timestep_scale=1000.0),
    "LongCatImageTransformer2DModel": Family(segments=FLUX, timestep_scale=1000.0),
    "Lumina2Transformer2DModel": Family(segments=LAYERS, hidden_size=("hidden_size",), timestep_scale=RISES),
    "LuminaNextDiT2DModel": Family(segments=LAYERS, hidden_size=("hidden_size",), timestep_scale=RISES),
    "NucleusMoEImageTransformer2DModel": Family(timestep_scale=1000.0),
    "OmniGenTransformer2DModel": Family(segments=LAYERS, hidden_size=("hidden_size",), timestep_scale=RISES),
    "OvisImageTransformer2DModel": Family(segments=FLUX, timestep_scale=1000.0),
    "PRXTransformer2DModel": Family(segments=WAN, hidden_size=("hidden_size",), timestep_scale=1000.0),
    "PixArtTransformer2DModel": Family(),
    "PriorTransformer": Family(),
    "QwenImage21Transformer2DModel": Family(timestep_scale=1000.0),
    "QwenImageTransformer2DModel": Family(
        segments=TEXT_STREAM, timestep_scale=1000.0, changing=("controlnet_block_samples",)
    ),
    "SD3Transformer2DModel": Family(
        segments=_units(
            "transformer_blocks",
            streams=TEXT_FIRST,
            branches={"attention": ("attn", "attn2"), "mlp": ("ff", "ff_context")},
        ),
        changing=("block_controlnet_hidden_states",),
    ),
    "SanaTransformer2DModel": Family(changing=("controlnet_block_samples",)),
    "ZImageTransformer2DModel": Family(
        segments=LAYERS_OF_X,
        hidden_size=("dim",),
        latents="x",
        timestep="t",
        timestep_scale=RISES,
        changing=("controlnet_block_samples",),
    ),
    # video
    "AllegroTransformer3DModel": Family(),
    "AnyFlowFARTransformer3DModel": Family(segments=WAN, counted=False, changing=("r_timestep",)),
    "AnyFlowTransformer3DModel": Family(segments=WAN, changing=("r_timestep",)),
    "ChronoEditTransformer3DModel": Family(segments=WAN),
    "CogVideoXTransformer3DModel": Family(segments=IMAGE_STREAM),
    "ConsisIDTransformer3DModel": Family(segments=IMAGE_STREAM),
    "Cosmos3OmniTransformer": Family(
        segments=_units("layers", streams=("und_seq", "gen_seq"), fused="gen_seq"),
        hidden_size=("hidden_size",),
        latents="vision_tokens",
        timestep="vision_timesteps",
        changing=("sound_tokens", "sound_timesteps", "action_tokens", "action_timesteps"),
    ),
    "CosmosTransformer3DModel": Family(timestep_scale=1000.0, changing=("block_controlnet_hidden_states",)),
    "EasyAnimateTransformer3DModel": Family(segments=IMAGE_STREAM),
    "HeliosTransformer3DModel": Family(segments=WAN),
    "HunyuanVideo15Transformer3DModel": Family(segments=IMAGE_STREAM, changing=("timestep_r",)),
    "HunyuanVideoFramepackTransformer3DModel": Family(segments=HUNYUAN),
    "HunyuanVideoTransformer3DModel": Family(segments=HUNYUAN),
    "Kandinsky5Transformer3DModel": Family(
        segments=_units("visual_transformer_blocks", streams=("visual_embed",)), hidden_size=("model_dim",)
    ),
    "Kandinsky6SRTransformer3DModel": Family(
        segments=_units("visual_transformer_blocks"), hidden_size=("model_dim",), counted=False
    ),
    "Kandinsky6Transformer3DModel": Family(
        segments=_units(
            "visual_transformer_blocks",
            streams=("vis", "aud"),
            fused="vis",
            branches={
                "attention": ("video_dec_block.self_attention", "audio_dec_block.self_attention"),
                "cross_attention": (
                    *("video_dec_block.cross_attention", "audio_dec_block.cross_attention"),
                    *("va_cross_attention", "av_cross_attention"),
                ),
                "mlp": ("video_dec_block.feed_forward", "audio_dec_block.feed_forward"),
            },
        ),
        hidden_size=("model_dim",),
        changing=("audio_hidden_states",),
    ),
    "LTX2VideoTransformer3DModel": Family(
        segments=_units("transformer_blocks", streams=("hidden_states", "audio_hidden_states")),
        changing=("audio_hidden_states", "audio_timestep", "sigma", "audio_sigma"),
    ),
    "LTXVideoTransformer3DModel": Family(),
    "LatteTransformer3DModel": Family(segments=_units("transformer_blocks", "temporal_transformer_blocks")),
    "MiniMaxH3Transformer3DModel": Family(
        hidden_size=("hidden_size",),
        timestep_scale=RISES,
        timestep_by_token=True,
        changing=("audio_hidden_states", "timestep_indices"),
    ),
    "MochiTransformer3DModel": Family(segments=IMAGE_STREAM, timestep_scale=-1.0),
    "MotifVideoTransformer3DModel": Family(segments=HUNYUAN),
    "SanaVideoTransformer3DModel": Family(changing=("controlnet_block_samples",)),
    "SanaWMLTX2RefinerTransformer3DModel": Family(),
    "SanaWMTransformer3DModel": Family(segments=_units("blocks", streams=("x",)), hidden_size=("hidden_size",)),
    "SkyReelsV2Transformer3DModel": Family(segments=WAN),
    "WanAnimate2Transformer3DModel": Family(segments=WAN, hidden_size=("dim",)),
    "WanAnimateTransformer3DModel": Family(segments=WAN),
    "WanTransformer3DModel": Family(segments=WAN),
    "WanVACETransformer3DModel": Family(segments=WAN),
    # sound and others
    "AceStepTransformer1DModel": Family(
        segments=LAYERS, hidden_size=("hidden_size",), timestep_scale=1000.0, changing=("timestep_r",)
    ),
    "LongCatAudioDiTTransformer": Family(segments=WAN, hidden_size=("dit_dim",), timestep_scale=RISES),
    "MiniMaxMusic3Transformer1DModel": Family(timestep_scale=RISES),
    "StableAudio3DiTModel": Family(hidden_size=("embed_dim",), timestep_scale=1000.0),
    "StableAudioDiTModel": Family(timestep_scale=1000.0),
}
FAMILIES |= {name: replace(family, writes_in_place=False) for name, family in FAMILIES.items()}

ROTARY, ROTARY_WITH_TEXT = {"image_rotary_emb": ByToken()}, {"image_rotary_emb": ByToken(text="before")}
ROTARY_WAN = {"rotary_emb": ByToken(dim=1), "temb": ByToken(dim=1, ndim=4)}
MASK_WITH_TEXT = {"attention_mask": ByToken(dim=-1, text="after")}

# classes whose tokens can be routed, with the per-token inputs of their blocks: for all segments, or one per segment
BY_TOKEN: dict[str, Mapping[str, ByToken] | tuple[Mapping[str, ByToken], ...]] = {
    "AllegroTransformer3DModel": {"image_rotary_emb": ByToken(dim=1, index=1)},
    "AuraFlowTransformer2DModel": {},
    "BriaFiboTransformer2DModel": ROTARY_WITH_TEXT,
    "BriaTransformer2DModel": ROTARY_WITH_TEXT,
    "ChromaTransformer2DModel": ROTARY_WITH_TEXT | {"attention_mask": ByToken(dim=1, text="before")},
    "ChronoEditTransformer3DModel": ROTARY_WAN,
    "CogVideoXTransformer3DModel": ROTARY,
    "CogView3PlusTransformer2DModel": {},
    "CogView4Transformer2DModel": ROTARY,
    "CosmosTransformer3DModel": ROTARY | {"extra_pos_emb": ByToken(dim=1)},
    "DiTTransformer2DModel": {},
    "EasyAnimateTransformer3DModel": ROTARY,
    "Flux2Transformer2DModel": ROTARY_WITH_TEXT,
    "FluxTransformer2DModel": ROTARY_WITH_TEXT,
    "HunyuanDiT2DModel": ROTARY,
    "HunyuanImageTransformer2DModel": ROTARY | MASK_WITH_TEXT,
    "HunyuanVideo15Transformer3DModel": {"freqs_cis": ByToken()},
    "HunyuanVideoTransformer3DModel": ({"freqs_cis": ByToken()} | MASK_WITH_TEXT, ROTARY | MASK_WITH_TEXT),
    "LTXVideoTransformer3DModel": {"image_rotary_emb": ByToken(dim=1), "temb": ByToken(dim=1)},
    "LatteTransformer3DModel": {"timestep": ByToken(of_rows=True)},
    "LongCatImageTransformer2DModel": ROTARY_WITH_TEXT,
    "LuminaNextDiT2DModel": {"attention_mask": ByToken(dim=1), "image_rotary_emb": ByToken(dim=1)},
    "MochiTransformer3DModel": ROTARY,
    "MotifVideoTransformer3DModel": ROTARY | MASK_WITH_TEXT,
    "OvisImageTransformer2DModel": ROTARY_WITH_TEXT,
    "PRXTransformer2DModel": {"image_rotary_emb": ByToken(dim=2)},
    "PixArtTransformer2DModel": {},
    "QwenImageTransformer2DModel": {"image_rotary_emb": ByToken(index=0), "modulate_index": ByToken(dim=1)},
    "SD3Transformer2DModel": {},
    "SkyReelsV2Transformer3DModel": ROTARY_WAN,
    "WanTransformer3DModel": ROTARY_WAN,
}


def _with_tokens(family: Family, by_token: Mapping[str, ByToken] | tuple[Mapping[str, ByToken], ...]) -> Family:
    match by_token:
        case tuple():
            inputs = by_token
        case _:
            inputs = (by_token,) * len(family.segments)
    segments = zip(family.segments, inputs, strict=True)
    return replace(family, segments=tuple(replace(segment, by_token=names) for segment, names in segments))


FAMILIES |= {name: _with_tokens(FAMILIES[name], by_token) for name, by_token in BY_TOKEN.items()}


def declare_family(model_class: type[nn.Module], family: Family) -> None:
    """Declare the units of a class, and of its subclasses, so that `add_long_skips` and `enable_cache` accept it.

    Its forward must run the units in order. `skipdit.check_family(model, example_inputs)` checks that the family fits.
    """
    FAMILIES[model_class.__name__] = family


def find_family(model_class: type[nn.Module]) -> Family | None:
    """Return the family of a class, or of its nearest base class that has one; `None` if there is none."""
    return next((FAMILIES[base.__name__] for base in model_class.__mro__ if base.__name__ in FAMILIES), None)


def get_family(model_class: type[nn.Module]) -> Family:
    """Return the family of a class as `find_family` does, but raise `ValueError` if there is none."""
    family = find_family(model_class)
    if family is None:
        raise ValueError(
            f"skipdit does not know the units of {model_class.__name__}: declare them with "
            "skipdit.declare_family(model_class, skipdit.Family(...))"
        )
    return family
