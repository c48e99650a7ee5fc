"""Checkpoints: key tables, sizes from shapes, what is refused, and the way to diffusers and back."""

import argparse
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import assert_same_weights
from torch import Tensor, nn

from skipdit.checkpoints import (
    DIFFUSERS_KEYS,
    OFFICIAL_KEYS,
    from_official,
    load_model,
    save_official,
    to_official,
)
from skipdit.models.dit import DiT
from skipdit.models.long_skip import LongSkipConfig

M = TypeVar("M", bound=nn.Module)
SIZES: dict[str, Any] = {
    "sample_size": 8,
    "num_layers": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_classes": 5,
}


def randomize(model: M) -> M:
    """Every parameter random: the zero-initialised ones would hide their neighbours' mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def tiny_dit(long_skip: LongSkipConfig | None = None, **options: Any) -> DiT:
    return randomize(DiT(**SIZES | options, long_skip=long_skip))


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(4, 4, 8, 8), torch.tensor([0, 20, 500, 999]), torch.tensor([0, 1, 4, 5])


@torch.no_grad()
def distance(model: nn.Module, other: nn.Module) -> float:
    """The largest difference of their outputs over that of the first's own values."""
    arguments = inputs()
    output = model(*arguments).sample
    return ((output - other(*arguments).sample).abs().max() / output.abs().max()).item()


def official_file(folder: Path, change: Callable[[dict[str, Tensor]], object] | None = None) -> Path:
    """A tiny official checkpoint with long skips, after `change` has had its way with the state dict."""
    state_dict = to_official(tiny_dit(LongSkipConfig()))
    if change is not None:
        change(state_dict)
    save_file(state_dict, folder / "official.safetensors")
    return folder / "official.safetensors"


# --- the authors' numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["skip", "vanilla"])
def test_parity_file_reproduces_the_authors_outputs(output: str, shared: Path, tmp_path: Path) -> None:
    path = shared / "parity" / "dit_skip.safetensors"
    if output == "vanilla":
        plain = {key: tensor for key, tensor in load_file(path).items() if not key.startswith("skip_")}
        path = tmp_path / "vanilla.safetensors"
        save_file(plain, path)
    model = load_model(path, num_attention_heads=2)
    cases = load_file(shared / "parity" / "dit_skip_cases.safetensors")
    with torch.no_grad():
        outputs = [model(x, t, cases["y"]).sample for x, t in zip(cases["x"], cases["t"], strict=True)]
    torch.testing.assert_close(torch.stack(outputs), cases[output], rtol=0, atol=1e-4)


def test_sizes_are_read_from_keys_and_shapes(shared: Path) -> None:
    model = load_model(shared / "parity" / "dit_skip.safetensors", num_attention_heads=2)
    expected = json.loads((shared / "parity" / "dit_skip.json").read_text())["dit_skip"]["config"]
    assert model.config.sample_size == expected["input_size"]
    assert model.config.patch_size == expected["patch_size"]
    assert model.config.in_channels == expected["in_channels"]
    assert model.config.out_channels == 2 * expected["in_channels"]
    assert model.config.num_layers == expected["depth"]
    assert model.config.num_classes == expected["num_classes"]
    assert model.config.mlp_ratio == 4.0
    assert model.config.attention_head_dim == expected["hidden_size"] // 2
    assert LongSkipConfig.from_dict(model.config.long_skip) == LongSkipConfig()
    assert not model.training


@pytest.mark.parametrize(
    ("long_skip", "num_tensors", "num_elements"), [(LongSkipConfig(), 348, 712_369_184), (None, 292, 675_129_632)]
)
def test_official_keys_of_xl(long_skip: LongSkipConfig | None, num_tensors: int, num_elements: int) -> None:
    with torch.device("meta"):
        state_dict = to_official(DiT.from_preset("DiT-XL/2", long_skip=long_skip))
    block = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    stems = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"]
    stems += ["final_layer.adaLN_modulation.1", *(f"blocks.{unit}.{name}" for unit in range(28) for name in block)]
    if long_skip is not None:
        stems += [stem for skip in range(14) for stem in (f"skip_norms.{skip}", f"skip_linears.{skip}.linear")]
    keys = {f"{stem}.{parameter}" for stem in stems for parameter in ("weight", "bias")}
    assert set(state_dict) == keys | {"pos_embed", "y_embedder.embedding_table.weight"}
    assert len(state_dict) == num_tensors
    assert sum(tensor.numel() for tensor in state_dict.values()) == num_elements
    assert state_dict["pos_embed"].shape == (1, 256, 1152)
    assert state_dict["y_embedder.embedding_table.weight"].shape == (1001, 1152)
    assert state_dict["blocks.27.adaLN_modulation.1.weight"].shape == (6912, 1152)
    if long_skip is not None:
        assert state_dict["skip_linears.13.linear.weight"].shape == (1152, 2304)


