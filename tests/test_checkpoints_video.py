"""Checkpoints of the two Lattes: the authors' numbers and counts, the order of the skips, what is asked and refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from diffusers import LatteTransformer3DModel, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file
from tiny import assert_same_weights
from torch import Tensor, nn

import skipdit
from skipdit.cache.methods import CacheMethod
from skipdit.cache.schedule import IntervalSchedule
from skipdit.cache.site import DeepFeatures
from skipdit.checkpoints import from_official, latte_t2v, load_model, save_official, to_diffusers, to_official
from skipdit.checkpoints.keys import LoadHints
from skipdit.checkpoints.latte import skip_targets
from skipdit.cli import main
from skipdit.models.latte import Latte
from skipdit.models.long_skip import LongSkipConfig
from skipdit.models.surgery import RunsUnits

M = TypeVar("M", bound=nn.Module)
SIZES: dict[str, Any] = {
    "sample_size": 8,
    "num_frames": 3,
    "num_layers": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
}
TEXT_SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 4,
    "cross_attention_dim": 16,
    "sample_size": 8,
    "patch_size": 2,
    "caption_channels": 6,
    "video_length": 3,
    **latte_t2v.FIXED_OPTIONS,
}
UNTOLD: dict[str, Any] = {"num_attention_heads": 2, "sample_size": 8, "num_frames": 3}
ALL = LongSkipConfig()


def randomize(model: M) -> M:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def tiny_latte(long_skip: LongSkipConfig | None = None, **options: Any) -> Latte:
    return randomize(Latte(**SIZES | {"num_classes": 5} | options, long_skip=long_skip))


def tiny_text_latte(long_skip: LongSkipConfig | None = None, **options: Any) -> LatteTransformer3DModel:
    model = LatteTransformer3DModel(**TEXT_SIZES | options)
    if long_skip is not None:
        skipdit.add_long_skips(model, long_skip)
    return randomize(model)


def changed(official: dict[str, Tensor], folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    change(official)
    save_file(official, folder / "official.safetensors")
    return folder / "official.safetensors"


def without_skips(path: Path, folder: Path) -> Path:
    plain = {key: tensor for key, tensor in load_file(path).items() if not key.startswith("skip_")}
    save_file(plain, folder / "vanilla.safetensors")
    return folder / "vanilla.safetensors"


# --- the authors' numbers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latte_cases(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "parity" / "latte_skip_cases.safetensors")


def run_latte(model: Latte, cases: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        steps = zip(cases["x"], cases["t"], strict=True)
        return torch.stack([model(x, t, cases["y"]).sample for x, t in steps])


@pytest.mark.parametrize("output", ["skip", "vanilla"])
def test_latte_reproduces_the_authors_outputs(
    output: str, latte_cases: dict[str, Tensor], shared: Path, tmp_path: Path
) -> None:
    path = shared / "parity" / "latte_skip.safetensors"
    path = without_skips(path, tmp_path) if output == "vanilla" else path
    model = load_model(path, num_attention_heads=2)
    torch.testing.assert_close(run_latte(model, latte_cases), latte_cases[output], rtol=0, atol=1e-4)


def test_latte_reproduces_the_authors_joint_training_output(latte_cases: dict[str, Tensor], shared: Path) -> None:
    model = load_model(shared / "parity" / "latte_skip.safetensors", num_attention_heads=2)
    x, t, y, images = (latte_cases[f"joint_{name}"] for name in ("x", "t", "y", "y_image"))
    with torch.no_grad():
        output = model(x, t, y, num_images=images.shape[1], image_class_labels=images).sample
    torch.testing.assert_close(output, latte_cases["joint_out"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "interval", "num_shallow_units"), [("cached_N2", 2, 1), ("cached_N3", 3, 1), ("cached_N2_k2", 2, 2)]
)
def test_latte_reproduces_the_authors_cached_outputs(
    name: str, interval: int, num_shallow_units: int, latte_cases: dict[str, Tensor], shared: Path
) -> None:
    model = load_model(shared / "parity" / "latte_skip.safetensors", num_attention_heads=2)
    schedule = IntervalSchedule(interval=interval, start_timestep=900, stop_timestep=49.99)
    skipdit.enable_cache(model, CacheMethod(schedule=schedule, site=DeepFeatures(num_shallow_units)))
    torch.testing.assert_close(run_latte(model, latte_cases), latte_cases[name], rtol=0, atol=1e-4)


def test_latte_sizes_are_read_from_keys_and_shapes(shared: Path) -> None:
    model = load_model(shared / "parity" / "latte_skip.safetensors", num_attention_heads=2)
    expected = json.loads((shared / "parity" / "latte_skip.json").read_text())["config"]
    assert isinstance(model, Latte)
    assert not model.training
    assert model.config.sample_size == expected["input_size"]
    assert model.config.num_frames == expected["num_frames"]
    assert model.config.num_layers == expected["depth"]
    assert model.config.num_classes == expected["num_classes"]
    assert model.config.attention_head_dim == expected["hidden_size"] // 2
    assert LongSkipConfig.from_dict(model.config.long_skip) == ALL
    official = load_file(shared / "parity" / "latte_skip.safetensors")
    torch.testing.assert_close(to_official(model), official, rtol=0, atol=0)


@pytest.mark.parametrize("output", ["skip", "vanilla"])
def test_text_to_video_reproduces_the_authors_outputs(output: str, shared: Path, tmp_path: Path) -> None:
    path = shared / "parity" / "latte_t2v_skip.safetensors"
    path = without_skips(path, tmp_path) if output == "vanilla" else path
    model = load_model(path, num_attention_heads=2, sample_size=8, num_frames=4)
    cases = load_file(shared / "parity" / "latte_t2v_skip_cases.safetensors")
    steps = list(zip(cases["x"], cases["t"], strict=True))[::4]
    texts = cases["encoder_hidden_states"]
    with torch.no_grad():
        outputs = [model(x, t.expand(len(x)), texts, return_dict=False)[0] for x, t in steps]
    torch.testing.assert_close(torch.stack(outputs), cases[output][::4], rtol=0, atol=1e-4)
    expected = json.loads((shared / "parity" / "latte_t2v_skip.json").read_text())["config"]
    assert {name: model.config[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("num_classes", "long_skip", "num_tensors", "num_elements"),
    [
        (101, ALL, 321, 692_732_192),
        (101, None, 293, 674_112_416),
        (None, ALL, 320, 692_614_688),
        (None, None, 292, 673_994_912),
    ],
)
def test_official_keys_of_latte_xl(
    num_classes: int | None, long_skip: LongSkipConfig | None, num_tensors: int, num_elements: int
) -> None:
    with torch.device("meta"):
        state_dict = to_official(Latte.from_preset("Latte-XL/2", num_classes=num_classes, long_skip=long_skip))
    assert len(state_dict) == num_tensors
    assert sum(tensor.numel() for tensor in state_dict.values()) == num_elements
    assert state_dict["temp_embed"].shape == (1, 16, 1152)
    assert state_dict["pos_embed"].shape == (1, 256, 1152)
    assert ("y_embedder.embedding_table.weight" in state_dict) == (num_classes is not None)
    skips = {key for key in state_dict if key.startswith("skip_")}
    stems = [stem for skip in range(7) for stem in (f"skip_norms.{skip}", f"skip_linears.{skip}.linear")]
    assert skips == ({f"{stem}.{name}" for stem in stems for name in ("weight", "bias")} if long_skip else set())


@pytest.mark.parametrize(
    ("long_skip", "num_tensors", "num_elements"), [(ALL, 1024, 1_094_977_952), (None, 968, 1_057_738_400)]
)
def test_official_keys_of_the_published_text_to_video_model(
    long_skip: LongSkipConfig | None, num_tensors: int, num_elements: int
) -> None:
    published = {"attention_head_dim": 72, "num_attention_heads": 16, "num_layers": 28, "cross_attention_dim": 1152}
    with torch.device("meta"):
        model = LatteTransformer3DModel(
            **TEXT_SIZES | published | {"caption_channels": 4096, "sample_size": 64, "video_length": 16}
        )
        if long_skip is not None:
            skipdit.add_long_skips(model, long_skip)
    state_dict = to_official(model)
    assert len(state_dict) == num_tensors
    assert sum(tensor.numel() for tensor in state_dict.values()) == num_elements
    assert state_dict["caption_projection.y_embedding"].shape == (120, 4096)
    read = latte_t2v.read(state_dict, LoadHints()).model  # nothing need be told
    assert isinstance(read, LatteTransformer3DModel)
    assert {name: read.config[name] for name in model.config if name[0] != "_"} == {
        name: model.config[name] for name in model.config if name[0] != "_"
    }


# --- Latte: key tables ------------------------------------------------------------------------------------------------


def test_order_of_latte_skips() -> None:
    assert skip_targets(28, 7) == [14, 16, 18, 20, 22, 24, 26]  # Latte_skip: innermost first
    assert skip_targets(28, 2) == [26, 24]  # Latte_skip_partial: outermost first
    assert skip_targets(28, 0) == []


@pytest.mark.parametrize(("num_pairs", "blocks"), [(None, (8, 10, 12, 14)), (2, (14, 12)), (4, (8, 10, 12, 14))])
def test_official_latte_skips_belong_to_these_blocks(num_pairs: int | None, blocks: tuple[int, ...]) -> None:
    model = tiny_latte(LongSkipConfig(num_pairs=num_pairs), num_layers=16)
    state_dict = to_official(model)
    assert len([key for key in state_dict if key.startswith("skip_norms.")]) == 2 * len(blocks)
    for skip, block in enumerate(blocks):
        assert torch.equal(state_dict[f"skip_norms.{skip}.bias"], model.blocks[block].long_skip.norm.bias)
        assert torch.equal(state_dict[f"skip_linears.{skip}.linear.weight"], model.blocks[block].long_skip.proj.weight)


@pytest.mark.parametrize("num_classes", [5, None])
@pytest.mark.parametrize("long_skip", [None, ALL, LongSkipConfig(num_pairs=1), LongSkipConfig(middle_pair=False)])
def test_latte_round_trip_is_bit_equal(
    num_classes: int | None, long_skip: LongSkipConfig | None, tmp_path: Path
) -> None:
    model = tiny_latte(long_skip, num_classes=num_classes, num_layers=12)
    official = to_official(model)
    torch.testing.assert_close(from_official(official), dict(model.state_dict()), rtol=0, atol=0)
    save_official(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors", num_attention_heads=2)
    assert_same_weights(model, loaded)
    assert loaded.long_skip_links == model.long_skip_links
    torch.testing.assert_close(to_official(loaded), official, rtol=0, atol=0)
    x, t = torch.randn(2, 3, 4, 8, 8), torch.tensor([20, 700])
    y = None if num_classes is None else torch.tensor([0, 5])
    with torch.no_grad():
        assert torch.equal(model(x, t, y).sample, loaded(x, t, y).sample)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"long_skip": LongSkipConfig(fusion="residual")}, "long_skip.fusion"),
        ({"long_skip": LongSkipConfig(norm="rms_norm")}, "long_skip.norm"),
        ({"long_skip": ALL, "num_layers": 6}, "num_layers % 4"),
        ({"downscale_freq_shift": 1.0}, "downscale_freq_shift"),
        ({"null_class": False}, "null_class"),
        ({"out_channels": 3}, "out_channels"),
    ],
)
def test_official_latte_format_refuses_what_it_cannot_hold(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"the official format needs {named}"):
        to_official(tiny_latte(**options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.mlp.fc1.bias"), r"1 missing key\(s\): blocks.1.mlp.fc1.bias$"),
        (lambda s: s.pop("pos_embed"), r"1 missing key\(s\): pos_embed$"),
        (lambda s: s.pop("skip_norms.0.weight"), r"1 missing key\(s\): skip_norms.0.weight$"),
        (lambda s: s.update({"skip_norms.2.bias": torch.zeros(2)}), r"1 unknown key\(s\): skip_norms.2.bias$"),
        (lambda s: s.update({"text_embedding_projection.1.bias": torch.zeros(2)}), "1 unknown key.s.: text_embedding"),
        (lambda s: s.update({"blocks.1.mlp.fc1.bias": torch.zeros(3)}), r"blocks.1.mlp.fc1.bias \(3,\) instead of"),
        (lambda s: s.update({"skip_linears.1.linear.bias": torch.zeros(3)}), r"skip_linears.1.linear.bias \(3,\)"),
        (lambda s: s.update({"temp_embed": torch.zeros(1, 3, 16)}), "temp_embed must be the sine-cosine table"),
        (lambda s: s.update({"temp_embed": torch.zeros(1, 3, 8)}), r"temp_embed must be \(1, number of frames, 16\)"),
        (lambda s: s.update({"pos_embed": torch.zeros(1, 16, 16)}), "pos_embed must be the sine-cosine table"),
        (
            lambda s: [s.pop(key) for key in list(s) if key.startswith("blocks.7.")],
            "an official Latte with long skips must have a number of blocks divisible by 4, got 7",
        ),
    ],
)
def test_wrong_keys_of_a_latte_are_named(
    change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    path = changed(to_official(tiny_latte(ALL)), tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(path, num_attention_heads=2)
    assert str(caught.value).startswith(f"{path}: ")


# --- Latte: our files and folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_pairs", [None, 1])
def test_file_with_our_keys_is_a_latte_where_its_skips_spare_the_last_block(
    num_pairs: int | None, tmp_path: Path
) -> None:
    model = tiny_latte(LongSkipConfig(num_pairs=num_pairs, norm="rms_norm", fusion="residual"))
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    loaded = load_model(path, **UNTOLD, fusion="residual")
    assert_same_weights(model, loaded)
    assert loaded.long_skip_links == model.long_skip_links
    with pytest.raises(ValueError, match="num_frames must be given"):
        load_model(path, num_attention_heads=2, sample_size=8, fusion="residual")
    with pytest.raises(ValueError, match="fusion must be given"):
        load_model(path, **UNTOLD)


def test_plain_file_with_our_keys_is_a_latte_where_it_is_told_to_have_frames(tmp_path: Path) -> None:
    model = tiny_latte()
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    assert_same_weights(model, load_model(path, **UNTOLD))
    assert isinstance(load_model(path, **UNTOLD), Latte)
    assert isinstance(load_model(path, num_attention_heads=2, sample_size=8), skipdit.DiT)


def test_file_with_our_keys_and_no_classes_is_a_latte(tmp_path: Path) -> None:
    save_file(tiny_latte(num_classes=None).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="num_frames must be given"):
        load_model(tmp_path / "model.safetensors", num_attention_heads=2, sample_size=8)
    assert load_model(tmp_path / "model.safetensors", **UNTOLD).config.num_classes is None


def test_latte_folder(tmp_path: Path) -> None:
    model = tiny_latte(LongSkipConfig(num_pairs=1, fusion="residual"), downscale_freq_shift=1.0, null_class=False)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, num_frames=3, dtype=torch.bfloat16)
    assert loaded.dtype == loaded.frame_embedding.dtype == torch.bfloat16
    assert_same_weights(model.to(torch.bfloat16), loaded)
    assert all(loaded.config[name] == model.config[name] for name in model.config if not name.startswith("_"))
    with pytest.raises(ValueError, match="num_frames is 3 in this checkpoint, got 16"):
        load_model(tmp_path, num_frames=16)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"long_skip": None}))
    with pytest.raises(ValueError, match=r"unknown key.*long_skip") as caught:
        load_model(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")


def test_diffusers_has_no_latte_with_classes() -> None:
    with pytest.raises(ValueError, match="no class-to-video transformer, got a Latte"):
        to_diffusers(tiny_latte())


def test_models_without_an_official_format_are_refused() -> None:
    with pytest.raises(ValueError, match=r"only .*DiT have an official format, got a Linear"):
        to_official(nn.Linear(2, 2))


def test_frames_are_no_option_of_a_dit(tmp_path: Path) -> None:
    model = skipdit.DiT(sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_classes=5)
    save_official(model, tmp_path / "dit.safetensors")
    with pytest.raises(ValueError, match="num_frames is not an option of a DiT, got 16"):
        load_model(tmp_path / "dit.safetensors", num_attention_heads=2, num_frames=16)


# --- text-to-video ----------------------------------------------------------------------------------------------------


def test_text_to_video_round_trip_is_bit_equal_but_for_the_unused_buffer(tmp_path: Path) -> None:
    model = tiny_text_latte(ALL)
    official = to_official(model)
    unused = official["caption_projection.y_embedding"]
    assert unused.shape == (120, 6)
    assert not unused.any()
    official["caption_projection.y_embedding"] = torch.randn(120, 6)
    save_file(official, tmp_path / "theirs.safetensors")
    loaded = load_model(tmp_path / "theirs.safetensors", **UNTOLD)
    assert isinstance(loaded, RunsUnits)
    assert_same_weights(model, loaded)
    save_official(loaded, tmp_path / "ours.safetensors")
    expected = official | {"caption_projection.y_embedding": unused}
    torch.testing.assert_close(load_file(tmp_path / "ours.safetensors"), expected, rtol=0, atol=0)


def test_official_text_to_video_skips_belong_to_these_blocks() -> None:
    model = tiny_text_latte(ALL, num_layers=6)
    state_dict = to_official(model)
    for skip, pair in enumerate((3, 4, 5)):
        block: Any = model.transformer_blocks[pair]
        assert torch.equal(state_dict[f"skip_norms.{skip}.bias"], block.long_skip.norm.bias)
        assert torch.equal(state_dict[f"skip_linears.{skip}.linear.weight"], block.long_skip.proj.weight)


def test_text_to_video_training_checkpoint(tmp_path: Path) -> None:
    model, ema = tiny_text_latte(ALL), tiny_text_latte(ALL)
    path = tmp_path / "Latte-skip.pt"
    torch.save({"model": to_official(model), "ema": to_official(ema)}, path)
    assert_same_weights(ema, load_model(path, **UNTOLD))
    assert_same_weights(model, load_model(path, **UNTOLD, prefer="model"))


def test_plain_text_to_video_file_becomes_one_with_long_skips(tmp_path: Path) -> None:
    model = tiny_text_latte()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors", **UNTOLD)
    assert type(loaded) is LatteTransformer3DModel
    assert_same_weights(model, loaded)
    x, t, texts = torch.randn(1, 4, 3, 8, 8), torch.tensor([500]), torch.randn(1, 5, 6)
    with torch.no_grad():
        before = loaded(x, t, texts, return_dict=False)[0]
        assert torch.equal(before, model(x, t, texts, return_dict=False)[0])
        skipdit.add_long_skips(loaded, LongSkipConfig(fusion="residual"))
        assert torch.equal(before, loaded(x, t, texts, return_dict=False)[0])
    save_file(loaded.state_dict(), tmp_path / "skips.safetensors")
    assert_same_weights(loaded, load_model(tmp_path / "skips.safetensors", **UNTOLD, fusion="residual"))
    with pytest.raises(ValueError, match="fusion must be given"):
        load_model(tmp_path / "skips.safetensors", **UNTOLD)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({}, "num_attention_heads must be given: 4 blocks of width 16"),
        ({"num_attention_heads": 3}, "must divide the hidden size 16, got 3"),
        ({"num_attention_heads": 2}, "sample_size must be given: 4 pairs of width 16"),
        ({"num_attention_heads": 2, "sample_size": 8}, "num_frames must be given: 4 pairs of width 16"),
        (UNTOLD | {"fusion": "residual"}, "fusion is 'replace' in this checkpoint, got 'residual'"),
    ],
)
def test_text_to_video_file_asks_for_what_it_cannot_tell(told: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_official(tiny_text_latte(ALL), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "model.safetensors", **told)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("skip_norms.0.weight"), r"1 missing key\(s\): skip_norms.0.weight$"),
        (lambda s: s.update({"skip_norms.2.bias": torch.zeros(2)}), r"1 unknown key\(s\): skip_norms.2.bias$"),
        (lambda s: s.update({"skip_norms.1.bias": torch.zeros(2)}), r"skip_norms.1.bias \(2,\) instead of \(32,\)"),
        (lambda s: s.pop("scale_shift_table"), r"1 missing key\(s\): scale_shift_table$"),
        (lambda s: s.pop("proj_out.weight"), r"1 missing key\(s\): proj_out.weight$"),
        (
            lambda s: [s.pop(key) for key in list(s) if key.startswith("transformer_blocks.3.")],
            "an even number of pairs, got 3",
        ),
    ],
)
def test_wrong_keys_of_a_text_to_video_file_are_named(
    change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    path = changed(to_official(tiny_text_latte(ALL)), tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(path, **UNTOLD)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("long_skip", "options", "named"),
    [
        (LongSkipConfig(fusion="residual"), {}, "long_skip.fusion"),
        (LongSkipConfig(num_pairs=1), {}, "long_skip.num_pairs"),
        (ALL, {"num_layers": 5}, "num_layers % 2"),
        (None, {"norm_eps": 1e-5}, "norm_eps"),
    ],
)
def test_official_text_to_video_format_refuses_what_it_cannot_hold(
    long_skip: LongSkipConfig | None, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=f"the official format needs {named}"):
        to_official(tiny_text_latte(long_skip, **options))


# --- folders of diffusers' classes ------------------------------------------------------------------------------------


def test_plain_folder_of_diffusers(tmp_path: Path) -> None:
    model = tiny_text_latte()
    model.save_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text("{}")
    loaded = load_model(tmp_path, dtype=torch.bfloat16)
    assert type(loaded) is LatteTransformer3DModel
    assert not loaded.training
    assert loaded.temp_pos_embed.dtype == torch.bfloat16
    assert_same_weights(model.to(torch.bfloat16), loaded)
    with pytest.raises(ValueError, match="num_frames is 3 in this checkpoint, got 4"):
        load_model(tmp_path, num_frames=4)


def test_folder_of_the_authors_base_model(tmp_path: Path) -> None:
    """Their class has options that diffusers' has no more, and the unused buffer."""
    model = tiny_text_latte()
    model.save_pretrained(tmp_path)
    path, weights = tmp_path / "config.json", tmp_path / "diffusion_pytorch_model.safetensors"
    config = json.loads(path.read_text()) | {"_class_name": "LatteT2V", "only_cross_attention": False}
    path.write_text(json.dumps(config))
    save_file(load_file(weights) | {"caption_projection.y_embedding": torch.randn(120, 6)}, weights)
    assert_same_weights(model, load_model(tmp_path))


