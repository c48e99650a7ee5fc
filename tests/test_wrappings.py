"""Checkpoints as people have them: prefixes, wrappings, names, averages, variants, runs, objectives, autoencoders."""

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import TINY_FAMILIES, tiny_dit, tiny_latte
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import skipdit
from skipdit.checkpoints import load_model, to_official
from skipdit.checkpoints.parts import read_autoencoder
from skipdit.checkpoints.wrappings import pick_weights, strip_prefixes
from skipdit.cli import main
from skipdit.command_options import WeightsOptions
from skipdit.diffusion import Objective, make_scheduler
from skipdit.loading import Source, load_source
from skipdit.models.dit import DiT
from skipdit.pipelines import ClassToImagePipeline, unscale_latents
from skipdit.sampling.config import SampleConfig

Tensors = dict[str, Tensor]
TABLE = "y_embedder.embedding_table.weight"


def official(model: Any) -> Tensors:
    return {key: tensor.clone() for key, tensor in to_official(model).items()}


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(dict(other.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + key: tensor for key, tensor in tensors.items()}


def inside_blocks(wrapper: str, tensors: Tensors) -> Tensors:
    """As the keys are where each block is wrapped."""
    split = ((key, key.split(".")) for key in tensors)
    return {
        ".".join((*parts[:2], wrapper, *parts[2:])) if parts[0] == "blocks" else key: tensors[key]
        for key, parts in split
    }


# --- prefixes and wrappings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda sd: prefixed("_orig_mod.", sd),
        lambda sd: prefixed("module.", sd),
        lambda sd: prefixed("module._orig_mod.", sd),
        lambda sd: prefixed("_orig_mod.module.", sd),
        lambda sd: prefixed("_fsdp_wrapped_module._orig_mod.", inside_blocks("_fsdp_wrapped_module", sd)),
        lambda sd: inside_blocks("_checkpoint_wrapped_module._orig_mod", sd),
        lambda sd: prefixed("model.", sd),
        lambda sd: prefixed("model.diffusion_model.", sd),
        lambda sd: {"state_dict": sd, "epoch": 3},
        lambda sd: {"state_dict": prefixed("model.", sd), "hyper_parameters": {"lr": 1e-4}},
        lambda sd: {"ema_state_dict": sd, "state_dict": prefixed("x.", sd)},
        lambda sd: {"model_ema": prefixed("module.", sd), "optimizer": {}},
        lambda sd: {"module": sd},
        lambda sd: {"ema": {"model": sd}},
        lambda sd: {"model": {"state_dict": sd}},
        lambda sd: {"model": sd, "ema": None},
        lambda sd: {"model": sd, "ema": {}},
        lambda sd: {"model": sd, "ema": {"decay": 0.999, "shadow_params": list(sd.values())}},
        lambda sd: {"state_dict": {**prefixed("net.", {key: -t for key, t in sd.items()}), **prefixed("ema_net.", sd)}},
    ],
)
def test_wrapped_state_dicts_are_found(wrap: Callable[[Tensors], Any], tmp_path: Path) -> None:
    model = tiny_dit(num_layers=2)
    torch.save(wrap(official(model)), tmp_path / "model.pt")
    assert_same_weights(model, load_model(tmp_path / "model.pt", num_attention_heads=2))


def test_the_preferred_of_two_is_taken() -> None:
    one, two = {"a.b": torch.zeros(1)}, {"a.b": torch.ones(1)}
    for both in ({"model": one, "ema": two}, {"state_dict": prefixed("net.", one) | prefixed("ema_net.", two)}):
        assert pick_weights(both, "ema")["a.b"] == 1
        assert pick_weights(both, "model")["a.b"] == 0
    shadow = {"model": one, "ema": {"shadow_params": [torch.ones(1)]}}
    assert pick_weights(shadow, "ema")["a.b"] == 1
    assert pick_weights(shadow, "model")["a.b"] == 0


