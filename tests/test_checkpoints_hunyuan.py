"""Checkpoints of HunyuanDiT: Tencent's keys and counts, the order of what is fused, what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import HunyuanDiT2DModel
from einops import rearrange
from safetensors.torch import load_file, save_file
from tiny import assert_same_weights
from torch import Tensor

import skipdit
from skipdit.checkpoints import from_official, load_model, save_official, to_diffusers, to_official
from skipdit.checkpoints.hunyuan import HUNYUAN_KEYS
from skipdit.cli import main

DEPTH = 6


def tiny_hunyuan(**options: Any) -> HunyuanDiT2DModel:
    sizes: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 128,
        "hidden_size": 32,
        "num_layers": DEPTH,
        "mlp_ratio": 3.7,
        "cross_attention_dim": 24,
        "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 12,
        "text_len": 5,
        "text_len_t5": 7,
        "use_style_cond_and_image_meta_size": False,
    }
    model = HunyuanDiT2DModel(**sizes | options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


@torch.no_grad()
def run(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, texts, texts_t5 = (torch.randn(size, generator=generator) for size in ((2, 4, 8, 8), (2, 5, 24), (2, 7, 16)))
    masks = {"text_embedding_mask": torch.ones(2, 5), "text_embedding_mask_t5": torch.ones(2, 7)}
    old = {"image_meta_size": torch.ones(2, 6), "style": torch.zeros(2, dtype=torch.long)}
    extra = old if model.config.use_style_cond_and_image_meta_size else {}
    t = torch.tensor([700.0, 700.0])
    return model(
        x, t, encoder_hidden_states=texts, encoder_hidden_states_t5=texts_t5, return_dict=False, **masks, **extra
    )[0]


# --- keys -------------------------------------------------------------------------------------------------------------


def test_table_is_invertible() -> None:
    theirs, ours = zip(*HUNYUAN_KEYS, strict=True)
    assert len(set(theirs)) == len(set(ours)) == len(HUNYUAN_KEYS)


def test_official_keys_of_g_2_of_version_1_2() -> None:
    with torch.device("meta"):
        state_dict = to_official(
            HunyuanDiT2DModel(
                in_channels=4,
                patch_size=2,
                hidden_size=1408,
                num_layers=40,
                mlp_ratio=4.3637,
                use_style_cond_and_image_meta_size=False,
            )
        )
    block = ["attn1.Wqkv", "attn1.q_norm", "attn1.k_norm", "attn1.out_proj", "attn2.q_proj", "attn2.kv_proj"]
    block += ["attn2.q_norm", "attn2.k_norm", "attn2.out_proj", "norm1", "norm2", "norm3", "mlp.fc1", "mlp.fc2"]
    block += ["default_modulation.1"]
    stems = [f"blocks.{layer}.{name}" for layer in range(40) for name in block]
    stems += [f"blocks.{layer}.{name}" for layer in range(21, 40) for name in ("skip_norm", "skip_linear")]
    stems += ["mlp_t5.0", "mlp_t5.2", "x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    stems += ["extra_embedder.0", "extra_embedder.2", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    stems += [f"pooler.{part}_proj" for part in "qkvc"]
    keys = {f"{stem}.{parameter}" for stem in stems for parameter in ("weight", "bias")}
    assert set(state_dict) == keys | {"text_embedding_padding", "pooler.positional_embedding"}
    assert len(state_dict) == 1304
    assert sum(tensor.numel() for tensor in state_dict.values()) == 1_499_952_032
    assert state_dict["blocks.0.attn1.Wqkv.weight"].shape == (4224, 1408)
    assert state_dict["blocks.0.attn2.kv_proj.weight"].shape == (2816, 1024)
    assert state_dict["blocks.39.skip_linear.weight"].shape == (1408, 2816)
    skips = [tensor for key, tensor in state_dict.items() if ".skip_" in key]
    assert sum(tensor.numel() for tensor in skips) == 75_467_392


@pytest.mark.parametrize("layer", [0, DEPTH - 1])
def test_official_block_computes_what_tencents_does(layer: int) -> None:
    """Tencent's HunYuanDiTBlock written out: norm3 goes before the cross-attention, norm2 before the MLP."""
    model = tiny_hunyuan()
    official = to_official(model)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, official[f"blocks.{layer}.{name}.weight"], official[f"blocks.{layer}.{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        weight, bias = official[f"blocks.{layer}.{name}.weight"], official[f"blocks.{layer}.{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, eps=1e-6)

    def attend(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(norm(f"{name}.q_norm", q), norm(f"{name}.k_norm", k), v)
        return linear(f"{name}.out_proj", rearrange(attended, "b h n d -> b n (h d)"))

    x, skip, conditioning, texts = (
        torch.randn(2, 5, 32),
        torch.randn(2, 5, 32),
        torch.randn(2, 32),
        torch.randn(2, 3, 24),
    )
    hidden = linear("skip_linear", norm("skip_norm", torch.cat([x, skip], -1))) if layer > DEPTH // 2 else x
    shifted = norm("norm1", hidden) + linear("default_modulation.1", F.silu(conditioning)).unsqueeze(1)
    hidden = hidden + attend("attn1", *linear("attn1.Wqkv", shifted).chunk(3, -1))
    q, (k, v) = linear("attn2.q_proj", norm("norm3", hidden)), linear("attn2.kv_proj", texts).chunk(2, -1)
    hidden = hidden + attend("attn2", q, k, v)
    mlp = linear("mlp.fc2", F.gelu(linear("mlp.fc1", norm("norm2", hidden)), approximate="tanh"))
    with torch.no_grad():
        output = model.blocks[layer](x, texts, conditioning, skip=skip if layer > DEPTH // 2 else None)
    torch.testing.assert_close(output, hidden + mlp, rtol=1e-4, atol=1e-4)


def test_official_final_layer_has_the_shift_first() -> None:
    model = tiny_hunyuan()
    official = to_official(model)
    weight, bias = (official[f"final_layer.adaLN_modulation.1.{name}"] for name in ("weight", "bias"))
    x, conditioning = torch.randn(2, 5, 32), torch.randn(2, 32)
    shift, scale = F.linear(F.silu(conditioning), weight, bias).unsqueeze(1).chunk(2, dim=-1)
    expected = F.layer_norm(x, (32,), eps=1e-6) * (1 + scale) + shift
    with torch.no_grad():
        torch.testing.assert_close(model.norm_out(x, conditioning), expected, rtol=1e-5, atol=1e-5)


# --- files and folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_style", [False, True])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_round_trip_is_bit_equal(has_style: bool, learn_sigma: bool, tmp_path: Path) -> None:
    model = tiny_hunyuan(use_style_cond_and_image_meta_size=has_style, learn_sigma=learn_sigma)
    official = to_official(model)
    assert ("style_embedder.weight" in official) == has_style
    torch.testing.assert_close(from_official(official), dict(model.state_dict()), rtol=0, atol=0)
    path = tmp_path / "pytorch_model_ema.pt"
    torch.save(official, path)
    loaded = load_model(path)
    assert type(loaded) is HunyuanDiT2DModel
    assert not loaded.training
    assert_same_weights(model, loaded)
    options = {name: value for name, value in model.config.items() if name not in ("mlp_ratio", "_use_default_values")}
    assert {name: loaded.config[name] for name in options} == options
    assert torch.equal(run(loaded), run(model))
    save_official(loaded, tmp_path / "back.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "back.safetensors"), official, rtol=0, atol=0)


def test_folder_and_cache(tmp_path: Path) -> None:
    model = tiny_hunyuan()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, num_attention_heads=2)
    assert_same_weights(model, loaded)
    skipdit.enable_cache(loaded, "N2")
    torch.testing.assert_close(to_official(loaded), to_official(model), rtol=0, atol=0)
    assert torch.equal(run(loaded), run(model))
    assert to_diffusers(loaded) is loaded


def test_training_checkpoint(tmp_path: Path) -> None:
    model, ema = tiny_hunyuan(), tiny_hunyuan()
    torch.save({"model": to_official(model), "ema": to_official(ema)}, tmp_path / "model.pt")
    assert_same_weights(ema, load_model(tmp_path / "model.pt"))
    loaded = load_model(tmp_path / "model.pt", prefer="model", dtype=torch.bfloat16)
    assert_same_weights(model.to(torch.bfloat16), loaded)


def test_convert_there_and_back(tmp_path: Path) -> None:
    model = tiny_hunyuan()
    save_official(model, tmp_path / "theirs.safetensors")
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    main(["convert", str(tmp_path / "theirs.safetensors"), "--to", "diffusers", "--out", str(folder)])
    assert_same_weights(model, HunyuanDiT2DModel.from_pretrained(folder))
    main(["convert", str(folder), "--to", "official", "--out", str(back)])
    assert back.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_attention_heads": 4}, "num_attention_heads is 2 in this checkpoint, got 4"),
        ({"num_frames": 16}, "num_frames is not an option of a HunyuanDiT2DModel, got 16"),
        ({"fusion": "replace"}, "fusion is None in this checkpoint"),
    ],
)
def test_contradicting_arguments_are_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_official(tiny_hunyuan(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "model.safetensors", **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.norm3.bias"), r"1 missing key\(s\): blocks.1.norm3.bias$"),
        (lambda s: s.pop("pooler.c_proj.weight"), r"1 missing key\(s\): pooler.c_proj.weight$"),
        (lambda s: s.pop("blocks.5.skip_norm.weight"), r"1 missing key\(s\): blocks.5.skip_norm.weight$"),
        (
            lambda s: s.update({"blocks.3.skip_norm.bias": torch.zeros(64)}),
            r"1 unknown key\(s\): blocks.3.skip_norm.bias$",
        ),
        (
            lambda s: s.update({"blocks.1.attn1.Wqkv.bias": torch.zeros(95)}),
            r"1 misshapen key\(s\): blocks.1.attn1.Wqkv.bias \(95,\) instead of \(96,\)",
        ),
        (
            lambda s: s.update({"blocks.0.attn1.q_norm.weight": torch.zeros(5)}),
            r"q_norm.weight \(5,\) must divide the hidden size 32",
        ),
        (
            lambda s: s.update({"style_embedder.weight": torch.zeros(1, 32)}),
            r"1 misshapen key\(s\): extra_embedder.0.weight",
        ),
        (lambda s: s.update({"mlp_t5.0.bias": torch.zeros(64, dtype=torch.int8)}), r"mlp_t5.0.bias torch.int8"),
    ],
)
def test_wrong_keys_and_shapes_are_named(
    change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    official = to_official(tiny_hunyuan())
    change(official)
    path = tmp_path / "model.safetensors"
    save_file(official, path)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_fused_tensors_that_cannot_be_divided_are_named() -> None:
    official = to_official(tiny_hunyuan()) | {"blocks.1.attn1.Wqkv.bias": torch.zeros(95)}
    with pytest.raises(ValueError, match=r"blocks.1.attn1.to_qkv.bias \(95,\) cannot be divided"):
        from_official(official)


def test_official_format_has_one_activation() -> None:
    with pytest.raises(
        ValueError, match="the official format needs activation_fn to be 'gelu-approximate', got 'gelu'"
    ):
        to_official(tiny_hunyuan(activation_fn="gelu"))
