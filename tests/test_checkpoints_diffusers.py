"""diffusers' DiT as ours, and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from test_checkpoints import SIZES, distance, randomize, tiny_dit
from tiny import assert_same_weights

from skipdit.checkpoints import (
    from_diffusers,
    load_model,
    to_diffusers,
)
from skipdit.models.long_skip import LongSkipConfig


def tiny_diffusers_dit(**options: Any) -> DiTTransformer2DModel:
    """A random one in which every block has block 0's embedders, as a trained one has."""
    renamed = {"num_embeds_ada_norm": SIZES["num_classes"], "out_channels": 8}
    sizes = {name: value for name, value in SIZES.items() if name != "num_classes"}
    model = randomize(DiTTransformer2DModel(**sizes | renamed | options))
    shared = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(shared)
    return model


@pytest.mark.parametrize("downscale_freq_shift", [0.0, 1.0])
def test_to_diffusers_and_back(downscale_freq_shift: float) -> None:
    model = tiny_dit(downscale_freq_shift=downscale_freq_shift)
    converted = to_diffusers(model)
    assert distance(model, converted) < 1e-5
    back = from_diffusers(converted)
    assert back.config.downscale_freq_shift == downscale_freq_shift
    assert_same_weights(model, back)
    assert distance(model, back) == 0


@pytest.mark.parametrize("norm_eps", [1e-5, 1e-6])
def test_from_diffusers_and_back(norm_eps: float) -> None:
    model = tiny_diffusers_dit(norm_eps=norm_eps)
    converted = from_diffusers(model)
    assert converted.config.downscale_freq_shift == 1
    assert distance(model, converted) < 1e-5
    back = to_diffusers(converted)
    assert_same_weights(model, back)
    assert back.config.norm_eps == norm_eps
    assert distance(model, back) < 1e-5


def test_norm_eps_of_diffusers_changes_little_once_it_is_lost(tmp_path: Path) -> None:
    model = tiny_diffusers_dit()
    from_diffusers(model).save_pretrained(tmp_path)
    assert 0 < distance(model, load_model(tmp_path)) < 1e-4


def test_spacing_is_lost_in_a_saved_diffusers_folder(tmp_path: Path) -> None:
    model = tiny_dit()
    to_diffusers(model).save_pretrained(tmp_path)
    assert distance(model, DiTTransformer2DModel.from_pretrained(tmp_path)) > 1e-3
    assert load_model(tmp_path).config.downscale_freq_shift == 1


@pytest.mark.parametrize("class_name", ["DiTTransformer2DModel", "Transformer2DModel"])
@pytest.mark.parametrize("safe_serialization", [True, False])
def test_diffusers_folder(class_name: str, safe_serialization: bool, tmp_path: Path) -> None:
    model = tiny_diffusers_dit()
    model.save_pretrained(tmp_path / "transformer", safe_serialization=safe_serialization)
    (tmp_path / "model_index.json").write_text("{}")
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": class_name}))
    assert distance(model, load_model(tmp_path)) < 1e-5
    with pytest.raises(ValueError, match="sample_size is 8 in this checkpoint, got 16"):
        load_model(tmp_path, sample_size=16)


def test_diffusers_weights_are_copied() -> None:
    model = tiny_dit()
    converted = to_diffusers(model)
    models = (model, converted, from_diffusers(converted))
    tensors = [tensor for module in models for tensor in (*module.parameters(), *module.buffers())]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"long_skip": LongSkipConfig()}, "long_skip"),
        ({"null_class": False}, "null_class"),
        ({"mlp_ratio": 2.0}, "mlp_ratio"),
    ],
)
def test_diffusers_refuses_what_it_cannot_hold(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"DiTTransformer2DModel needs {named}"):
        to_diffusers(tiny_dit(**options))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("activation_fn", "geglu"),
        ("attention_bias", False),
        ("norm_elementwise_affine", True),
        ("upcast_attention", True),
        ("dropout", 0.1),
        ("norm_eps", 1e-3),
    ],
)
def test_unsupported_diffusers_config_is_refused(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"our DiT needs {option} to be .*, got {value!r}"):
        from_diffusers(tiny_diffusers_dit(**{option: value}))


def test_block_with_embedders_of_its_own_is_named() -> None:
    model = tiny_diffusers_dit()
    with torch.no_grad():
        model.transformer_blocks[2].norm1.emb.timestep_embedder.linear_2.bias[0] += 1
    with pytest.raises(ValueError, match=r"transformer_blocks\.2\.norm1\.emb\.timestep_embedder\.linear_2\.bias"):
        from_diffusers(model)


def test_diffusers_model_with_another_position_table_is_refused() -> None:
    model = tiny_diffusers_dit()
    model.pos_embed.pos_embed.add_(0.01)
    with pytest.raises(ValueError, match="pos_embed must be the sine-cosine table"):
        from_diffusers(model)


def test_diffusers_blocks_of_different_spacing_are_refused() -> None:
    model = tiny_diffusers_dit()
    model.transformer_blocks[1].norm1.emb.time_proj.downscale_freq_shift = 0
    with pytest.raises(ValueError, match="share one downscale_freq_shift"):
        from_diffusers(model)