def test_an_averaged_model_of_torch(tmp_path: Path) -> None:
    model = tiny_dit(num_layers=2)
    torch.save({"ema": AveragedModel(model).state_dict()}, tmp_path / "model.pt")
    told: dict[str, Any] = {"num_attention_heads": 2, "sample_size": 8, "fusion": "replace"}
    assert_same_weights(model, load_model(tmp_path / "model.pt", **told))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"ema": {"shadow_params": [torch.zeros(1)]}}, "its shadow_params have no names"),
        (
            {"model": {"a": torch.zeros(2)}, "ema": {"shadow_params": [torch.zeros(1)]}},
            "do not match, one by one, the 1",
        ),
        ({"model": {"a": torch.zeros(2)}, "state_dict": {"a": torch.zeros(2)}}, "more than one state dict"),
        ({"module.a": torch.zeros(1), "a": torch.zeros(1)}, "two of its keys are equal"),
        ({"net.a": torch.zeros(1), "dit.a": torch.zeros(1)}, "more than one model to choose from: dit, net"),
        ({"model": {"a": 1}}, "must contain tensors"),
    ],
)
def test_what_is_not_told_is_not_guessed(content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pick_weights(content, "model" if "state_dict" in content else "ema")


def test_keys_without_wrappers_stay() -> None:
    keys = {**TINY_FAMILIES["HunyuanDiT2DModel"].build(num_units=2).state_dict(), **official(tiny_dit(num_layers=2))}
    assert list(strip_prefixes(keys)) == list(keys)


@pytest.mark.parametrize("name", ["model", "model.ckpt", "model.0050000", "model.PT", "model.safetensors", "st.pt"])
def test_the_head_of_a_file_says_what_it_is(name: str, tmp_path: Path) -> None:
    model = tiny_dit(num_layers=2)
    path = tmp_path / name
    save_file(official(model), path) if "st" in name or "safe" in name else torch.save({"ema": official(model)}, path)
    assert_same_weights(model, load_model(path, num_attention_heads=2))


def test_an_archive_called_safetensors_is_named(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"is an archive of torch\.save: rename it to end in \.pt"):
        load_model(tmp_path / "model.safetensors")


def test_projectors_are_named_and_dropped_when_asked(tmp_path: Path) -> None:
    model = tiny_dit(num_layers=2)
    torch.save({"ema": official(model) | {"projectors.0.0.weight": torch.zeros(4, 4)}}, tmp_path / "repa.pt")
    with pytest.raises(ValueError, match=r"unknown key\(s\): projectors\.0\.0\.weight: .* drop='projectors'"):
        load_model(tmp_path / "repa.pt", num_attention_heads=2)
    assert_same_weights(model, load_model(tmp_path / "repa.pt", num_attention_heads=2, drop="projectors"))
    with pytest.raises(ValueError, match="has no key of heads to drop"):
        load_model(tmp_path / "repa.pt", num_attention_heads=2, drop=("heads",))


def test_what_lies_beside_the_model_is_named_and_dropped_when_asked(tmp_path: Path) -> None:
    model = tiny_dit(num_layers=2)
    beside = {"loss.logvar": torch.zeros(1), "first_stage_model.conv.weight": torch.zeros(4)}
    content = {"state_dict": prefixed("model.diffusion_model.", official(model)) | beside}
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="drop can remove what is not the model, among first_stage_model, loss, model"):
        load_model(tmp_path / "last.ckpt", num_attention_heads=2)
    loaded = load_model(tmp_path / "last.ckpt", num_attention_heads=2, drop=("loss", "first_stage_model"))
    assert_same_weights(model, loaded)


def test_hunyuan_under_the_keys_of_diffusers(tmp_path: Path) -> None:
    model = TINY_FAMILIES["HunyuanDiT2DModel"].build(num_units=4)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert_same_weights(model, load_model(tmp_path / "model.safetensors"))
    save_file({key: t for key, t in model.state_dict().items() if "to_k." not in key}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"missing key\(s\): blocks\.0\.attn1\.to_k"):
        load_model(tmp_path / "less.safetensors")


