"""The class-to-image model: presets, sizes, saving, inputs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import inputs, tiny_dit

from skipdit.checkpoints import load_model
from skipdit.models import dit
from skipdit.models.dit import PRESETS, DiT, sincos_position_embedding
from skipdit.models.long_skip import LongSkipConfig


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("long_skip", [None, LongSkipConfig()], ids=["plain", "long_skip"])
def test_every_preset_builds(name: str, long_skip: LongSkipConfig | None) -> None:
    with torch.device("meta"):
        model = DiT.from_preset(name, long_skip=long_skip)
    num_layers, hidden_size, _, patch_size = PRESETS[name]
    num_skips = sum("long_skip.proj.weight" in key for key in model.state_dict())
    assert num_skips == (0 if long_skip is None else num_layers // 2)
    assert model.patch_embed.proj.weight.shape == (hidden_size, 4, patch_size, patch_size)


def test_xl_2_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in DiT.from_preset("DiT-XL/2", long_skip=config).parameters())
            for config in (None, LongSkipConfig())
        ]
    assert counts == [675_129_632 - 294_912, 712_074_272]  # without the fixed position table (reference section 1.1)


def test_an_unknown_preset_names_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match=r"DiT-S/2, .*DiT-XL/8, got 'DiT-M/2'"):
        DiT.from_preset("DiT-M/2")


@pytest.mark.parametrize("case", ["skip", "vanilla"])
def test_parity_with_the_authors_model(case: str, shared: Path) -> None:
    cases = load_file(shared / "parity" / "dit_skip_cases.safetensors")
    model = load_model(shared / "parity" / "dit_skip.safetensors", num_attention_heads=2)
    if case == "vanilla":
        plain = tiny_dit(12, None)
        plain.load_state_dict({key: value for key, value in model.state_dict().items() if "long_skip" not in key})
        model = plain
    with torch.no_grad():
        for latents, timestep, expected in zip(cases["x"], cases["t"], cases[case], strict=True):
            actual = model(latents, timestep, cases["y"]).sample
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_position_embedding_separates_rows_and_columns() -> None:
    table = sincos_position_embedding(32, 3, 5).reshape(3, 5, 32)
    assert torch.equal(table[0, :, :16], table[2, :, :16])
    assert torch.equal(table[:, 0, 16:], table[:, 4, 16:])
    assert len(table.reshape(15, 32).unique(dim=0)) == 15


def test_rectangular_inputs_keep_positions_and_layout() -> None:
    model = tiny_dit()
    latents, labels = inputs(size=8)
    wide = torch.cat([latents, latents], dim=3)
    assert model(wide, torch.tensor(1), labels).sample.shape == (2, 8, 8, 16)
    tall = wide.transpose(2, 3)
    assert model(tall, torch.tensor(1), labels).sample.shape == (2, 8, 16, 8)
    # a model whose blocks do nothing puts every patch back where it came from
    identity = DiT(sample_size=4, patch_size=2, in_channels=1, out_channels=1, num_layers=2, num_attention_heads=2,
                   attention_head_dim=8, num_classes=1)  # fmt: skip
    with torch.no_grad():
        identity.patch_embed.proj.weight.copy_(torch.eye(16, 4).reshape(16, 1, 2, 2))
        identity.final_layer.proj.weight.copy_(torch.eye(4, 16))
        identity.final_layer.norm = torch.nn.Identity()
        picture = torch.arange(4 * 8, dtype=torch.float32).reshape(1, 1, 4, 8)
        table = sincos_position_embedding(16, 2, 4)[:, :4].reshape(2, 4, 2, 2).permute(0, 2, 1, 3).reshape(4, 8)
        out = identity(picture, torch.tensor(0), torch.zeros(1, dtype=torch.long)).sample
    torch.testing.assert_close(out[0, 0], picture[0, 0] + table, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "long_skip",
    [None, LongSkipConfig(), LongSkipConfig(num_pairs=1, norm="rms_norm", fusion="residual", middle_pair=False)],
    ids=["plain", "all", "partial"],
)
def test_save_and_load_are_bit_equal(tmp_path: Path, long_skip: LongSkipConfig | None) -> None:
    model = tiny_dit(7, long_skip)
    model.save_pretrained(tmp_path)
    loaded = DiT.from_pretrained(tmp_path)
    assert loaded.config.long_skip == (None if long_skip is None else long_skip.to_dict())
    latents, labels = inputs()
    for size in (8, 12):
        latents = torch.randn(2, 4, size, size)
        assert torch.equal(
            model(latents, torch.tensor(9), labels).sample, loaded(latents, torch.tensor(9), labels).sample
        )


def test_a_fresh_model_predicts_zero() -> None:
    model = DiT.from_preset("DiT-S/8", long_skip=LongSkipConfig())
    out = model(torch.randn(1, 4, 32, 32), torch.tensor(5), torch.tensor([3])).sample
    assert out.abs().max() == 0  # adaLN-Zero


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="divisible by 4, got 18"):
        DiT(num_attention_heads=3, attention_head_dim=6)
    with pytest.raises(ValueError, match="sample_size must be divisible by patch_size 3, got 32"):
        DiT(patch_size=3)
    with pytest.raises(ValueError, match="patch_size must be at least 1, got 0"):
        DiT(patch_size=0)
    latents, labels = inputs(size=9)
    with pytest.raises(ValueError, match=r"divisible by patch_size 2, got \(9, 9\)"):
        tiny_dit()(latents, torch.tensor(1), labels)
    with pytest.raises(ValueError, match="no null class"):
        _ = tiny_dit(null_class=False).null_class_label


def test_one_timestep_for_all_equals_one_a_sample() -> None:
    model = tiny_dit()
    latents, labels = inputs()
    one = model(latents, torch.tensor(77), labels).sample
    assert torch.equal(one, model(latents, torch.tensor([77]), labels).sample)
    assert torch.equal(one, model(latents, torch.tensor([77, 77]), labels).sample)


def test_without_return_dict_a_tuple_comes_back() -> None:
    model = tiny_dit()
    latents, labels = inputs()
    (sample,) = model(latents, torch.tensor(1), labels, return_dict=False)
    assert torch.equal(sample, model(latents, torch.tensor(1), labels).sample)


def test_bfloat16_is_close_to_float32() -> None:
    model = tiny_dit()
    latents, labels = inputs()
    exact = model(latents, torch.tensor(400), labels).sample
    half = model.to(torch.bfloat16)(latents.to(torch.bfloat16), torch.tensor(400), labels).sample
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("long_skip", [None, LongSkipConfig()], ids=["plain", "long_skips"])
def test_compiled_it_is_whole_and_bit_equal(long_skip: LongSkipConfig | None) -> None:
    torch._dynamo.reset()
    model = tiny_dit(4, long_skip)
    latents, labels = inputs()
    expected = model(latents, torch.tensor(500), labels).sample
    model.compile(fullgraph=True, backend="eager")
    assert torch.equal(model(latents, torch.tensor(500), labels).sample, expected)
    torch._dynamo.reset()


def test_positions_at_another_size_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They were computed on the CPU at each call. Those of inference mode serve training too."""
    tables, made = dit.sincos_position_embedding, []
    monkeypatch.setattr(dit, "sincos_position_embedding", lambda *sizes: made.append(sizes) or tables(*sizes))
    dit.known_position_embedding.cache_clear()
    model, latents, labels = tiny_dit(), torch.randn(1, 4, 16, 12), torch.tensor([1])
    with torch.inference_mode():
        outputs = [model(latents, torch.tensor(500), labels).sample for _ in range(3)]
    made_at_size = [sizes for sizes in made if sizes[1:] == (8, 6)]
    assert made_at_size == [(32, 8, 6)]
    trained = model(latents, torch.tensor(500), labels).sample
    trained.mean().backward()
    assert all(torch.equal(output, trained.detach()) for output in outputs)