# --- key tables -------------------------------------------------------------------------------------------------------


def test_tables_are_invertible() -> None:
    for table in (OFFICIAL_KEYS, DIFFUSERS_KEYS):
        theirs, ours = zip(*table, strict=True)
        assert len(set(theirs)) == len(set(ours)) == len(table)


def test_innermost_skip_is_the_official_skip_0() -> None:
    model = tiny_dit(LongSkipConfig(), num_layers=6)
    state_dict = to_official(model)
    for skip, unit in enumerate((3, 4, 5)):
        assert torch.equal(state_dict[f"skip_norms.{skip}.bias"], model.blocks[unit].long_skip.norm.bias)
        assert torch.equal(state_dict[f"skip_linears.{skip}.linear.weight"], model.blocks[unit].long_skip.proj.weight)


@settings(max_examples=15)
@given(num_pairs=st.integers(1, 4), has_skips=st.booleans(), learn_sigma=st.booleans())
def test_official_round_trip_is_bit_equal(num_pairs: int, has_skips: bool, learn_sigma: bool) -> None:
    long_skip = LongSkipConfig() if has_skips else None
    model = tiny_dit(long_skip, num_layers=2 * num_pairs, out_channels=8 if learn_sigma else 4)
    official = to_official(model)
    ours = from_official(official)
    torch.testing.assert_close(ours, dict(model.state_dict()), rtol=0, atol=0)
    other = tiny_dit(long_skip, num_layers=2 * num_pairs, out_channels=8 if learn_sigma else 4)
    other.load_state_dict(ours)
    torch.testing.assert_close(to_official(other), official, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"long_skip": LongSkipConfig(fusion="residual")}, "long_skip.fusion"),
        ({"long_skip": LongSkipConfig(norm="rms_norm")}, "long_skip.norm"),
        ({"long_skip": LongSkipConfig(num_pairs=1)}, "long_skip.num_pairs"),
        ({"long_skip": LongSkipConfig(middle_pair=False)}, "middle_pair"),
        ({"long_skip": LongSkipConfig(), "num_layers": 5}, "num_layers"),
        ({"downscale_freq_shift": 1.0}, "downscale_freq_shift"),
        ({"null_class": False}, "null_class"),
        ({"out_channels": 3}, "out_channels"),
    ],
)
def test_official_format_refuses_what_it_cannot_hold(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        to_official(tiny_dit(**options))


def test_plain_model_of_odd_depth_is_official() -> None:
    model = tiny_dit(num_layers=3)
    torch.testing.assert_close(from_official(to_official(model)), dict(model.state_dict()), rtol=0, atol=0)


def test_official_long_skips_need_an_even_depth() -> None:
    state_dict = to_official(tiny_dit(LongSkipConfig()))
    odd = {key: tensor for key, tensor in state_dict.items() if not key.startswith("blocks.3.")}
    with pytest.raises(ValueError, match="even number of blocks, got 3"):
        from_official(odd)


# --- files ------------------------------------------------------------------------------------------------------------


def test_save_official_is_read_back_bit_equal(tmp_path: Path) -> None:
    model = tiny_dit(LongSkipConfig())
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"an older file")
    save_official(model, path)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert_same_weights(model, load_model(path, num_attention_heads=2))