# --- class tables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 10, 1000])
@pytest.mark.parametrize("keys", ["official", "ours"])
def test_a_class_table_that_may_have_no_null_row_is_asked_about(num_rows: int, keys: str, tmp_path: Path) -> None:
    model = tiny_dit(num_layers=2, num_classes=num_rows, null_class=False, long_skip=None)
    tensors = official(tiny_dit(num_layers=2, num_classes=num_rows, long_skip=None))
    tensors[TABLE] = tensors[TABLE][:num_rows].clone()
    save_file(tensors if keys == "official" else model.state_dict(), tmp_path / "model.safetensors")
    told: dict[str, Any] = {"num_attention_heads": 2} | ({"sample_size": 8} if keys == "ours" else {})
    with pytest.raises(ValueError, match=rf"num_classes must be given: the class table has {num_rows} row"):
        load_model(tmp_path / "model.safetensors", **told)
    loaded = load_model(tmp_path / "model.safetensors", **told, num_classes=num_rows)
    assert (loaded.config.num_classes, loaded.config.null_class) == (num_rows, False)
    if num_rows > 1:
        loaded = load_model(tmp_path / "model.safetensors", **told, num_classes=num_rows - 1)
        assert (loaded.config.num_classes, loaded.config.null_class) == (num_rows - 1, True)
    with pytest.raises(ValueError, match=rf"num_classes must be {num_rows}, or {num_rows - 1} and a null class"):
        load_model(tmp_path / "model.safetensors", **told, num_classes=num_rows + 3)


def test_num_classes_must_fit_a_folder_and_a_latte(tmp_path: Path) -> None:
    tiny_latte().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_classes is 10 in this checkpoint, got 9"):
        load_model(tmp_path, num_classes=9)
    tensors = official(tiny_latte(num_classes=9))
    save_file(tensors, tmp_path / "ten_rows.safetensors")
    with pytest.raises(ValueError, match="num_classes must be given"):
        load_model(tmp_path / "ten_rows.safetensors", num_attention_heads=2)
    assert not load_model(tmp_path / "ten_rows.safetensors", num_attention_heads=2, num_classes=10).config.null_class


