"""Initial weights: of diffusers' models, as their authors set them, and of video models, whose spatial blocks start
from a trained image model.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers import HunyuanDiT2DModel, LatteTransformer3DModel
from torch import nn

from skipdit.interfaces import Config
from skipdit.models.dit import DiT, DiTBlock, PatchTransformer, sincos, sincos_position_embedding
from skipdit.models.latte import Latte
from skipdit.models.long_skip import LongSkip
from skipdit.models.modules import modules_of


def init_linears(model: nn.Module) -> None:
    """Initialize linear layers with Xavier weights and zero biases."""
    for layer in modules_of(model, nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def init_hunyuan(model: HunyuanDiT2DModel) -> None:
    """Initialize as HunyuanDiT does (arXiv 2405.08748, released code): modulation and output at zero."""
    init_linears(model)
    for block in model.blocks:
        for layer in (block.get_submodule("norm1.linear"), block.get_submodule("attn2.to_out.0")):
            nn.init.zeros_(layer.get_parameter("weight"))
            nn.init.zeros_(layer.get_parameter("bias"))
    nn.init.normal_(model.text_embedding_padding, std=0.02)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)


def init_latte_t2v(model: LatteTransformer3DModel) -> None:
    """Initialize as PixArt does (arXiv 2310.00426, released code); temporal blocks start as the identity."""
    init_linears(model)
    for spatial, temporal in zip(model.transformer_blocks, model.temporal_transformer_blocks, strict=True):
        nn.init.zeros_(spatial.get_parameter("attn2.to_out.0.weight"))
        for name in ("attn1.to_out.0.weight", "ff.net.2.weight"):
            nn.init.zeros_(temporal.get_parameter(name))
    nn.init.normal_(model.adaln_single.linear.weight, std=0.02)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)


def resize_grid(model: PatchTransformer, **sizes: int) -> None:
    """Change a model's `sample_size` or `num_frames`, on which only its fixed position tables depend.

    Raises `ValueError` if `sample_size` is not a multiple of the patch size.
    """
    config, table = model.config, model.get_buffer("position_embedding")
    side, remainder = divmod(sizes["sample_size"], config.patch_size)
    if remainder:
        raise ValueError(f"sample_size must be divisible by patch_size {config.patch_size}, got {sizes['sample_size']}")
    model.register_to_config(**sizes)
    model.position_embedding = sincos_position_embedding(table.shape[1], side, side).to(table)
    if "num_frames" in sizes:
        frames = torch.arange(sizes["num_frames"], dtype=torch.float64)
        model.register_buffer("frame_embedding", sincos(table.shape[1], frames).to(table), persistent=False)


def outermost_blocks(picture: DiT, num_units: int) -> list[DiTBlock]:
    """Return `num_units` blocks from both ends of the image model, so that each keeps its long skip. A middle block,
    which has none, comes from the first half. Raises `ValueError` if the model has fewer blocks."""
    blocks = picture.dit_blocks
    if len(blocks) < num_units:
        raise ValueError(f"the image model has {len(blocks)} blocks, but the video model needs {num_units}")
    first = (num_units + 1) // 2
    return blocks[:first] + blocks[len(blocks) - num_units + first :]


def _refuse_other_sizes(picture: DiT, sizes: Mapping[str, float]) -> None:
    for name, size in sizes.items():
        if picture.config[name] != size:
            raise ValueError(f"{name} must be {picture.config[name]} as in the image model, got {size}")


def _match_blocks(entries: Sequence[nn.Module], picture: DiT) -> list[tuple[nn.Module, DiTBlock]]:
    """Return pairs of a unit's spatial block and the image model's block for it. Raises `ValueError` if their long
    skips are not of the same kind."""
    pairs = list(zip(entries, outermost_blocks(picture, len(entries)), strict=True))
    for unit, (entry, block) in enumerate(pairs):
        target, source = (_kind_of_skip(getattr(module, "long_skip", None)) for module in (entry, block))
        if target != source:
            raise ValueError(f"unit {unit} has {target}, but its block in the image model has {source}")
    return pairs


def _kind_of_skip(long_skip: LongSkip | None) -> str:
    if long_skip is None:
        return "no long skip"
    return f"a long skip ({'residual' if long_skip.residual else 'replace'}, {type(long_skip.norm).__name__})"


@torch.no_grad()
def inflate_latte(video: Latte, picture: DiT, rows: Mapping[int, int]) -> None:
    """Copy an image model of the same width into the spatial blocks of a class-to-video model.

    rows: the image model's class number for each class of the video model that the image model knows; the null class
    is copied in any case. The video model's fresh temporal blocks are the identity, so frames are independent at first.
    A single image is predicted exactly as by the image model; frames of a clip differ by the fixed embedding of their
    time.
    """
    names = ("num_attention_heads", "attention_head_dim", "mlp_ratio", "patch_size", "in_channels", "out_channels")
    options = (*names, "downscale_freq_shift", "qk_norm")
    _refuse_other_sizes(picture, {name: video.config[name] for name in options})
    pairs = _match_blocks(video.unit_entries(), picture)
    for name in ("patch_embed", "timestep_embedder", "final_layer"):
        video.get_submodule(name).load_state_dict(picture.get_submodule(name).state_dict())
    for entry, block in pairs:
        entry.load_state_dict(block.state_dict())
    embedder = video.class_embedder
    assert embedder is not None, "an unconditional model knows no classes"
    for video_row, picture_row in {video.null_class_label: picture.null_class_label, **rows}.items():
        embedder.weight[video_row] = picture.class_embedder.weight[picture_row]


@torch.no_grad()
def inflate_text_latte(video: LatteTransformer3DModel, picture: DiT) -> None:
    """Copy an image model of the same width into the spatial blocks of a text-to-video model with long skips.

    In the video model, a block's modulation is the sum of a function of the timestep, shared by all blocks, and a table
    per block. The function starts as the mean over the image model's blocks, the table as the block's mean difference
    from it over timesteps (the re-parametrization of PixArt, arXiv 2310.00426, section 2.3, there at one timestep). The
    class embedding is that of the null class. So the result is close to the image model, not equal to it.
    """
    config: Config = video.config
    dim = picture.config.num_attention_heads * picture.config.attention_head_dim
    names = ("num_attention_heads", "attention_head_dim", "patch_size", "in_channels")
    constants = {"out_channels": config.in_channels, "mlp_ratio": 4.0, "downscale_freq_shift": 0.0, "qk_norm": False}
    _refuse_other_sizes(picture, {name: config[name] for name in names} | constants)
    pairs = _match_blocks(list(video.transformer_blocks), picture)
    embedder = video.adaln_single.emb.timestep_embedder
    embedder.load_state_dict(picture.timestep_embedder.state_dict())
    embedder.linear_2.get_parameter("bias").add_(picture.class_embedder.weight[picture.null_class_label])
    video.pos_embed.proj.load_state_dict(picture.patch_embed.proj.state_dict())

    embedded = embedder(picture.timestep_frequencies(torch.arange(0.0, 1000.0, 20.0)))
    modulations = [block.modulation for _, block in pairs]
    shared = video.adaln_single.linear
    shared.weight.copy_(torch.stack([modulation.weight for modulation in modulations]).mean(0))
    shared.bias.copy_(torch.stack([modulation.bias for modulation in modulations]).mean(0))
    for target, block in pairs:
        _copy_block(target, block)
        table = (block.modulation(F.silu(embedded)) - shared(F.silu(embedded))).mean(0)
        target.get_parameter("scale_shift_table").copy_(table.view(6, dim))
    last = picture.final_layer
    video.scale_shift_table.copy_((last.modulation(F.silu(embedded)).view(-1, 2, dim) - embedded[:, None]).mean(0))
    # the second half of the output channels, an untrained variance, stays zero
    patch = config.patch_size**2
    for parameter in ("weight", "bias"):
        target = video.proj_out.get_parameter(parameter).view(patch, 2 * config.in_channels, -1)
        target.zero_()[:, : config.in_channels] = last.proj.get_parameter(parameter).view(patch, config.in_channels, -1)


def _copy_block(target: nn.Module, block: DiTBlock) -> None:
    qkv = zip(block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True)
    for name, (weight, bias) in zip(("to_q", "to_k", "to_v"), qkv, strict=True):
        target.get_submodule(f"attn1.{name}").load_state_dict({"weight": weight, "bias": bias})
    pairs: dict[str, nn.Module] = {
        "attn1.to_out.0": block.attn.proj,
        "ff.net.0.proj": block.mlp.fc1,
        "ff.net.2": block.mlp.fc2,
    }
    if block.long_skip is not None:
        pairs["long_skip"] = block.long_skip
    for name, module in pairs.items():
        target.get_submodule(name).load_state_dict(module.state_dict())