def test_save_official_leaves_the_older_file_where_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"an older file")
    with pytest.raises(ValueError, match="null_class"):
        save_official(tiny_dit(null_class=False), path)
    assert path.read_bytes() == b"an older file"
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        save_official(tiny_dit(), tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save_official(tiny_dit(), tmp_path / "nowhere" / "model.safetensors")
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_plain_pickled_state_dict(suffix: str, tmp_path: Path) -> None:
    model = tiny_dit(LongSkipConfig())
    torch.save(to_official(model), tmp_path / f"model{suffix}")
    assert_same_weights(model, load_model(tmp_path / f"model{suffix}", num_attention_heads=2))


def test_training_checkpoint_gives_the_preferred_weights(tmp_path: Path) -> None:
    model, ema = tiny_dit(LongSkipConfig()), tiny_dit(LongSkipConfig())
    optimizer = torch.optim.AdamW(model.parameters())
    model(*inputs()).sample.sum().backward()
    optimizer.step()
    checkpoint = {
        "model": to_official(model),
        "ema": to_official(ema),
        "opt": optimizer.state_dict(),
        "args": argparse.Namespace(model="DiT-skip", epochs=1400, results_dir="results"),
    }
    path = tmp_path / "0100000.pt"
    torch.save(checkpoint, path)
    assert_same_weights(ema, load_model(path, num_attention_heads=2))
    assert_same_weights(model, load_model(path, num_attention_heads=2, prefer="model"))
    del checkpoint["ema"]
    torch.save(checkpoint, path)
    assert_same_weights(model, load_model(path, num_attention_heads=2))
    with pytest.raises(ValueError, match="prefer must be one of ema, model, got 'opt'"):
        load_model(path, prefer="opt")


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("num_pairs", [1, 2, None])
def test_file_with_our_keys(norm: str, num_pairs: int | None, tmp_path: Path) -> None:
    model = tiny_dit(LongSkipConfig(norm=norm, num_pairs=num_pairs, fusion="residual"), num_layers=5, mlp_ratio=2.5)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors", num_attention_heads=2, sample_size=8, fusion="residual")
    assert_same_weights(model, loaded)
    assert distance(model, loaded) == 0


def test_file_is_not_needed_once_it_is_read(tmp_path: Path) -> None:
    model = tiny_dit()
    path = tmp_path / "model.pt"
    torch.save(to_official(model), path)
    loaded = load_model(path, num_attention_heads=2)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same_weights(model, loaded)


def test_dtype_of_the_loaded_model(tmp_path: Path) -> None:
    model = tiny_dit(LongSkipConfig())
    save_official(model.to(torch.bfloat16), tmp_path / "model.safetensors")
    assert load_model(tmp_path / "model.safetensors", num_attention_heads=2).dtype == torch.float32
    loaded = load_model(tmp_path / "model.safetensors", num_attention_heads=2, dtype=torch.bfloat16)
    assert loaded.dtype == loaded.position_embedding.dtype == torch.bfloat16
    assert_same_weights(model, loaded)


def test_published_sizes_need_no_number_of_heads(tmp_path: Path) -> None:
    path = tmp_path / "small.pt"
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in to_official(DiT.from_preset("DiT-S/8")).items()}
    state_dict = {key: torch.zeros(shape, dtype=torch.float16) for key, shape in shapes.items()}
    state_dict["pos_embed"] = DiT(num_layers=0, patch_size=8, attention_head_dim=24).position_embedding[None]
    torch.save(state_dict, path)
    assert load_model(path).config.num_attention_heads == 6
    assert load_model(path, num_attention_heads=12).config.attention_head_dim == 32


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "num_attention_heads must be given: 4 blocks of width 16"),
        ({"num_attention_heads": 3}, "num_attention_heads must divide the hidden size 16, got 3"),
        ({"num_attention_heads": 0}, "num_attention_heads must divide the hidden size 16, got 0"),
        ({"num_attention_heads": 2, "sample_size": 16}, "sample_size is 8 in this checkpoint, got 16"),
        ({"num_attention_heads": 2, "fusion": "residual"}, "fusion is 'replace' in this checkpoint, got 'residual'"),
    ],
)
def test_official_file_refuses_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(official_file(tmp_path), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fusion": "replace"}, "sample_size must be given"),
        ({"sample_size": 8}, r"fusion must be given \(replace or residual\)"),
        ({"sample_size": 8, "fusion": "sum"}, "fusion must be one of replace, residual, got 'sum'"),
        ({"sample_size": 7, "fusion": "replace"}, "sample_size must be divisible by patch_size 2, got 7"),
    ],
)
def test_our_file_asks_for_what_it_cannot_tell(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_file(tiny_dit(LongSkipConfig()).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "model.safetensors", num_attention_heads=2, **arguments)


def _replace(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda state_dict: state_dict.__setitem__(key, tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.mlp.fc1.bias"), r"1 missing key\(s\): blocks.1.mlp.fc1.bias$"),
        (lambda s: s.pop("x_embedder.proj.weight"), r"1 missing key\(s\): x_embedder.proj.weight$"),
        (lambda s: s.pop("pos_embed"), r"1 missing key\(s\): pos_embed$"),
        (lambda s: s.pop("skip_norms.0.weight"), r"1 missing key\(s\): skip_norms.0.weight$"),
        (
            lambda s: [s.pop(key) for key in list(s) if key.startswith("blocks.2.")],
            r"1 missing key\(s\): blocks\.2\.\*$",
        ),
        (_replace("temp_embed", torch.zeros(2)), r"1 unknown key\(s\): temp_embed$"),
        (_replace("blocks.7.attn.qkv.bias", torch.zeros(2)), r"1 missing key\(s\): blocks\.4\.\*$"),
        (
            _replace("blocks.1.mlp.fc1.bias", torch.zeros(3)),
            r"1 misshapen key\(s\): blocks.1.mlp.fc1.bias \(3,\) instead of \(64,\)",
        ),
        (_replace("x_embedder.proj.weight", torch.zeros(16, 4, 2, 3)), "x_embedder.proj.weight"),
        (_replace("x_embedder.proj.weight", torch.zeros(3)), "x_embedder.proj.weight"),
        (_replace("x_embedder.proj.weight", torch.zeros(16, 4, 0, 0)), "x_embedder.proj.weight"),
        (_replace("final_layer.linear.weight", torch.zeros(31, 16)), "final_layer.linear.weight"),
        (_replace("blocks.0.mlp.fc2.bias", torch.zeros(16, dtype=torch.int8)), "blocks.0.mlp.fc2.bias torch.int8"),
        (_replace("pos_embed", torch.zeros(1, 16, 16)), "pos_embed must be the sine-cosine table"),
        (_replace("pos_embed", torch.zeros(1, 15, 16)), "pos_embed must be .1, a square number, 16., got .1, 15, 16."),
        (_replace("pos_embed", torch.zeros(16, 16)), "pos_embed must be"),
        (_replace("pos_embed", torch.full((1, 16, 16), torch.nan)), "pos_embed must be the sine-cosine table"),
    ],
)
def test_wrong_keys_and_shapes_are_named(
    change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    path = official_file(tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(path, num_attention_heads=2)
    assert str(caught.value).startswith(f"{path}: ")


def test_many_wrong_keys_are_counted_and_the_first_few_named(tmp_path: Path) -> None:
    def rename(state_dict: dict[str, Tensor]) -> None:
        for unit in range(4):
            state_dict[f"blocks.{unit}.gate"] = state_dict.pop(f"blocks.{unit}.mlp.fc1.bias")

    message = (
        "4 missing key(s): blocks.0.mlp.fc1.bias, blocks.1.mlp.fc1.bias, blocks.2.mlp.fc1.bias, ...; "
        "4 unknown key(s): blocks.0.gate, blocks.1.gate, blocks.2.gate, ..."
    )
    with pytest.raises(ValueError, match="missing") as caught:
        load_model(official_file(tmp_path, rename), num_attention_heads=2)
    assert str(caught.value).endswith(message)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_files_are_refused(suffix: str, tmp_path: Path) -> None:
    state_dict = to_official(tiny_dit())
    whole = tmp_path / f"whole{suffix}"
    torch.save(state_dict, whole) if suffix == ".pt" else save_file(state_dict, whole)
    content = whole.read_bytes()
    contents = [b"", b"not a checkpoint\n", *(content[: len(content) * part // 10] for part in range(1, 10))]
    damaged = tmp_path / f"damaged{suffix}"
    for content in contents:
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match=f"damaged{suffix} is not a") as caught:
            load_model(damaged, num_attention_heads=2)
        assert "\n" not in str(caught.value)


def test_archive_with_damaged_records_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(to_official(tiny_dit()), path)
    content = path.read_bytes()
    for start in range(60, 400, 20):
        path.write_bytes(content[:start] + b"\xff" * 20 + content[start + 20 :])
        with pytest.raises(ValueError, match=r"model\.pt is not a readable PyTorch checkpoint"):
            load_model(path, num_attention_heads=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must contain a state dict, got list"),
        ({}, "got nothing"),
        ({"step": 3, "lr": 0.1}, "got step, lr"),
        ({"ema": None}, "or a state dict called model or ema, got ema"),
        ({"unet.conv.weight": torch.zeros(2)}, "neither the official DiT's keys nor ours, but unet.conv.weight"),
    ],
)
def test_foreign_pickles_are_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "foreign.pt")


def test_foreign_safetensors_and_suffixes_are_refused(tmp_path: Path) -> None:
    save_file({"unet.conv.weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"neither the official DiT's keys nor ours, but unet\.conv\.weight"):
        load_model(tmp_path / "foreign.safetensors")
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ValueError, match=r"must end in \.safetensors, \.pt, \.pth, \.bin, \.ckpt, got model\.onnx"):
        load_model(tmp_path / "model.onnx")
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*missing\.pt"):
        load_model(tmp_path / "missing.pt")


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_malicious_pickle_is_refused_and_not_executed(write: Callable[[object, Path], object], tmp_path: Path) -> None:
    path, made = tmp_path / "model.pt", tmp_path / "made"
    write({"ema": to_official(tiny_dit()), "args": Malicious(made)}, path)
    with pytest.raises(ValueError, match=r"model\.pt is not a readable PyTorch checkpoint"):
        load_model(path, num_attention_heads=2)
    assert not made.exists()


def test_refused_pickle_names_what_it_would_call(tmp_path: Path) -> None:
    torch.save({"ema": {}, "args": Malicious(tmp_path / "made")}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"loading it would call \w+\.mkdir$"):
        load_model(tmp_path / "model.pt")


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
def test_own_folder(max_shard_size: str, tmp_path: Path) -> None:
    long_skip = LongSkipConfig(num_pairs=1, norm="rms_norm", fusion="residual")
    model = tiny_dit(long_skip, num_layers=5, downscale_freq_shift=1.0, null_class=False)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").exists() == (max_shard_size == "20KB")
    loaded = load_model(tmp_path, num_attention_heads=2, fusion="residual")
    assert_same_weights(model, loaded)
    assert all(loaded.config[name] == model.config[name] for name in model.config if not name.startswith("_"))
    with pytest.raises(ValueError, match="num_attention_heads is 2 in this checkpoint, got 4"):
        load_model(tmp_path, num_attention_heads=4)


def test_pipeline_folder(tmp_path: Path) -> None:
    model = tiny_dit(LongSkipConfig())
    model.save_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text("{}")
    assert_same_weights(model, load_model(tmp_path))


def test_folder_whose_weights_do_not_fit_its_config_is_refused(tmp_path: Path) -> None:
    tiny_dit(LongSkipConfig()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def load_with(**changes: Any) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        load_model(tmp_path)

    with pytest.raises(ValueError, match=r"unknown key.*blocks.2.long_skip"):
        load_with(long_skip=None)
    with pytest.raises(ValueError, match=r"misshapen key.*class_embedder.weight"):
        load_with(num_classes=6)
    with pytest.raises(ValueError, match=r"the config makes no model: .*depth"):
        load_with(depth=4)
    with pytest.raises(ValueError, match="the config makes no model"):
        load_with(long_skip=True)
    with pytest.raises(ValueError, match=r"_class_name.*DiT, DiTTransformer2DModel.*got 'UNet2DModel'"):
        load_with(_class_name="UNet2DModel")


def test_folders_without_their_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json is not as expected: Expected `object`, got `array`"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "DiT"}')
    with pytest.raises(ValueError, match=r"has none of diffusion_pytorch_model\.safetensors"):
        load_model(tmp_path)