@pytest.mark.parametrize("args", [argparse.Namespace, dict])
@pytest.mark.parametrize(("num_rows", "noted", "num_classes"), [(10, 10, 10), (10, 9, 9), (4, 4, 4), (4, 3, 3)])
def test_a_training_checkpoint_tells_its_classes(
    args: Any, num_rows: int, noted: int, num_classes: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = official(tiny_dit(num_layers=2, num_classes=num_rows - 1))
    torch.save({"ema": tensors, "args": args(num_classes=noted, model="DiT-XL/2")}, tmp_path / "0050000.pt")
    config = load_model(tmp_path / "0050000.pt", num_attention_heads=2).config
    assert (config.num_classes, config.null_class) == (num_classes, num_classes < num_rows)
    other = 2 * num_rows - 1 - noted
    assert load_model(tmp_path / "0050000.pt", num_attention_heads=2, num_classes=other).config.num_classes == other
    assert not caplog.records


@pytest.mark.parametrize("noted", [1000, 0, True, "10", 10.0, None, [10]])
def test_what_does_not_fit_the_class_table_tells_nothing(noted: Any, tmp_path: Path) -> None:
    tensors = official(tiny_dit(num_layers=2, num_classes=9))
    torch.save({"ema": tensors, "args": argparse.Namespace(num_classes=noted)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="num_classes must be given: the class table has 10 row"):
        load_model(tmp_path / "model.pt", num_attention_heads=2)


@pytest.mark.parametrize(("num_classes", "warned"), [(3, True), (37, True), (10, False), (1000, False)])
def test_a_null_row_that_is_a_guess_is_named(
    num_classes: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(official(tiny_dit(num_layers=2, num_classes=num_classes)), tmp_path / "model.safetensors")
    assert load_model(tmp_path / "model.safetensors", num_attention_heads=2).config.num_classes == num_classes
    text = f"the last of the {num_classes + 1} rows of the class table is assumed to mean no class"
    assert [text in record.getMessage() for record in caplog.records] == [True] * warned


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_folders_of_every_kind(safe: bool, max_shard_size: str, variant: str | None, tmp_path: Path) -> None:
    model = tiny_dit(num_layers=2)
    model.save_pretrained(tmp_path, safe_serialization=safe, max_shard_size=max_shard_size, variant=variant)
    assert_same_weights(model, load_model(tmp_path))
    assert_same_weights(model, load_model(tmp_path, variant=variant))
    with pytest.raises(FileNotFoundError, match=r"has neither .*bf16"):
        load_model(tmp_path, variant="bf16")


def test_a_variant_is_asked_for_where_there_are_two(tmp_path: Path) -> None:
    model, other = tiny_dit(num_layers=2), tiny_dit(num_layers=2)
    model.save_pretrained(tmp_path, variant="fp16")
    other.save_pretrained(tmp_path, variant="ema")
    with pytest.raises(ValueError, match="give variant, one of ema, fp16"):
        load_model(tmp_path)
    assert_same_weights(other, load_model(tmp_path, variant="ema"))
    with pytest.raises(ValueError, match="variant applies to a folder, got 'fp16' for a file"):
        load_model(tmp_path / "diffusion_pytorch_model.fp16.safetensors", variant="fp16")


def test_weights_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    model = tiny_dit(num_layers=2)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    save_file(model.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="has weights twice"):
        load_model(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    first, second, *_ = sorted(tmp_path.glob("*-of-*"))
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(ValueError, match="which another of the files also has"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "weight_map", [None, [], {}, 5, {"a": 1}, {"a": ["b"]}, {"a": "../x.safetensors"}, {"a": "/etc/passwd"}, {"a": ""}]
)
def test_odd_indices_are_refused(weight_map: Any, tmp_path: Path) -> None:
    tiny_dit(num_layers=2).save_config(tmp_path)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"is not as expected|which is not a file beside it"):
        load_model(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="is not as expected"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["DiT", "Latte", "PixArtTransformer2DModel"])
def test_folders_of_diffusers_average(name: str, tmp_path: Path) -> None:
    family = TINY_FAMILIES[name]
    model = family.build(num_units=2)
    EMAModel(model.parameters(), model_cls=family.model_class, model_config=model.config).save_pretrained(tmp_path)
    assert "decay" in json.loads((tmp_path / "config.json").read_text())
    assert_same_weights(model, load_model(tmp_path))


def test_half_precision_keeps_what_the_class_keeps(tmp_path: Path) -> None:
    TINY_FAMILIES["WanTransformer3DModel"].build(num_units=2).save_pretrained(tmp_path)
    dtypes = {name: p.dtype for name, p in load_model(tmp_path, dtype=torch.bfloat16).named_parameters()}
    assert dtypes["scale_shift_table"] == torch.float32
    assert dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16


def test_long_skips_are_of_one_variant(tmp_path: Path) -> None:
    model = TINY_FAMILIES["PixArtTransformer2DModel"].build(num_units=2)
    skipdit.add_long_skips(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="have the variant 'long_skip' only, got 'fp16'"):
        load_model(tmp_path, variant="fp16")
    assert isinstance(load_model(tmp_path), PixArtTransformer2DModel)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps of three classes, with checkpoints after two and four."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("cat", "dog", "emu"):
        (folder / "data" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), "red").save(folder / "data" / name / "0.png")
    sizes = {"data.image-size": 16, "model.num-layers": 4, "model.num-attention-heads": 2, "model.patch-size": 4}
    sizes |= {"model.attention-head-dim": 8, "batch-size": 2, "max-steps": 4, "checkpoint-every": 2, "sample-every": 0}
    sizes |= {"release-dtype": "float32", "routing.num-shallow-units": 1}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    source, out = str(folder / "data"), str(folder / "run")
    main(["train", "emoji", "--data.source", source, "--out", out, "--device", "cpu", *options])
    return folder / "run"


def test_a_run_is_sampled_by_its_pipeline_or_its_newest_checkpoint(run: Path, tmp_path: Path) -> None:
    whole = load_source(str(run), device="cpu").sampler.pipeline
    assert whole.labels == {"cat": 0, "dog": 1, "emu": 2}
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("pipeline"))
    (tmp_path / "run" / "checkpoint-best").mkdir()
    (tmp_path / "run" / "checkpoint-0000009-keep").mkdir()
    newest = load_source(str(tmp_path / "run"), device="cpu").sampler.pipeline
    assert_same_weights(whole.transformer, newest.transformer)
    assert type(newest.scheduler) is type(whole.scheduler)
    assert newest.scheduler.config.prediction_type == whole.scheduler.config.prediction_type
    assert newest.transformer.config.num_attention_heads == 2


def test_a_checkpoint_of_a_run_of_nine_classes_is_not_asked_about(run: Path, tmp_path: Path) -> None:
    """Ten rows: of a stranger's file nobody knows whether the last means no class."""
    copy = tmp_path / "checkpoint-0000002"
    shutil.copytree(run / "checkpoint-0000002", copy, ignore=shutil.ignore_patterns("skipdit.json"))
    for kind in ("ema", "model"):
        weights = load_file(copy / f"{kind}.safetensors")
        save_file(weights | {"class_embedder.weight": torch.randn(10, 16)}, copy / f"{kind}.safetensors")
    state = json.loads((copy / "state.json").read_text())
    state["data"]["class_names"] = [f"class {number}" for number in range(9)]
    (copy / "state.json").write_text(json.dumps(state))
    config = load_source(str(copy), device="cpu").sampler.pipeline.transformer.config
    assert (config.num_classes, config.null_class) == (9, True)
    with pytest.raises(ValueError, match="num_classes is 9 in this checkpoint, got 10"):
        load_model(copy, num_classes=10)
    for data, problem in (({}, "num_classes must be given"), ([], "not as expected"), ({"class_names": 9}, "not as")):
        (copy / "state.json").write_text(json.dumps(state | {"data": data}))
        with pytest.raises(ValueError, match=problem):
            load_model(copy)


def test_a_checkpoint_of_a_run_is_built_from_its_own_config(run: Path, tmp_path: Path) -> None:
    place = run / "checkpoint-0000002"
    averages, weights = load_model(place), load_model(place, prefer="model")
    torch.testing.assert_close(dict(averages.named_parameters()), load_file(place / "ema.safetensors"), rtol=0, atol=0)
    torch.testing.assert_close(dict(weights.named_parameters()), load_file(place / "model.safetensors"), rtol=0, atol=0)
    with pytest.raises(ValueError, match="num_attention_heads is 2 in this checkpoint, got 4"):
        load_model(place, num_attention_heads=4)
    with pytest.raises(ValueError, match=r"num_attention_heads is only for a file of bare weights"):
        load_source(str(place), weights=WeightsOptions(num_attention_heads=2), device="cpu")
    copy = tmp_path / "checkpoint-0000002"
    shutil.copytree(place, copy)
    for state in ("[]", "5", "{}", '{"config": null}', '{"config": {"model": {}, "data": {}}}', "{" * 2000):
        (copy / "state.json").write_text(state)
        with pytest.raises(ValueError, match=r"state\.json|does not say its run's objective"):
            load_source(str(copy), device="cpu")
        with pytest.raises(ValueError, match=r"state\.json"):
            load_model(copy)
    fields = json.loads((place / "state.json").read_text())
    (copy / "state.json").write_text(json.dumps(fields | {"config": fields["config"] | {"objective": {"process": []}}}))
    with pytest.raises(ValueError, match="does not say its run's objective"):
        load_source(str(copy), device="cpu")


def test_a_damaged_checkpoint_of_a_run_is_not_sampled(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoint-0000002", tmp_path / "checkpoint-0000002")
    weights = tmp_path / "checkpoint-0000002" / "ema.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"ema\.safetensors has changed since its run wrote it"):
        load_source(str(weights.parent), device="cpu")


@pytest.mark.parametrize("name", ["HunyuanDiT2DModel", "LatteTransformer3DModel", "Latte"])
def test_checkpoints_of_the_other_tasks(name: str, tmp_path: Path) -> None:
    model, long_skip = TINY_FAMILIES[name].build(num_units=4), None
    if name == "LatteTransformer3DModel":
        skipdit.add_long_skips(model, skipdit.LongSkipConfig(fusion="residual"))
        long_skip = {"fusion": "residual"}
    settings = {
        "model": {"num_attention_heads": 2, "long_skip": long_skip},
        "data": {"image_size": 8} | ({} if name == "HunyuanDiT2DModel" else {"num_frames": 3}),
    }
    (tmp_path / "state.json").write_text(json.dumps({"step": 1, "ema_step": 1, "config": settings}))
    save_file(dict(model.named_parameters()), tmp_path / "ema.safetensors")
    told: dict[str, Any] = {"num_classes": 10} if name == "Latte" else {}
    assert_same_weights(model, load_model(tmp_path, **told))


# --- objectives -------------------------------------------------------------------------------------------------------


def open_bare(path: Path, objective: Any, **options: Any) -> Source:
    weights = WeightsOptions(num_attention_heads=2, objective=objective)
    return load_source(str(path), weights=weights, decodes=False, device="cpu", **options)


@pytest.mark.parametrize(("name", "sign", "time_of"), [("sit", -1, lambda s: 1 - s), ("repa", 1, lambda s: s)])
def test_sit_is_sampled_as_it_was_trained(
    name: Any, sign: int, time_of: Callable[[float], float], tmp_path: Path
) -> None:
    model = tiny_dit(num_layers=2, long_skip=None)
    torch.save({"ema": official(model)}, tmp_path / "sit.pt")
    pipeline = open_bare(tmp_path / "sit.pt", name).sampler.pipeline
    assert pipeline.scheduler.config.use_flow_sigmas
    assert pipeline.scheduler.config.prediction_type == "flow_prediction"
    latents, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    for share_of_noise in (0.9, 0.25, 0.0):
        theirs = model(latents, torch.tensor(time_of(share_of_noise)), class_labels=labels).sample
        ours = pipeline.transformer(latents, torch.tensor(1000 * share_of_noise), class_labels=labels).sample
        torch.testing.assert_close(ours, sign * theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="the official format needs time_scale"):
        to_official(pipeline.transformer)
    pipeline.transformer.save_pretrained(tmp_path / "saved")
    assert load_model(tmp_path / "saved").time_scale == pipeline.transformer.config.time_scale


def test_the_objective_of_a_bare_file(tmp_path: Path) -> None:
    tensors = official(tiny_dit(num_layers=2, out_channels=4))
    torch.save({"ema": tensors}, tmp_path / "plain.pt")  # learn_sigma=False
    with pytest.raises(ValueError, match="does not say what its model predicts: give objective, one of epsilon, "):
        open_bare(tmp_path / "plain.pt", None)
    for name, prediction in (("epsilon", "epsilon"), ("v_prediction", "v_prediction"), ("flow", "flow_prediction")):
        pipeline = open_bare(tmp_path / "plain.pt", name).sampler.pipeline
        assert pipeline.scheduler.config.prediction_type == prediction
        generator = torch.Generator().manual_seed(0)
        output = pipeline([1], num_inference_steps=2, generator=generator, output_type="latent", guidance_scale=2.0)
        assert output.images.isfinite().all()
    with pytest.raises(ValueError, match="objective is only for a file of bare weights, got it for emoji"):
        load_source("emoji", weights=WeightsOptions(objective="flow"))
    with pytest.raises(ValueError, match="objective must be one of epsilon"):
        WeightsOptions(objective="noise")  # pyright: ignore[reportArgumentType]


def test_a_learned_variance_does_not_make_a_flow_an_epsilon(tmp_path: Path) -> None:
    torch.save({"ema": official(tiny_dit(num_layers=2))}, tmp_path / "sit.pt")
    pipeline = open_bare(tmp_path / "sit.pt", "flow", scheduler="dpm").sampler.pipeline
    assert pipeline.scheduler.config.prediction_type == "flow_prediction"
    assert pipeline.scheduler.config.solver_order == 2


def test_convert_writes_a_pipeline_where_the_objective_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = official(tiny_dit(num_layers=2, num_classes=9)) | {"projectors.0.weight": torch.zeros(1)}
    torch.save({"ema": tensors}, tmp_path / "sit.pt")
    told = ["--num-attention-heads", "2", "--num-classes", "10", "--drop", "projectors", "--objective", "sit"]
    main(["convert", str(tmp_path / "sit.pt"), "--to", "skipdit", "--out", str(tmp_path / "sit"), *told])
    pipeline = load_source(str(tmp_path / "sit"), device="cpu", decodes=False).sampler.pipeline
    assert (pipeline.transformer.time_scale, pipeline.transformer.config.null_class) == (-1e-3, False)
    assert pipeline.scheduler.config.use_flow_sigmas
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "sit.pt"), "--to", "official", "--out", str(tmp_path / "x.safetensors"), *told])
    assert "--objective needs --to skipdit" in capsys.readouterr().err


