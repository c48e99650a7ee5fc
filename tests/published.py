"""Folders and files as they are published, at tiny size: the same names, wrappings, shards and configs."""

import io
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import sentencepiece
import torch
import transformers
from torch import nn

WORDS = ("a", "cat", "with", "rocket", "the", "cats", "wear", "boxing", "gloves", "on", "stage", "moon")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SHARD = "80KB"  # so that tiny weights come in several files, as large ones do
DOWN, UP = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
VAE: dict[str, Any] = {"block_out_channels": (4,) * 4, "norm_num_groups": 2, "sample_size": 64}
VAE |= {"down_block_types": DOWN, "up_block_types": UP}  # eight times smaller per side, as those that are published
FLOW_SHIFT = {"base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15, "shift": 3.0}


def randomize(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers and text encoders


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2), encoding="utf-8")


def clip_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt, as CLIP's."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    write(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    write(folder / "merges.txt", "#version: 0.2\nc a\nca t</w>\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    write(folder / "special_tokens_map.json", special | {"unk_token": "<|endoftext|>"})
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    write(folder / "tokenizer_config.json", config | special | {"unk_token": "<|endoftext|>"})


@cache
def sentence_pieces() -> bytes:
    """A SentencePiece model, as T5's: pad 0, eos 1, unk 2."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 20), model_writer=out, vocab_size=32, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return out.getvalue()


def t5_tokenizer(folder: Path, *, fast: bool) -> None:
    """spiece.model; fast: with a tokenizer.json beside it, as newer releases have."""
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(sentence_pieces())
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write(folder / "special_tokens_map.json", special)
    kind = "T5Tokenizer"
    write(
        folder / "tokenizer_config.json",
        special | {"tokenizer_class": kind, "model_max_length": 512, "extra_ids": 0, "additional_special_tokens": []},
    )
    if fast:
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def bert_tokenizer(folder: Path) -> None:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *LETTERS[1:]]
    write(folder / "vocab.txt", "\n".join(tokens) + "\n")
    write(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "model_max_length": 77})


def t5_encoder(width: int, kind: str = "T5EncoderModel") -> Any:
    config: Any = transformers.UMT5Config if kind.startswith("UMT5") else transformers.T5Config
    sizes = {"d_model": width, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
    return getattr(transformers, kind)(config(**sizes, feed_forward_proj="gated-gelu"))


# ----------------------------------------------------------------------------------------------------------------------
# Folders of pipelines


def save(folder: Path, name: str, parts: Mapping[str, Any], dtype: torch.dtype, **more: Any) -> Path:
    """Write `model_index.json` and the parts that are models, in shards. parts: a model or scheduler, or the library
    and the class of what is there already."""
    index: dict[str, Any] = {"_class_name": name, "_diffusers_version": "0.30.0.dev0"} | more
    for part, value in parts.items():
        if isinstance(value, list | tuple):
            index[part] = list(value)
            continue
        library = "transformers" if isinstance(value, transformers.PreTrainedModel) else "diffusers"
        index[part] = [library, type(value).__name__]
        if isinstance(value, nn.Module):
            shards = {"max_shard_size": SHARD} if part != "vae" else {}
            randomize(value).to(dtype).save_pretrained(folder / part, **shards)
        else:
            value.save_pretrained(folder / part)
    write(folder / "model_index.json", index)
    write(folder / "README.md", "---\nlicense: other\n---\n")
    return folder


def flux_dev(folder: Path) -> Path:
    """FLUX.1-dev: bfloat16, a sharded T5 encoder and transformer, an autoencoder of 16 channels without quant_conv."""
    clip_tokenizer(folder / "tokenizer")
    t5_tokenizer(folder / "tokenizer_2", fast=True)
    clip = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=56,
        bos_token_id=54, eos_token_id=55, projection_dim=16,
    )  # fmt: skip
    transformer = diffusers.FluxTransformer2DModel(
        num_layers=3, num_single_layers=4, num_attention_heads=2, attention_head_dim=8, in_channels=64,
        joint_attention_dim=12, pooled_projection_dim=16, axes_dims_rope=(4, 2, 2), guidance_embeds=True,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        **VAE, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    parts = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **FLOW_SHIFT),
        "text_encoder": transformers.CLIPTextModel(clip),
        "text_encoder_2": t5_encoder(12),
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": transformer,
        "vae": vae,
    }
    (folder / "flux1-dev.safetensors").write_bytes(b"the same weights under other names; diffusers leaves them alone")
    return save(folder, "FluxPipeline", parts, torch.bfloat16)


def wan_t2v(folder: Path) -> Path:
    """Wan2.1-T2V: UMT5, a sharded transformer, a video autoencoder of 16 channels, UniPC for a flow."""
    t5_tokenizer(folder / "tokenizer", fast=True)
    transformer = diffusers.WanTransformer3DModel(
        num_layers=6, num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=12,
        freq_dim=16, ffn_dim=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero"
    )
    parts = {
        "scheduler": scheduler,
        "text_encoder": t5_encoder(12, "UMT5EncoderModel"),
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": transformer,
        "vae": vae,
    }
    return save(folder, "WanPipeline", parts, torch.float32)


def hunyuan_transformer() -> Any:
    """Of HunyuanDiT v1.2: without a style and without sizes of pictures as conditions."""
    return diffusers.HunyuanDiT2DModel(
        num_layers=6, num_attention_heads=2, attention_head_dim=16, hidden_size=32, in_channels=4, patch_size=2,
        sample_size=128, cross_attention_dim=16, cross_attention_dim_t5=24, pooled_projection_dim=16, text_len=77,
        text_len_t5=256, use_style_cond_and_image_meta_size=False,
    )  # fmt: skip


def hunyuan_dit(folder: Path) -> Path:
    """HunyuanDiT-v1.2-Diffusers: BERT and T5 with a spiece.model alone, no safety checker."""
    bert_tokenizer(folder / "tokenizer")
    t5_tokenizer(folder / "tokenizer_2", fast=False)
    bert = transformers.BertConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    parts = {
        "scheduler": diffusers.DDPMScheduler(
            beta_end=0.018, beta_schedule="scaled_linear", prediction_type="v_prediction"
        ),
        "text_encoder": transformers.BertModel(bert),
        "text_encoder_2": t5_encoder(24),
        "tokenizer": ["transformers", "BertTokenizer"],
        "tokenizer_2": ["transformers", "T5Tokenizer"],
        "transformer": hunyuan_transformer(),
        "vae": diffusers.AutoencoderKL(**VAE, latent_channels=4, scaling_factor=0.13025),
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    return save(folder, "HunyuanDiTPipeline", parts, torch.float32, requires_safety_checker=False)


def latte_transformer(num_layers: int = 6) -> Any:
    return diffusers.LatteTransformer3DModel(
        num_layers=num_layers, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24, in_channels=4,
        out_channels=8, patch_size=2, sample_size=8, caption_channels=24, video_length=16, attention_bias=True,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip


def latte_1(folder: Path) -> Path:
    """Latte-1: a T5 with a spiece.model alone, DDIM, float32, a second autoencoder beside that nothing names."""
    t5_tokenizer(folder / "tokenizer", fast=False)
    parts = {
        "scheduler": diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False),
        "text_encoder": t5_encoder(24),
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": latte_transformer(),
        "vae": diffusers.AutoencoderKL(**VAE, latent_channels=4),
    }
    write(folder / "vae_temporal_decoder" / "config.json", {"_class_name": "AutoencoderKLTemporalDecoder"})
    return save(folder, "LattePipeline", parts, torch.float32)


def dit_xl_2(folder: Path) -> Path:
    """DiT-XL-2-256 of diffusers: class names in the index, pickled weights, and the class name that transformers of all
    kinds had then."""
    transformer = diffusers.DiTTransformer2DModel(
        num_layers=6, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    parts = {
        "scheduler": diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False),
        "transformer": transformer,
        "vae": vae_of_dit(),
    }
    id2label = {str(number): f"class {number}, the {number}th" for number in range(1000)}
    save(folder, "DiTPipeline", parts, torch.float32, id2label=id2label)
    for part in ("transformer", "vae"):
        for path in (folder / part).glob("*.safetensors*"):
            path.unlink()
        torch.save(dict(parts[part].state_dict()), folder / part / "diffusion_pytorch_model.bin")
    path = folder / "transformer" / "config.json"
    write(path, json.loads(path.read_text()) | {"_class_name": "Transformer2DModel"})
    index = json.loads((folder / "model_index.json").read_text())
    write(folder / "model_index.json", index | {"transformer": ["diffusers", "Transformer2DModel"]})
    return folder


def vae_of_dit() -> Any:
    return diffusers.AutoencoderKL(**VAE, latent_channels=4, scaling_factor=0.18215)


def sd_vae(folder: Path) -> Path:
    """sd-vae-ft-ema: the autoencoder alone in a folder, pickled and as safetensors."""
    vae: Any = randomize(vae_of_dit())
    vae.save_pretrained(folder)
    torch.save(dict(vae.state_dict()), folder / "diffusion_pytorch_model.bin")
    return folder


PIPELINES: dict[str, Callable[[Path], Path]] = {
    "FLUX.1-dev": flux_dev,
    "Wan2.1-T2V-1.3B-Diffusers": wan_t2v,
    "HunyuanDiT-v1.2-Diffusers": hunyuan_dit,
    "Latte-1": latte_1,
    "DiT-XL-2-256": dit_xl_2,
}
