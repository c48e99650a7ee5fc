"""Pictures from everywhere, broken ones named."""

import io
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from skipdit.data.pictures import DataConfig, ShuffledForever, emoji_captions, open_pictures, to_rgb


def picture(color: tuple[int, ...], size: tuple[int, int] = (20, 30), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, color)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, color in (("cat", (255, 0, 0)), ("ant", (0, 0, 255))):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(2):
            picture(color).save(tmp_path / "set" / name / f"{index}.png")
    return tmp_path / "set"


def test_the_bundled_emoji() -> None:
    pictures = open_pictures(DataConfig())
    assert len(pictures) == 1601
    assert len(pictures.label_names) == 95
    assert pictures.label_names == sorted(pictures.label_names)
    pixels, label = pictures[0]
    assert pixels.shape == (3, 64, 64)
    assert pictures.label_names[label] == "keycap"
    assert pixels[:, 0, 0].min() > 0.95  # on white, but for the compression
    assert torch.equal(pictures[0][0], pixels)


def test_the_captions_of_the_bundled_emoji() -> None:
    captions = open_pictures(DataConfig(image_size=8)).captions
    assert len(captions) == 1601
    assert ("cherry blossom", "cherry blossom, flower, plant, spring") in captions
    assert ("keycap: #", "keycap: #") in captions
    assert all(len(row) == 2 and row[0] == row[0].lower() and row[1].startswith(row[0]) for row in captions)
    assert emoji_captions("Japanese “secret” button", ["ideograph", "japanese", "Secret"]) == (
        "japanese “secret” button",
        "japanese “secret” button, ideograph",
    )


def test_captions_of_a_folder_lie_beside_the_pictures(folder: Path) -> None:
    (folder / "cat" / "1.txt").write_text("a red cat\nby someone\n", encoding="utf-8")
    captions = open_pictures(DataConfig(source=str(folder), image_size=8)).captions
    assert captions == [("ant",), ("ant",), ("cat",), ("a red cat",)]
    with pytest.raises(ValueError, match="caption_column must be None, got 'text'"):
        open_pictures(DataConfig(source=str(folder), caption_column="text"))


