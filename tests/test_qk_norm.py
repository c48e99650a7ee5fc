"""Norms of queries and keys, an option of our models."""

import dataclasses
import json
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny import inputs, tiny_dit, tiny_latte
from torch import nn
from training_runs import make_config, make_data

from skipdit.analysis.jacobian import jacobian_norms, unit_bound, unit_function, unit_inputs
from skipdit.checkpoints import load_model, to_diffusers, to_official
from skipdit.models.dit import Attention, DiT, DiTBlock
from skipdit.models.inflate import inflate_latte
from skipdit.models.latte import Latte
from skipdit.models.long_skip import LongSkipConfig
from skipdit.training import list_checkpoints, train


def test_attention_is_the_formula() -> None:
    attention = Attention(24, 3, qk_norm=True)
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    tokens = torch.randn(2, 5, 24)
    query, key, value = (part.reshape(2, 5, 3, 8).transpose(1, 2) for part in attention.qkv(tokens).chunk(3, dim=-1))
    assert attention.q_norm is not None
    assert attention.k_norm is not None
    query = query / (query.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attention.q_norm.weight
    key = key / (key.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attention.k_norm.weight
    attended = torch.softmax(query @ key.mT / 8**0.5, dim=-1) @ value
    expected = attention.proj(attended.transpose(1, 2).reshape(2, 5, 24))
    torch.testing.assert_close(attention(tokens), expected, atol=1e-5, rtol=1e-5)


def test_logits_do_not_grow_with_the_weights() -> None:
    attention = Attention(24, 3, qk_norm=True)
    tokens = torch.randn(2, 5, 24)
    before = attention(tokens)
    with torch.no_grad():
        attention.qkv.weight[:48] *= 100
        attention.qkv.bias[:48] *= 100
    torch.testing.assert_close(attention(tokens), before, atol=1e-5, rtol=1e-3)


def test_norms_start_as_ones_and_the_first_prediction_is_zero() -> None:
    model = DiT(sample_size=4, num_layers=2, num_attention_heads=2, attention_head_dim=16, qk_norm=True)
    assert torch.equal(model.blocks[0].get_parameter("attn.q_norm.weight"), torch.ones(16))
    assert model(torch.randn(1, 4, 4, 4), torch.tensor(5), torch.tensor([3])).sample.abs().max() == 0


def test_saved_folders_and_files_are_read_back(tmp_path: Path) -> None:
    model = tiny_dit(4, LongSkipConfig(), qk_norm=True)
    latents, labels = inputs()
    expected = model(latents, torch.tensor(400), labels).sample
    model.save_pretrained(tmp_path / "folder")
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["qk_norm"] is True
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    read = [
        DiT.from_pretrained(tmp_path / "folder"),
        load_model(tmp_path / "folder"),
        load_model(
            tmp_path / "model.safetensors", num_attention_heads=2, sample_size=8, num_classes=10, fusion="replace"
        ),
    ]
    for each in read:
        assert torch.equal(each.eval()(latents, torch.tensor(400), labels).sample, expected)
    video = tiny_latte(2, qk_norm=True)
    video.save_pretrained(tmp_path / "video")
    loaded = Latte.from_pretrained(tmp_path / "video").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in video.state_dict().items())


def test_a_folder_from_before_the_option_loads_without_norms(tmp_path: Path) -> None:
    model = tiny_dit(4)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("qk_norm") is False
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(tmp_path)
    assert loaded.config["qk_norm"] is False
    assert not [name for name in loaded.state_dict() if "_norm" in name and "long_skip" not in name]
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


def test_formats_that_cannot_hold_norms_refuse_them() -> None:
    for convert, model in (
        (to_official, tiny_dit(4, None, qk_norm=True)),
        (to_official, tiny_latte(4, None, qk_norm=True)),
        (to_diffusers, tiny_dit(4, None, qk_norm=True)),
    ):
        with pytest.raises(ValueError, match="qk_norm"):
            convert(model)
    video = tiny_latte(2, num_classes=3, in_channels=3, out_channels=3)
    picture = DiT(sample_size=8, in_channels=3, out_channels=3, num_layers=2, num_attention_heads=2,
                  attention_head_dim=8, num_classes=3, qk_norm=True)  # fmt: skip
    with pytest.raises(ValueError, match="qk_norm must be True as in the image model, got False"):
        inflate_latte(video, picture, {})


@pytest.mark.parametrize("seed", range(4))
def test_no_unit_exceeds_its_bound(seed: int) -> None:
    torch.manual_seed(seed)
    model = tiny_dit(4, qk_norm=True)
    nn.Module.to(model, torch.float64)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02 * 3**seed)
    latents, labels = inputs()
    given = unit_inputs(model, latents.double(), torch.tensor(40.0 + 150 * seed), labels)
    for unit in range(4):
        norms = jacobian_norms(unit_function(model, given, unit), given[unit][0], tolerance=1e-3)
        assert (norms.value <= unit_bound(cast(DiTBlock, model.blocks[unit]), *given[unit])).all()


def test_half_precision_keeps_its_type() -> None:
    """A scale in float32 beside queries in bfloat16 must not turn them into float32, which attention would refuse."""
    attention, tokens = Attention(32, 2, qk_norm=True), torch.randn(2, 5, 32)
    expected = attention(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(tokens)
    assert found.dtype == attention.bfloat16()(tokens.bfloat16()).dtype == torch.bfloat16
    assert F.cosine_similarity(found.float().flatten(), expected.flatten(), dim=0) > 0.999


def test_a_run_trains_with_them_and_its_checkpoint_is_read(tmp_path: Path) -> None:
    config = make_config(make_data(tmp_path / "data"))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, qk_norm=True))
    model = load_model(train(config, tmp_path / "run", device="cpu"))
    assert model.config["qk_norm"] is True
    learned = model.blocks[1].attn.q_norm.weight
    assert (learned != 1).any()
    checkpoint = load_model(list_checkpoints(tmp_path / "run")[-1])
    assert torch.equal(checkpoint.blocks[1].attn.q_norm.weight, learned)
    going_on = dataclasses.replace(
        config,
        start_from=str(tmp_path / "run" / "pipeline"),
        model=dataclasses.replace(config.model, qk_norm=False),
    )
    with pytest.raises(ValueError, match="start_from has qk_norm True, not False"):
        train(going_on, tmp_path / "on", device="cpu")
