"""Latents first: encoded once, read back as they were, trained on, sampled; whatever is damaged is refused."""

import json
import multiprocessing
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import assert_same_run, make_config, names, read_log

from skipdit.checkpoints.parts import read_autoencoder
from skipdit.cli import main
from skipdit.data.latents import INFO, LabelledLatents, LatentConfig, open_latents, scale_latents
from skipdit.data.picture_files import adm_crop
from skipdit.data.pictures import Draws
from skipdit.diffusion import Objective, ddpm_tables
from skipdit.encoding.config import EncodeConfig
from skipdit.encoding.encode import encode, encode_pixels
from skipdit.files.output import output_folder
from skipdit.pipelines import unscale_latents
from skipdit.tasks.class_to_image import ModelConfig
from skipdit.training import TrainConfig, train

DOWN, UP = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
MAKERS: dict[str, Callable[[], Any]] = {
    "kl": lambda: AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=DOWN,
        up_block_types=UP,
        shift_factor=0.25,
    ),
    "tiny": lambda: AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        shift_factor=0.5,
        scaling_factor=2.0,
    ),
    "temporal": lambda: AutoencoderKLTemporalDecoder(block_out_channels=(32, 32), down_block_types=DOWN),
}
TINY = ModelConfig(num_layers=4, num_attention_heads=2, attention_head_dim=16, patch_size=2)


def make_vae(folder: Path, kind: str = "kl") -> Path:
    torch.manual_seed(0)
    MAKERS[kind]().save_pretrained(folder)
    return folder