@pytest.mark.parametrize("fusion", ["replace", "residual"])
def test_folder_with_long_skips(fusion: str, tmp_path: Path) -> None:
    model = tiny_text_latte(LongSkipConfig(fusion=fusion))
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, fusion=fusion, dtype=torch.bfloat16)
    assert isinstance(loaded, RunsUnits)
    assert not loaded.training
    assert loaded.long_skip_links == model.long_skip_links
    assert_same_weights(nn.Module.to(model, torch.bfloat16), loaded)


def test_folder_of_another_family_plain_and_with_long_skips(tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 4, "cross_attention_dim": 16}
    model = randomize(PixArtTransformer2DModel(**sizes, sample_size=8, caption_channels=6, norm_type="ada_norm_single"))
    model.save_pretrained(tmp_path / "plain")
    loaded = load_model(tmp_path / "plain")
    assert type(loaded) is PixArtTransformer2DModel
    assert_same_weights(model, loaded)
    skipdit.add_long_skips(loaded)
    loaded.save_pretrained(tmp_path / "skips")
    assert_same_weights(loaded, load_model(tmp_path / "skips"))
    with pytest.raises(ValueError, match="have an official format"):
        save_official(loaded, tmp_path / "model.safetensors")


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = tiny_text_latte(ALL)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.long_skip.safetensors"
    config = json.loads((tmp_path / "config.json").read_text())

    def load_with(**changes: Any) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=r"\w") as caught:
            load_model(tmp_path)
        assert str(caught.value).startswith(str(tmp_path))
        assert str(caught.value).count(str(tmp_path)) == 1
        return str(caught.value)

    assert "the config makes no model" in load_with(long_skip={"depth": 3})
    assert "num_pairs must be at most 2" in load_with(long_skip={"num_pairs": 3})
    assert "transformer_blocks.2.long_skip.norm.weight" in load_with(long_skip={"num_pairs": 1})
    assert "got 'FoldedTransformer'" in load_with(_class_name="FoldedTransformer")
    assert "got 'None'" in load_with(_class_name=None)
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "not a complete safetensors file" in load_with()
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither diffusion_pytorch_model\.long_skip"):
        load_model(tmp_path)