@pytest.mark.parametrize(("content", "what"), [(b"\nsecond line", "first line is empty"), (b"\xff\xfe", "utf-8")])
def test_an_unreadable_caption_is_named_before_training(folder: Path, content: bytes, what: str) -> None:
    (folder / "cat" / "1.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"cannot read the caption .*1\.txt.*{what}"):
        open_pictures(DataConfig(source=str(folder)))


def write_captioned(path: Path, captions: list) -> DataConfig:
    buffer = io.BytesIO()
    picture((0, 255, 0)).save(buffer, "PNG")
    rows = {"image": [buffer.getvalue()] * len(captions), "label": ["dog"] * len(captions), "text": captions}
    parquet.write_table(pa.table(rows), path)
    return DataConfig(source=str(path), image_size=8, caption_column="text")


def test_captions_of_a_parquet_file_are_padded_to_one_number(tmp_path: Path) -> None:
    config = write_captioned(tmp_path / "one.parquet", ["a dog", "no dog"])
    assert open_pictures(config).captions == [("a dog",), ("no dog",)]
    config = write_captioned(tmp_path / "many.parquet", [["a dog"], ["a", "b", "c"]])
    assert open_pictures(config).captions == [("a dog",) * 3, ("a", "b", "c")]
    assert open_pictures(DataConfig(source=config.source)).captions == [("dog",)] * 2
    with pytest.raises(ValueError, match="no column 'words', only image, label, text"):
        open_pictures(DataConfig(source=config.source, caption_column="words"))


@pytest.mark.parametrize("captions", [["a", None], ["a", " "], [["a"], []], [["a"], [None]], [1, 2]])
def test_a_row_without_caption_is_named(tmp_path: Path, captions: list) -> None:
    config = write_captioned(tmp_path / "set.parquet", captions)
    with pytest.raises(ValueError, match=r"text of .*set\.parquet must be a text or a list of texts, got .* in row"):
        open_pictures(config)


def test_a_folder_has_one_class_a_subfolder(folder: Path) -> None:
    pictures = open_pictures(DataConfig(source=str(folder), image_size=16))
    assert pictures.label_names == ["ant", "cat"]
    assert pictures.labels == [0, 0, 1, 1]
    pixels, label = pictures[3]
    assert label == 1
    assert pixels[:, 3, 3].tolist() == [1.0, -1.0, -1.0]


def test_a_parquet_file_of_any_labels(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    picture((0, 255, 0)).save(buffer, "PNG")
    rows = {"picture": [buffer.getvalue()] * 3, "kind": [7, 3, 7]}
    parquet.write_table(pa.table(rows), tmp_path / "set.parquet")
    config = DataConfig(source=str(tmp_path / "set.parquet"), image_size=8, image_column="picture", label_column="kind")
    pictures = open_pictures(config)
    assert pictures.labels == [1, 0, 1]
    assert pictures.label_names == ["3", "7"]
    assert pictures[0][0].shape == (3, 8, 8)
    with pytest.raises(ValueError, match="no column 'label', only picture, kind"):
        open_pictures(DataConfig(source=str(tmp_path / "set.parquet"), image_column="picture"))


def test_a_folder_of_the_datasets_library(folder: Path, tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache"), split="train")
    rows = rows.add_column("text", [f"animal {index}" for index in range(4)])
    rows.save_to_disk(str(tmp_path / "saved"))
    table = tmp_path / "hub"
    table.mkdir()
    rows.to_parquet(str(table / "train.parquet"))
    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"
    by_name = datasets.load_dataset
    try:
        datasets.load_dataset = lambda name, split: by_name("parquet", data_dir=str(table), split=split)
        pictures = open_pictures(DataConfig(source="someone/animals", image_size=8))
        captioned = open_pictures(DataConfig(source="someone/animals", image_size=8, caption_column="text"))
    finally:
        datasets.load_dataset = by_name
    assert pictures.label_names == ["ant", "cat"]
    assert pictures[0][0].shape == (3, 8, 8)
    assert pictures.captions == [("ant",), ("ant",), ("cat",), ("cat",)]
    assert captioned.captions == [(f"animal {index}",) for index in range(4)]


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n broken"])
def test_an_unreadable_picture_is_named_before_training(folder: Path, content: bytes) -> None:
    (folder / "cat" / "broken.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read the picture .*broken\.png"):
        open_pictures(DataConfig(source=str(folder)))


def test_a_truncated_picture_is_named_before_training(folder: Path) -> None:
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole, "JPEG")
    (folder / "ant" / "a.jpg").write_bytes(whole.getvalue()[:400])
    with pytest.raises(ValueError, match=r"cannot read the picture .*a\.jpg"):
        open_pictures(DataConfig(source=str(folder)))


def test_sources_that_cannot_be_had_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.parquet"):
        open_pictures(DataConfig(source=str(tmp_path / "none.parquet")))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"bad\.parquet"):
        open_pictures(DataConfig(source=str(tmp_path / "bad.parquet")))
    (tmp_path / "stray" / "class").mkdir(parents=True)
    picture((1, 2, 3)).save(tmp_path / "stray" / "lost.png")
    with pytest.raises(ValueError, match=r"lost\.png belongs to no class"):
        open_pictures(DataConfig(source=str(tmp_path / "stray")))
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        DataConfig(image_size=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pictures"):
        open_pictures(DataConfig(source=str(tmp_path / "empty")))


def test_transparency_becomes_white_and_the_crop_is_central() -> None:
    clear = picture((0, 0, 0, 0), mode="RGBA")
    assert to_rgb(clear, 10).getpixel((5, 5)) == (255, 255, 255)
    wide = Image.new("RGB", (30, 10), (0, 0, 0))
    wide.paste((255, 0, 0), (10, 0, 20, 10))
    cropped = np.asarray(to_rgb(wide, 10))
    assert cropped.shape == (10, 10, 3)
    assert (cropped == (255, 0, 0)).all()


@given(length=st.integers(1, 50), start=st.integers(0, 200), seed=st.integers(0, 5))
def test_a_resumed_stream_goes_on_where_it_stopped(length: int, start: int, seed: int) -> None:
    whole = list(itertools.islice(iter(ShuffledForever(length, seed)), 260))
    assert list(itertools.islice(iter(ShuffledForever(length, seed, start)), 60)) == whole[start : start + 60]
    for epoch in range(260 // length):
        assert sorted(whole[epoch * length : (epoch + 1) * length]) == list(range(length))


def test_processes_share_one_stream() -> None:
    whole = list(itertools.islice(iter(ShuffledForever(10, 0)), 30))
    parts = [list(itertools.islice(iter(ShuffledForever(10, 0, 0, rank, 3)), 10)) for rank in range(3)]
    assert [parts[i % 3][i // 3] for i in range(30)] == whole