def make_pictures(folder: Path, count: int = 5) -> Path:
    """Noise of several shapes, in two classes."""
    generator = np.random.default_rng(0)
    for label, name in enumerate(("ant", "bee")):
        (folder / name).mkdir(parents=True)
        for index in range(count + label):
            pixels = generator.integers(0, 255, (20 + 9 * index, 40 - 3 * index, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def encode_into(out: Path, device: str = "cpu", **options: Any) -> LabelledLatents:
    with output_folder(out, "latents") as folder:
        encode(EncodeConfig(**options), folder, device=device)
    return open_latents(LatentConfig(source=str(out)))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, `vae`, and `latents` of them in three shards, mirrored too."""
    root = tmp_path_factory.mktemp("encoded")
    options = {"source": str(make_pictures(root / "data")), "vae": str(make_vae(root / "vae"))}
    encode_into(root / "latents", **options, image_size=16, flip=True, shard_size=4)
    return root


# --- what is stored -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_latents_are_those_of_the_pictures(kind: str, dtype: str, tmp_path: Path) -> None:
    data, vae = make_pictures(tmp_path / "data"), make_vae(tmp_path / "vae", kind)
    items = encode_into(
        tmp_path / "latents", source=str(data), vae=str(vae), image_size=16, flip=True, shard_size=4, dtype=dtype
    )
    assert (len(items), items.size, items.num_channels, items.num_frames) == (11, 8, 4, None)
    assert items.labels == [0] * 5 + [1] * 6
    assert items.label_names == ["ant", "bee"]
    assert items.captions == [("ant",)] * 5 + [("bee",)] * 6
    model = read_autoencoder(vae, torch.float32)
    paths = sorted(data.glob("*/*.png"))
    for index in (0, 4, 10):
        stored, label = items[index]
        assert label == items.labels[index]
        pixels = torch.from_numpy(np.array(adm_crop(Image.open(paths[index]), 16))).permute(2, 0, 1)[None]
        for variant, each in enumerate((pixels, pixels.flip(-1))):
            expected = encode_pixels(model, each, 1)
            parts = [expected.mean] if expected.std is None else [expected.mean, expected.std]
            tolerance = 1e-6 if dtype == "float32" else 2e-3
            torch.testing.assert_close(stored[variant].float(), torch.cat(parts), atol=tolerance, rtol=tolerance)
    assert not torch.equal(items[0][0][0], items[0][0][1])
    # the copy in the folder decodes what training on latents ends with
    scaled = items.draw(items[3][0][None], False, Draws(torch.Generator().manual_seed(0), 1))
    assert items.vae is items.vae
    back = unscale_latents(scaled, items.vae.config)
    mean, std = items[3][0][0].float().unbind() if items.info["has_std"] else (items[3][0][0, 0].float(), 0)
    generator = torch.Generator().manual_seed(0)
    torch.rand(1, generator=generator)  # whether it is mirrored
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    torch.testing.assert_close(back, mean + std * noise, atol=1e-5, rtol=1e-5)


def test_scaling_is_what_the_pipeline_undoes() -> None:
    latents = torch.randn(2, 3, 4, 5, 5)
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(4,),
        norm_num_groups=4,
        scaling_factor=0.3,
        shift_factor=0.1,
        latents_mean=[1.0, 2, 3, 4],
        latents_std=[1.0, 2, 1, 4],
    )
    scale: Any = {name: vae.config[name] for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")}
    scaled = scale_latents(latents, scale)
    torch.testing.assert_close(unscale_latents(scaled.flatten(0, 1), vae.config), latents.flatten(0, 1))


def test_scaling_copies_the_statistics_to_a_device_once() -> None:
    """A copy of a list would wait for the device in every step."""
    scale: Any = {"scaling_factor": 1.0, "shift_factor": 0.0, "latents_mean": [1.5, 2.5], "latents_std": [3.5, 4.5]}
    names: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    latents = torch.randn(2, 2, 3, 3)
    first = scale_latents(latents, scale)
    with Names():
        again = scale_latents(latents, scale)
    assert torch.equal(again, first)
    assert set(names) == {"aten::sub.Tensor", "aten::mul.Tensor", "aten::div.Tensor"}


def test_half_of_a_batch_is_mirrored(encoded: Path) -> None:
    items = open_latents(LatentConfig(source=str(encoded / "latents")))
    stored = torch.stack([items[0][0]] * 64)
    stored[:, :, 1] = 0  # no noise
    drawn = items.draw(stored, True, Draws(torch.Generator().manual_seed(0), 64))
    kinds = [torch.equal(each, drawn[0]) for each in drawn]
    assert 16 < sum(kinds) < 48
    assert len({each.numpy().tobytes() for each in drawn}) == 2
    assert len({each.numpy().tobytes() for each in items.draw(stored, False, Draws(torch.Generator(), 64))}) == 1


def test_imagenet_is_cut_as_adm_cuts_it() -> None:
    """Against its three lines, on shapes with odd sides, and one that is enlarged."""
    generator = np.random.default_rng(0)
    for height, width in ((100, 71), (33, 64), (16, 16), (9, 14), (257, 400)):
        picture = Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8))
        expected = picture
        while min(expected.size) >= 32:
            expected = expected.resize((expected.width // 2, expected.height // 2), Image.Resampling.BOX)
        scale = 16 / min(expected.size)
        expected = expected.resize([round(side * scale) for side in expected.size], Image.Resampling.BICUBIC)
        pixels = np.array(expected)
        top, left = (pixels.shape[0] - 16) // 2, (pixels.shape[1] - 16) // 2
        assert np.array_equal(np.array(adm_crop(picture, 16)), pixels[top : top + 16, left : left + 16])
    with pytest.raises(ValueError, match=r"it has 60\d+ x 1024 pixels|it has \d+ x 1024 pixels"):
        adm_crop(Image.new("RGB", (60_000, 1)), 1024)


# --- stopped and started again ------------------------------------------------------------------------------------


def _encode_and_exit(config: EncodeConfig, out: Path) -> None:
    with output_folder(out, "latents") as folder:
        encode(config, folder, device="cpu")


def test_a_killed_encoding_goes_on_to_the_same_folder(encoded: Path, tmp_path: Path) -> None:
    config = EncodeConfig(
        source=str(encoded / "data"), vae=str(encoded / "vae"), image_size=16, flip=True, shard_size=1, num_workers=2
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _encode_and_exit(config, whole)
    context, chance, stops = multiprocessing.get_context("fork"), random.Random(0), 0
    for _ in range(30):
        process = context.Process(target=_encode_and_exit, args=(config, killed))
        process.start()
        before, target = len(list(killed.glob("shard-*.safetensors"))), chance.choice((0, 1))
        while process.is_alive() and len(list(killed.glob("shard-*.safetensors"))) - before < target:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.01)
        process.kill()
        process.join()
        stops += process.exitcode == -signal.SIGKILL
        if (killed / INFO).exists():
            break
    _encode_and_exit(config, killed)
    assert stops >= 3
    killed_files = contents(killed)
    killed_files.pop(".skipdit.lock", None)
    assert killed_files == contents(whole)
    stamp = (killed / "shard-00000.safetensors").stat().st_mtime_ns
    _encode_and_exit(config, killed)  # finished: nothing is done again
    assert (killed / "shard-00000.safetensors").stat().st_mtime_ns == stamp


def test_an_encoding_goes_on_with_the_same_settings_only(encoded: Path, tmp_path: Path) -> None:
    out = shutil.copytree(encoded / "latents", tmp_path / "latents")
    same: dict[str, Any] = {"source": str(encoded / "data"), "vae": str(encoded / "vae"), "image_size": 16}
    same |= {"flip": True, "shard_size": 4}
    encode_into(out, **same, batch_size=3, num_workers=0)
    with pytest.raises(ValueError, match=r"contains latents of other settings \(flip\): give another --out"):
        encode_into(out, **same | {"flip": False})
    other = make_vae(tmp_path / "vae", "tiny")
    with pytest.raises(ValueError, match=r"other settings \(vae\)"):
        encode_into(out, **same | {"vae": str(other)})
    moved = shutil.copytree(encoded / "vae", tmp_path / "moved")
    encode_into(out, **same | {"vae": str(moved)})


def test_other_data_in_the_same_folder_is_refused(encoded: Path, tmp_path: Path) -> None:
    data, out = shutil.copytree(encoded / "data", tmp_path / "data"), tmp_path / "latents"
    options: dict[str, Any] = {"source": str(data), "vae": str(encoded / "vae"), "image_size": 16}
    encode_into(out, **options)
    (data / "bee" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"other settings \(source\)"):
        encode_into(out, **options)


@pytest.mark.parametrize("streaming", [False, True])
def test_replaced_pictures_are_other_data_and_a_moved_folder_is_not(
    streaming: bool, encoded: Path, tmp_path: Path
) -> None:
    data, out = shutil.copytree(encoded / "data", tmp_path / "data"), tmp_path / "latents"
    options: dict[str, Any] = {"vae": str(encoded / "vae"), "image_size": 16, "streaming": streaming}
    source, replaced = data, (data / "ant" / "1.png").read_bytes()
    if streaming:
        pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        source = data / "rows.parquet"
        picture = (data / "ant" / "0.png").read_bytes()
        pq.write_table(pa.table({"image": [picture], "label": ["ant"]}), source)
    items = encode_into(out, source=str(source), **options)
    same = encode_into(out, source=str(data / ".." / source.relative_to(tmp_path)), **options)
    assert same.content == items.content
    moved = data.rename(tmp_path / "moved")
    encode_into(out, source=str(moved / source.relative_to(data)), **options)
    path = moved / ("rows.parquet" if streaming else "ant/0.png")
    if streaming:
        pq.write_table(pa.table({"image": [replaced], "label": ["ant"]}), path)
    else:
        path.write_bytes(replaced)
    with pytest.raises(ValueError, match=r"other settings \(source\)"):
        encode_into(out, source=str(moved / source.relative_to(data)), **options)


def test_one_run_at_a_time_and_files_of_others_stay(encoded: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"source": str(encoded / "data"), "vae": str(encoded / "vae"), "image_size": 16}
    (tmp_path / "shard-00000.safetensors").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"contains shard-00000\.safetensors, which an earlier"):
        encode_into(tmp_path, **options)
    assert names(tmp_path) == ["shard-00000.safetensors"]


def test_broken_pictures_are_named_or_left_out(encoded: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a folder, a table and a stream."""
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    data = shutil.copytree(encoded / "data", tmp_path / "data")
    paths = sorted(data.glob("*/*.png"))
    paths[3].write_bytes(paths[3].read_bytes()[:60])
    contents = [path.read_bytes() for path in paths]
    pq.write_table(pa.table({"image": contents, "label": [0] * 5 + [1] * 6}), tmp_path / "pictures.parquet")
    options: dict[str, Any] = {"vae": str(encoded / "vae"), "image_size": 16}
    options |= {"num_workers": 2, "shard_size": 2}
    table = str(tmp_path / "pictures.parquet")
    for way in ({"source": str(data)}, {"source": table}, {"source": table, "streaming": True}):
        name, out = "ant/3.png" if way["source"] != table else "3 of ", tmp_path / str(len(str(way)))
        with pytest.raises(ValueError, match=f"cannot read the picture .*{name}"):
            encode_into(out, **options, **way)
        assert not (out / INFO).exists()
        items = encode_into(tmp_path / f"{out.name} skips", **options, **way, on_broken="skip")
        assert items.labels == [0] * 4 + [1] * 6
        assert re.search(f"left out: cannot read the picture .*{name}", caplog.text)
        caplog.clear()


# --- reading what is damaged --------------------------------------------------------------------------------------


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def _other_tensors(path: Path) -> None:
    save_file({"mean": torch.zeros(4, 2, 4, 8, 8)}, path)


def _edit(change: Callable[[Any], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")

    return edit


SHARD = "shard-00001.safetensors"
DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "bit": (SHARD, _flip_bit, r"shard-00001.safetensors is damaged: its SHA-256 is not the one in latents.json"),
    "cut": (SHARD, _cut, r"shard-00001.safetensors is damaged"),
    "gone": (SHARD, Path.unlink, r"shard-00001.safetensors is damaged"),
    "texts": ("shard-00000.json", _edit(lambda each: each["classes"].pop()), "shard-00000.json is damaged"),
    "vae": ("vae/diffusion_pytorch_model.safetensors", _flip_bit, "vae/diffusion.* is damaged"),
    "unfinished": (INFO, Path.unlink, "are not finished: run the same skipdit latents again"),
    "version": (INFO, _edit(lambda each: each.update(version=2)), "it has version 2, not 1"),
    "shape": (INFO, _edit(lambda each: each.update(shape=[4, 2**40, 8])), "it has the shape"),
    "flat": (INFO, _edit(lambda each: each.update(shape=[])), "it has the shape"),
    "path": (INFO, _edit(lambda each: each["shards"][0].update(name="../x")), "it has other names of shards"),
    "others": (INFO, _edit(lambda each: each["others"].update({"../x": ""})), "it has other files"),
    "scale": (INFO, _edit(lambda each: each["scale"].update(latents_mean=[1.0])), "it has scales of other channels"),
    "type": (INFO, _edit(lambda each: each.update(flipped="yes")), "latents.json is not as expected"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_in_one_line(damage: str, encoded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(encoded / "latents", tmp_path / "latents")
    name, act, message = DAMAGES[damage]
    act(folder / name)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        open_latents(LatentConfig(source=str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "act", "message"),
    [
        (SHARD, _cut, "shard-00001.safetensors is not a complete safetensors file"),
        (SHARD, _other_tensors, "shard-00001.safetensors does not have the tensors that latents.json describes"),
        ("shard-00000.json", _edit(lambda each: each["classes"].pop()), "shard-00000.json does not have 4"),
        ("shard-00000.json", _edit(lambda each: each.update(captions=[[]] * 4)), "shard-00000.json does not have 4"),
        ("shard-00000.json", _edit(lambda each: each.update(classes=["cow"] * 4)), "has no class cow"),
    ],
)
def test_what_does_not_fit_is_refused_without_checksums(
    name: str, act: Callable[[Path], object], message: str, encoded: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(encoded / "latents", tmp_path / "latents")
    act(folder / name)
    with pytest.raises(ValueError, match=message):
        open_latents(LatentConfig(source=str(folder), verify=False))


def test_damaged_bytes_never_end_in_another_error(encoded: Path, tmp_path: Path) -> None:
    """Without checksums: bytes of headers and JSON are changed, cut or doubled."""
    folder, chance = shutil.copytree(encoded / "latents", tmp_path / "latents"), random.Random(0)
    targets = [INFO, "shard-00000.json", "shard-00000.safetensors", "vae/config.json"]
    refused: list[str] = []
    for _ in range(300):
        path = folder / chance.choice(targets)
        whole = path.read_bytes()
        content = bytearray(whole)
        for _ in range(chance.choice((1, 1, 4))):
            place = chance.randrange(min(len(content), 400))
            match chance.randrange(4):
                case 0:
                    content[place] = chance.randrange(256)
                case 1:
                    del content[place : place + chance.randrange(1, 9)]
                case 2:
                    content[place:place] = content[place : place + 5]
                case _:
                    content[place] = chance.choice(b'0123456789-[]{}",:e')
        path.write_bytes(content)
        try:
            items = open_latents(LatentConfig(source=str(folder), verify=False))
            items.draw(items[0][0][None], False, Draws(torch.Generator(), 1))
            _ = items.vae
        except (ValueError, OSError) as error:
            refused.append(str(error))
        path.write_bytes(whole)
    assert len(refused) > 100
    assert [message for message in refused if "\n" in message] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_size": 32}, "has sample_size 8, not 32: set data.sample_size to 8"),
        ({"num_channels": 16}, "has num_channels 4, not 16"),
        ({"num_classes": 1000}, "has num_classes 2, not 1000"),
        ({"num_frames": 16}, "has num_frames None, not 16"),
        ({"num_pictures": 1}, "num_pictures needs latents of clips"),
        ({"source": "nowhere"}, "the latents in nowhere are missing"),
    ],
)
def test_other_latents_than_a_recipe_expects_are_refused(options: dict[str, Any], message: str, encoded: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_latents(LatentConfig(**{"source": str(encoded / "latents")} | options))


# --- training -----------------------------------------------------------------------------------------------------


def latent_config(folder: Path, **options: Any) -> TrainConfig:
    settings: dict[str, Any] = {"data": LatentConfig(source=str(folder)), "model": TINY, "flip": True}
    return replace(make_config(folder), **settings | {"batch_size": 4, "max_steps": 4, "checkpoint_every": 2} | options)


def test_a_model_of_latents_is_trained_resumed_and_sampled(encoded: Path, tmp_path: Path) -> None:
    config = latent_config(encoded / "latents", sample_every=4)
    train(config, tmp_path / "whole", device="cpu")
    train(replace(config, max_steps=2), tmp_path / "parts", device="cpu")
    # max_steps shapes the cosine
    constant = replace(config, rate_schedule="constant")
    train(constant, tmp_path / "one", device="cpu")
    train(replace(constant, max_steps=2, sample_every=0), tmp_path / "two", device="cpu")
    train(replace(constant, num_workers=2), tmp_path / "two", device="cpu")
    assert_same_run(tmp_path / "one", tmp_path / "two")

    pipeline = tmp_path / "whole" / "pipeline"
    assert names(pipeline) == ["model_index.json", "scheduler", "skipdit.json", "transformer", "vae"]
    weights = load_file(pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
    assert weights["patch_embed.proj.weight"].shape[1] == 4
    with Image.open(tmp_path / "whole" / "samples" / "step-0000004.png") as grid:
        assert grid.width > 2 * 16 * 2
    out = tmp_path / "out"
    main(
        [
            "sample",
            "--model",
            str(tmp_path / "whole"),
            "--labels",
            "bee",
            "--out",
            str(out),
            "--cache",
            "none",
            "--device",
            "cpu",
        ]
    )
    with Image.open(next(out.glob("full*.png"))) as picture:
        assert picture.width >= 16


def test_settings_that_only_check_the_latents_may_change_and_paths_be_written_otherwise(
    encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(latent_config(encoded / "latents", max_steps=1), Path("first"), device="cpu")
    shutil.copytree("first/pipeline", "other")
    config = latent_config(encoded / "latents", max_steps=2, start_from="first/pipeline", rate_schedule="constant")
    train(config, Path("run"), device="cpu")
    checked = replace(config.data, verify=False, num_channels=4, sample_size=8, num_classes=2)
    again = replace(config, data=checked, start_from="./first/../first/pipeline", max_steps=3)
    train(again, Path("run"), device="cpu")
    assert [entry["step"] for entry in read_log(Path("run"))] == [1, 2, 3]
    with pytest.raises(ValueError, match=r"other settings \(start_from\)"):
        train(replace(again, start_from="other", max_steps=4), Path("run"), device="cpu")


def test_the_objective_of_the_paper_is_trained(encoded: Path, tmp_path: Path) -> None:
    """The tables of its process were once made while FLOPs were counted, of tensors without memory, and kept."""
    ddpm_tables.cache_clear()
    config = latent_config(encoded / "latents", objective=Objective(learned_variance=True), max_steps=2)
    train(config, tmp_path / "run", device="cpu")
    assert all(np.isfinite(entry["loss"]) for entry in read_log(tmp_path / "run"))


def test_latents_of_another_autoencoder_are_other_data(encoded: Path, tmp_path: Path) -> None:
    config = latent_config(encoded / "latents", max_steps=2, flip=False)
    train(config, tmp_path / "run", device="cpu")
    vae = make_vae(tmp_path / "vae", "tiny")
    encode_into(tmp_path / "latents", source=str(encoded / "data"), vae=str(vae), image_size=16)
    other = replace(config, data=LatentConfig(source=str(tmp_path / "latents")), max_steps=3)
    with pytest.raises(ValueError, match="was trained on other data"):
        train(other, tmp_path / "run", device="cpu")


def test_what_latents_cannot_do_is_said(encoded: Path, tmp_path: Path) -> None:
    plain = encode_into(tmp_path / "plain", source=str(encoded / "data"), vae=str(encoded / "vae"), image_size=16)
    assert plain[0][0].shape == (1, 2, 4, 8, 8)
    with pytest.raises(ValueError, match="has no mirrored items: encode with --flip"):
        train(latent_config(tmp_path / "plain"), tmp_path / "run", device="cpu")
    pixels = make_config(encoded / "latents", model=TINY)
    with pytest.raises(ValueError, match="contains latents: give it to a recipe for latents"):
        train(pixels, tmp_path / "other", device="cpu")
    with pytest.raises(ValueError, match="lies in the data"):
        train(latent_config(encoded / "latents"), encoded / "latents" / "run", device="cpu")
    with pytest.raises(ValueError, match="lies in the data, and would be read"):
        encode_into(encoded / "data" / "x", source=str(encoded / "data"), vae=str(encoded / "vae"), image_size=16)
    (encoded / "data" / "x").rmdir()
    with pytest.raises(ValueError, match="image_size must be divisible by 2"):
        encode_into(tmp_path / "odd", source=str(encoded / "data"), vae=str(encoded / "vae"), image_size=15)


def test_batches_change_nothing_but_the_last_bits(encoded: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"source": str(encoded / "data"), "vae": str(encoded / "vae"), "image_size": 16}
    one = encode_into(tmp_path / "one", **options, batch_size=1, num_workers=0)
    five = encode_into(tmp_path / "five", **options, batch_size=5, shard_size=7)
    for index in range(len(one)):
        torch.testing.assert_close(one[index][0], five[index][0], atol=1e-5, rtol=1e-5)


def test_latents_that_are_not_finite_are_never_written(encoded: Path, tmp_path: Path) -> None:
    vae = MAKERS["kl"]()
    torch.nn.init.constant_(vae.quant_conv.bias, float("nan"))
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="one of the samples 0 to 10 of shard-00000 is not finite in float32"):
        encode_into(tmp_path / "x", source=str(encoded / "data"), vae=str(tmp_path / "vae"), image_size=16)
    assert not list((tmp_path / "x").glob("shard-*"))


def test_the_command_encodes_and_says_what(encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["latents", "--source", str(encoded / "data"), "--vae", str(encoded / "vae"), "--image-size", "16"]
    main([*arguments, "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert "encoded: 11 items of 4 x 8 x 8 in 1 shards, 2 classes" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*arguments, "--out", str(encoded / "data"), "--device", "cpu"])
    assert "contains the input" in capsys.readouterr().err