def test_family_that_diffusers_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "DeclaredTransformer"}')
    skipdit.models.families.FAMILIES["DeclaredTransformer"] = skipdit.Family()
    try:
        with pytest.raises(ValueError, match="DeclaredTransformer is not a diffusers class"):
            load_model(tmp_path)
    finally:
        del skipdit.models.families.FAMILIES["DeclaredTransformer"]


# --- the command ------------------------------------------------------------------------------------------------------


def test_convert_text_to_video_there_and_back(tmp_path: Path) -> None:
    model = tiny_text_latte(ALL)
    save_official(model, tmp_path / "theirs.safetensors")
    told = ["--num-attention-heads", "2", "--sample-size", "8", "--num-frames", "3"]
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    main(["convert", str(tmp_path / "theirs.safetensors"), "--to", "diffusers", "--out", str(folder), *told])
    assert_same_weights(model, load_model(folder))
    main(["convert", str(folder), "--to", "official", "--out", str(back)])
    assert back.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_convert_latte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_latte(ALL)
    save_official(model, tmp_path / "theirs.safetensors")
    arguments = ["convert", str(tmp_path / "theirs.safetensors"), "--num-attention-heads", "2"]
    main([*arguments, "--to", "skipdit", "--out", str(tmp_path / "ours")])
    assert_same_weights(model, load_model(tmp_path / "ours"))
    with pytest.raises(SystemExit):
        main([*arguments, "--to", "diffusers", "--out", str(tmp_path / "diffusers")])
    assert "diffusers has no class-to-video transformer" in capsys.readouterr().err