def test_options_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="fewer_steps needs a cached run to compare with, got 5 with cache none"):
        SampleConfig(cache="none", fewer_steps=5)


# --- autoencoders -----------------------------------------------------------------------------------------------------

VAE: dict[str, Any] = {
    "latent_channels": 4,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}


def save_vae(folder: Path, kind: str) -> AutoencoderKL:
    vae = AutoencoderKL(**VAE)
    if kind == "pipeline":
        vae.save_pretrained(folder / "vae")
        (folder / "model_index.json").write_text('{"_class_name": "X"}')
    elif kind == "old names":
        vae.save_pretrained(folder)
        old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
        tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
        for new, name in old.items():
            tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
        assert any(".query." in key for key in tensors)
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    else:
        vae.save_pretrained(folder, safe_serialization=kind != "bin", variant="fp16" if kind == "variant" else None)
    return vae


@pytest.mark.parametrize("kind", ["plain", "bin", "variant", "pipeline", "old names"])
def test_autoencoders_are_read(kind: str, tmp_path: Path) -> None:
    assert_same_weights(save_vae(tmp_path, kind), read_autoencoder(tmp_path, torch.float32))


def test_autoencoders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_vae(tmp_path, "plain")
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderDC"}')
    with pytest.raises(ValueError, match=r"must contain one of AutoencoderKL, .*, got AutoencoderDC"):
        read_autoencoder(tmp_path, torch.float32)
    save_vae(tmp_path, "plain")
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"missing key\(s\)"):
        read_autoencoder(tmp_path, torch.float32)
    with pytest.raises(FileNotFoundError, match="no autoencoder folder"):
        read_autoencoder(tmp_path / "config.json", torch.float32)


