"""Weights, configs, schedules and specs of strangers: read, or refused in one line; fast, in little memory, alone."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hostile_runs
import hostile_weights as hostile
import pytest
import torch
from safetensors.torch import save

from skipdit.cache.methods import load_schedule, parse_method
from skipdit.checkpoints import load_model
from skipdit.cli import main
from skipdit.loading import load_source
from skipdit.models.dit import DiT


def read_bytes(reader: Callable[[Path], Any], suffix: str, folder: Path, content: bytes) -> Any:
    path = folder / f"hostile{suffix}"
    path.write_bytes(content)
    return reader(path)


def read_files(reader: Callable[[Path], Any], folder: Path, files: hostile.Files) -> Any:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return reader(folder)


def load_file(path: Path) -> Any:
    return load_model(path, num_attention_heads=2)


def load_pipeline(path: Path) -> Any:
    return load_source(str(path), device="cpu")


def lay_bytes(suffix: str, folder: Path, name: str, content: bytes) -> None:
    (folder / f"hostile{suffix}").write_bytes(content)


def lay_files(folder: Path, name: str, files: hostile.Files) -> None:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def lay_spec(folder: Path, name: str, spec: str) -> None:
    (folder / "spec.txt").write_bytes(spec.encode("utf-8", "surrogatepass"))


def read_spec(folder: Path) -> str:
    return str(parse_method((folder / "spec.txt").read_bytes().decode("utf-8", "surrogatepass")))


READERS = {
    "archives": hostile_runs.Reader(
        cases=hostile.archives,
        valid=lambda: [("valid", hostile.archive({"ema": hostile.official()}))],
        lay=partial(lay_bytes, ".pt"),
        read=lambda folder: load_file(folder / "hostile.pt"),
    ),
    "safetensors": hostile_runs.Reader(
        cases=hostile.safetensors,
        valid=lambda: [("valid", save(hostile.official()))],
        lay=partial(lay_bytes, ".safetensors"),
        read=lambda folder: load_file(folder / "hostile.safetensors"),
    ),
    "configs": hostile_runs.Reader(
        cases=hostile.configs,
        valid=lambda: [(name, hostile.family_folder(name)) for name in hostile.FAMILIES],
        lay=lay_files,
        read=load_model,
    ),
    "indices": hostile_runs.Reader(
        cases=hostile.indices,
        valid=lambda: [("valid", hostile.family_folder("DiT"))],
        lay=lay_files,
        read=load_model,
        short=40,
    ),
    "pipelines": hostile_runs.Reader(
        cases=hostile.pipelines,
        valid=lambda: [("valid", hostile.pipeline_folder())],
        lay=lay_files,
        read=load_pipeline,
    ),
    "schedules": hostile_runs.Reader(
        cases=hostile.schedules,
        valid=lambda: [("valid", hostile.schedule_bytes())],
        lay=partial(lay_bytes, ".json"),
        read=lambda folder: str(load_schedule(folder / "hostile.json")),
        short=400,
        times=20,
    ),
    "specs": hostile_runs.Reader(
        cases=hostile.specs,
        valid=lambda: [("valid", "N2-700-50")],
        lay=lay_spec,
        read=read_spec,
        short=1000,
        times=20,
        names=False,
    ),
}


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hostile_runs.Readers]:
    with hostile_runs.Readers("test_hostile_weights", READERS, tmp_path_factory.mktemp("weights")) as readers:
        yield readers


@pytest.mark.timeout(0)
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux says it")
@pytest.mark.parametrize("reader", READERS)
def test_every_file_is_read_or_refused_in_one_line(reader: str, readers: hostile_runs.Readers) -> None:
    assert hostile_runs.run(readers, reader) == []
    assert hostile_runs.ALL_TOTALS[reader].refused > 0


@pytest.mark.parametrize("name", hostile.FAMILIES)
def test_what_configs_are_made_from_is_read(name: str, tmp_path: Path) -> None:
    """So a refusal is for the change."""
    assert type(read_files(load_model, tmp_path, hostile.family_folder(name))).__name__ in (name, "DiT")


def test_what_the_others_are_made_from_is_read(tmp_path: Path) -> None:
    read_bytes(load_file, ".pt", tmp_path, hostile.archive({"ema": hostile.official()}))
    read_bytes(load_schedule, ".json", tmp_path, hostile.schedule_bytes())
    source = read_files(load_pipeline, tmp_path / "pipeline", hostile.pipeline_folder())
    assert list(source.schedules) == ["1.8x"]
    assert source.sampler.pipeline.vae is not None


# --- single cases -----------------------------------------------------------------------------------------------------


def one(builder: Callable[..., Any], name: str) -> Any:
    return next(content for found, content in builder(count=30) if found == name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stride 0", "is larger than its record of 4 bytes"),
        ("many positions", "is larger than its record of 4 bytes"),
        ("2^40 positions", "is larger than its record of 4 bytes"),
        ("one storage, many keys", "bytes, but the file stores"),
        ("deflated pickle", "its records are compressed"),
        ("large pickle", "its data.pkl has more than the 8,388,608 bytes"),
        ("many records", "it has 21,0.. records, at most 20,000"),
        ("many layers", "its keys have 3,000 layers, at most 256"),
        ("sparse", r"would call torch\._utils\._rebuild_sparse_tensor"),
        ("meta", r"would call torch\._utils\._rebuild_meta_tensor_no_storage"),
        ("nested tensor", r"would call torch\._utils\._rebuild_nested_tensor"),
        ("bytearray", r"would call __builtin__\.bytearray"),
        ("print", r"would call __builtin__\.print"),
        ("deep", "nested deeper than 16|must contain"),
        ("escape in a key", r"1 unknown key\(s\): \\x1b\[2J"),
        ("other zip", "it has no data.pkl"),
    ],
)
def test_small_archives_do_not_take_the_machine(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_bytes(load_file, ".pt", tmp_path, one(hostile.archives, name))
    assert len(str(caught.value)) < 1000


def test_a_wide_model_of_one_number_is_refused(tmp_path: Path) -> None:
    """Under our keys every tensor fits every other; loaded, its layers would take 10 GiB."""
    with torch.device("meta"):
        model = DiT(num_layers=2, num_attention_heads=2, attention_head_dim=4096, sample_size=8, patch_size=2)
    content = hostile.archive({key: torch.zeros(()).expand(tensor.shape) for key, tensor in model.state_dict().items()})
    assert len(content) < 10_000
    with pytest.raises(ValueError, match="is larger than its record of 4 bytes"):
        read_bytes(lambda path: load_model(path, num_attention_heads=2, sample_size=8), ".pt", tmp_path, content)


@pytest.mark.parametrize(
    ("records", "change", "message"),
    [
        ("data.pkl", lambda data: b"\x80\x02](K\x00K\x01u.", "damaged"),  # SETITEMS on a list
        ("data/0", lambda data: data[:-4], "2 of its storages have 2,048 bytes, but only 1 of its records do"),
        ("", lambda data: data[:4], "damaged"),  # beyond the end of the file
    ],
)
def test_archives_that_corrupted_memory_are_refused(
    records: str, change: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    """The two patterns of CVE-2026-24747, for which torch has its lower bound."""
    whole = hostile.archive(hostile.official())
    wanted = f"/{records}" if records else "/data/"
    content = hostile.repacked(whole, lambda name, data: change(data) if wanted in name else data)
    with pytest.raises(ValueError, match=rf"hostile\.pt is not a readable PyTorch checkpoint: {message}"):
        read_bytes(load_file, ".pt", tmp_path, content)


def test_a_flipped_bit_is_found_by_its_checksum(tmp_path: Path) -> None:
    whole = hostile.archive(hostile.official())
    place = whole.index(hostile.official()["blocks.1.mlp.fc1.weight"].numpy().tobytes())
    for offset in (0, 100, 5000):
        flipped = bytearray(whole)
        flipped[place + offset] ^= 4
        with pytest.raises(ValueError, match=r"the checksum of its record archive/data/\d+ is wrong"):
            read_bytes(load_file, ".pt", tmp_path, bytes(flipped))


@pytest.mark.parametrize("name", hostile.FAMILIES)
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_layers", 10**9),
        ("num_layers", 3000),
        ("num_layers", 250),
        ("num_layers", "2"),
        ("attention_head_dim", 3000),
        ("num_attention_heads", 10**9),
        ("patch_size", [[1]]),
    ],
)
def test_configs_are_compared_with_the_weights(
    name: str, option: str, value: Any, readers: hostile_runs.Readers
) -> None:
    files = dict(hostile.family_folder(name))
    fields = json.loads(files["config.json"])
    files["config.json"] = json.dumps(fields | {option: value}).encode()
    assert readers.judge("configs", name, files)[0] == "refused"


@pytest.mark.parametrize("name", ["DiT", "Latte", "DiTTransformer2DModel", "PixArtTransformer2DModel"])
@pytest.mark.parametrize("size", [32768, 10**9])
def test_tables_of_positions_are_bounded(name: str, size: int, tmp_path: Path) -> None:
    files = dict(hostile.family_folder(name))
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | {"sample_size": size}).encode()
    with pytest.raises(ValueError, match=r"sample_size or the number of frames is too large|makes no model"):
        read_files(load_model, tmp_path, files)


def test_an_unknown_activation_is_refused(tmp_path: Path) -> None:
    files = dict(hostile.family_folder("LatteTransformer3DModel"))
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | {"activation_fn": "gelo"}).encode()
    with pytest.raises(ValueError, match="the config makes no model"):
        read_files(load_model, tmp_path, files)


@pytest.mark.parametrize(
    "path",
    [
        "model.safetensors",
        "model.pt",
        "model",
        "folder/config.json",
        "folder/diffusion_pytorch_model.safetensors",
        "pipeline/model_index.json",
        "pipeline/schedules/2x.json",
        "pipeline/scheduler/scheduler_config.json",
        "pipeline/vae/config.json",
    ],
)
def test_what_is_no_file_is_not_waited_for(path: str, tmp_path: Path) -> None:
    files = hostile.pipeline_folder()
    read_files(lambda folder: None, tmp_path / "pipeline", files)
    read_files(lambda folder: None, tmp_path / "folder", hostile.family_folder("DiT"))
    (tmp_path / path).unlink(missing_ok=True)
    os.mkfifo(tmp_path / path)
    with pytest.raises((ValueError, OSError), match=r"."):
        load_pipeline(tmp_path / path.split("/")[0])


def test_other_odd_files_of_pipelines(tmp_path: Path) -> None:
    def refusal(name: str, **changes: Any) -> str:
        files = dict(hostile.pipeline_folder())
        files[name] = json.dumps(json.loads(files[name]) | changes).encode()
        with pytest.raises(ValueError, match=r".") as caught:
            read_files(load_pipeline, tmp_path, files)
        return str(caught.value)

    index, scheduler = "model_index.json", "scheduler/scheduler_config.json"
    for name in (["ClassToImagePipeline"], {"name": "ClassToImagePipeline"}, None):
        assert "Expected `str`" in refusal(index, _class_name=name)
    for part in ("vae", "scheduler"):
        assert f"the {part} in" in refusal(index, **{part: []})
    assert "'PNDM' is not a diffusers scheduler" in refusal(index, scheduler=["diffusers", "PNDM"])
    assert "Expected `str`, got `int` - at `$.id2label[...]`" in refusal(index, id2label={"0": "cat", "1": 3})
    assert "must number 10 classes, got 'one'" in refusal(index, id2label={"one": "cat"})
    assert "makes no scheduler" in refusal(scheduler, beta_schedule="cubic")
    assert "Invalid enum value 900 - at `$.steps_offset`" in refusal(scheduler, steps_offset=900)
    assert "trained_betas must be 1000 numbers" in refusal(scheduler, trained_betas=[0.1])
    assert "Expected `float`, got `str` - at `$.trained_betas[0]`" in refusal(scheduler, trained_betas=["a"] * 1000)
    assert "Expected `int` <= 10000 - at `$.num_train_timesteps`" in refusal(scheduler, num_train_timesteps=10**9)
    assert "missing key" in refusal("vae/config.json", block_out_channels=[8, 16])
    assert "layers_per_block must be 0 to 256" in refusal("vae/config.json", layers_per_block=10**9)


@pytest.mark.parametrize("name", [name for name in hostile.pipeline_folder() if name.endswith(".json")])
@pytest.mark.parametrize("content", [b'{"a": ' + b"[" * 1000 + b"]" * 1000 + b"}", b"[" * 10**6])
def test_nesting_is_refused_in_every_file_of_a_pipeline(name: str, content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nested too deeply") as caught:
        read_files(load_pipeline, tmp_path, hostile.pipeline_folder() | {name: content})
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("index", ["safetensors", "bin"])
def test_nesting_is_refused_in_an_index(index: str, tmp_path: Path) -> None:
    files = {"config.json": hostile.family_folder("DiT")["config.json"]}
    files[f"diffusion_pytorch_model.{index}.index.json"] = hostile.DEEP.encode()
    with pytest.raises(ValueError, match=r"index\.json is nested too deeply"):
        read_files(load_model, tmp_path, files)


@pytest.mark.parametrize("content", [[1, 2], {"a": [1]}, 5, None])
def test_a_shard_that_holds_no_state_dict_is_named(content: object, tmp_path: Path) -> None:
    files = {"config.json": hostile.family_folder("DiT")["config.json"], "one.bin": hostile.archive(content)}
    files["diffusion_pytorch_model.bin.index.json"] = b'{"weight_map": {"a": "one.bin"}}'
    with pytest.raises(ValueError, match=r"one\.bin must contain"):
        read_files(load_model, tmp_path, files)


def test_a_schedule_without_end_does_not_hold_up_its_pipeline(tmp_path: Path) -> None:
    """Also where nobody asks for a schedule."""
    files = hostile.pipeline_folder() | {"schedules/3x.json": next(hostile.schedules())[1]}
    with pytest.raises(ValueError, match=r"3x\.json is not a schedule: .* <= 1000"):
        read_files(load_pipeline, tmp_path, files)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"full_steps": [0, 1.9]}, "Expected `int`, got `float`"),
        ({"full_steps": "02"}, "Expected `array"),
        ({"order": True}, "got `bool`"),
        ({"order": 1.9}, "Expected `int`, got `float`"),
        ({"timesteps": [999, 749, 499, None]}, "Expected `float`, got `null`"),
        ({"num_shallow_units": [None]}, "Expected `int`, got `null`"),
        ({"num_shallow_units": [[]]}, "Expected `int`, got `array`"),
        ({"num_shallow_units": ["a"]}, "Expected `int`, got `str`"),
        ({"methd": "skip"}, "unknown field `methd`"),
        ({"made_for": {"model": 1}}, "made_for"),
        ({"parts": []}, "length >= 1"),
        ({"parts": [{"kinds": ["mpl"], "full_steps": [0]}]}, "Invalid enum value 'mpl'"),
        ({"num_inference_steps": 60_000}, "<= 1000"),
    ],
)
def test_schedules_are_read_strictly(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    fields = json.loads(hostile.schedule_bytes()) | changes
    with pytest.raises(ValueError, match=r"hostile\.json is not a schedule: ") as caught:
        read_bytes(load_schedule, ".json", tmp_path, json.dumps(fields).encode())
    assert message in str(caught.value)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "1" + "0" * 400])
@pytest.mark.parametrize("before", ["999, 749", "0, 2"])  # timesteps, full_steps
def test_numbers_without_end_are_refused_in_a_schedule(number: str, before: str, tmp_path: Path) -> None:
    text = hostile.schedule_bytes().decode()
    assert text.count(f"[{before}") == 1
    with pytest.raises(ValueError, match=r"hostile\.json is not a schedule: is not valid JSON: ") as caught:
        read_bytes(load_schedule, ".json", tmp_path, text.replace(f"[{before}", f"[{number}, 2").encode())
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ['{"full_steps": [NaN]}', '{"order": 1, "order": 1}', hostile.DEEP, "5", "[]"])
def test_schedules_that_are_no_json_of_ours(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hostile\.json is not a schedule: "):
        read_bytes(load_schedule, ".json", tmp_path, text.encode())


def test_a_spec_of_many_digits_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 9 digits"):
        parse_method(f"N2-{'9' * 400}-0")
    with pytest.raises(ValueError, match="a cache spec is"):
        parse_method("N\u0662")


def test_the_command_ends_in_one_clean_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(one(hostile.archives, "long key"))
    with pytest.raises(SystemExit) as caught:
        main(["info", str(path), "--num-attention-heads", "2"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert len(said) < 2100


def test_a_long_value_of_a_config_is_cut(tmp_path: Path) -> None:
    files = dict(hostile.family_folder("DiTTransformer2DModel"))
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | {"norm_type": "k" * 5000}).encode()
    with pytest.raises(ValueError, match=r"norm_type to be 'ada_norm_zero', got 'k+…") as caught:
        read_files(load_model, tmp_path, files)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_refusal_names_its_file_once(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        read_bytes(load_file, suffix, tmp_path, b"<html>404 not found</html>")
    assert str(caught.value).startswith(str(tmp_path / f"hostile{suffix}"))
    assert str(caught.value).count("hostile") == 1