@pytest.mark.parametrize(
    "options",
    [
        {"scaling_factor": 0.36, "shift_factor": 0.6},
        {"scaling_factor": 0.5, "latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [2.0, 2.0, 4.0, 4.0]},
    ],
)
def test_latents_are_shifted_as_the_autoencoder_says(options: dict[str, Any]) -> None:
    vae = AutoencoderKL(**VAE, **options).eval()
    latents = torch.randn(2, 4, 4, 4)
    column = (1, 4, 1, 1)
    mean = torch.tensor(options.get("latents_mean", [0.0] * 4)).view(column)
    std = torch.tensor(options.get("latents_std", [1.0] * 4)).view(column)
    expected = latents * std / options["scaling_factor"] + mean + options.get("shift_factor", 0)
    torch.testing.assert_close(unscale_latents(latents, vae.config), expected)
    pipeline = ClassToImagePipeline(tiny_dit(num_layers=2), make_scheduler(Objective(), "ddim"), vae)
    with torch.no_grad():
        torch.testing.assert_close(pipeline._decode(latents), vae.decode(expected).sample)
    plain = AutoencoderKL(**VAE)
    assert torch.equal(unscale_latents(latents, plain.config), latents / plain.config.scaling_factor)


# --- prompts and hashes -----------------------------------------------------------------------------------------------


def test_a_prompt_that_is_not_utf8_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(SystemExit) as caught:
        main(["sample", "--task", "text-to-image", "--prompt", os.fsdecode(b"caf\xe9"), "--out", str(tmp_path)])
    assert caught.value.code == 2
    assert "the prompt 'caf\\\\udce9' is not valid Unicode" in capsys.readouterr().err


def test_a_file_with_another_hash_is_refused(tmp_path: Path) -> None:
    from skipdit.files.untrusted import check_hash

    (tmp_path / "weights.bin").write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"weights\.bin is not the file that skipdit was tested with: its SHA-256 is"):
        check_hash(tmp_path / "weights.bin", "0" * 64)


def test_our_dit_has_the_official_time_by_default() -> None:
    assert DiT(num_layers=0, attention_head_dim=4).time_scale == 1
