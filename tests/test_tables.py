"""Tables as people have them: parquet files, shards, what `datasets` saves; what is too large or of another type."""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import hostile_media as hostile
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from skipdit.data import parquet_pages, tables
from skipdit.data import pictures as data
from skipdit.data.clips import ClipConfig, open_clips
from skipdit.data.parquet_pages import measure_columns
from skipdit.data.pictures import DataConfig, LabelledPictures, from_datasets, open_pictures

RED, BLUE = (hostile.saved(Image.new("RGB", (8, 8), color), "PNG") for color in ("red", "blue"))


def opened(source: Path, **options: Any) -> LabelledPictures:
    return open_pictures(DataConfig(source=str(source), image_size=8, **options))


def write(path: Path, image: Any = (RED, BLUE), label: Any = ("a", "b"), **others: Any) -> Path:
    columns = {"image": image, "label": label} | others
    columns = {name: list(values) if isinstance(values, tuple) else values for name, values in columns.items()}
    parquet.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def rows() -> Any:
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    return datasets.Dataset.from_dict({"image": pictures, "label": [1, 0]}, features=features)


def test_class_names_stand_in_the_schema(rows: Any, tmp_path: Path) -> None:
    rows.to_parquet(tmp_path / "set.PARQUET")
    pictures = opened(tmp_path / "set.PARQUET")
    assert (pictures.label_names, pictures.labels) == (["cat", "dog"], [1, 0])
    assert pictures.captions == [("dog",), ("cat",)]
    assert pictures[0][0][:, 0, 0].tolist() == [1, -1, -1]
    assert open_clips_labels(rows, tmp_path) == (["cat", "dog"], [1, 0])


def open_clips_labels(rows: Any, folder: Path) -> tuple[list[str], list[int]]:
    """Of clips with the labels of these rows."""
    content = hostile.animation("GIF", hostile.moving(2))
    table = pa.table({"clip": [content] * 2, "label": rows["label"][:]})
    names = {b"huggingface": rows.data.schema.metadata[b"huggingface"]}
    parquet.write_table(table.replace_schema_metadata(names), folder / "clips.parquet")
    clips = open_clips(ClipConfig(source=str(folder / "clips.parquet"), num_frames=2, image_size=8))
    return clips.label_names, clips.labels


@pytest.mark.parametrize("label", [-1, None])
def test_rows_without_a_class_are_refused(label: int | None, rows: Any, tmp_path: Path) -> None:
    table = rows.data.table.set_column(1, "label", pa.array([0, label]))
    parquet.write_table(table.replace_schema_metadata(rows.data.schema.metadata), tmp_path / "set.parquet")
    with pytest.raises(ValueError, match=r"set\.parquet has rows without label"):
        opened(tmp_path / "set.parquet")


def test_a_class_beyond_the_names_is_refused(rows: Any, tmp_path: Path) -> None:
    table = rows.data.table.set_column(1, "label", pa.array([0, 2]))
    parquet.write_table(table.replace_schema_metadata(rows.data.schema.metadata), tmp_path / "set.parquet")
    with pytest.raises(ValueError, match=r"label of .*set\.parquet must be 0 to 1, got 2"):
        opened(tmp_path / "set.parquet")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ((float("nan"), 1.0), "has rows without label"),
        ((None, 1), "has rows without label"),
        ((["a"], ["a", "b"]), r"label of .* must contain numbers or texts, got \['a'\]"),
        (({"id": 1}, {"id": 2}), "label must contain numbers or texts, got struct<id: int64>"),
        (pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())), "label must contain numbers or texts, got map<"),
        ((b"a", b"b"), "label of .* must contain numbers or texts, got b'a'"),
    ],
)
def test_labels_that_are_none_are_named(label: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        opened(write(tmp_path / "set.parquet", label=label))
    assert "set.parquet" in str(raised.value)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (("a.png", "b.png"), r"image must contain bytes or \{bytes, path\}, got string"),
        (([RED], [BLUE]), r"image must contain bytes or \{bytes, path\}, got list<"),
        (({"path": "a.png"}, {"path": "b.png"}), r"image must contain bytes or \{bytes, path\}, got struct<path"),
        (pa.array([RED, None], pa.binary()), r"row 1 of .* has no bytes in image \(a path alone is not read\)"),
        (
            pa.array([{"bytes": None, "path": "a.png"}] * 2, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
            "row 0 of .* has no bytes in image",
        ),
        ((RED, b"garbage"), r"cannot read the picture 1 of .*set\.parquet: it is none of"),
    ],
)
def test_pictures_that_are_none_are_named(image: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        opened(write(tmp_path / "set.parquet", image=image))
    assert "set.parquet" in str(raised.value)


@pytest.mark.parametrize(
    "image",
    [
        pa.array([RED, BLUE], pa.large_binary()),
        pa.array([RED, BLUE]).dictionary_encode(),
        [{"bytes": RED, "path": None}, {"bytes": BLUE, "path": "b.png"}],
    ],
)
def test_every_kind_of_bytes_is_read(image: Any, tmp_path: Path) -> None:
    pictures = opened(write(tmp_path / "set.parquet", image=image, label=pa.array(["x", "y"]).dictionary_encode()))
    assert pictures[1][0][:, 0, 0].tolist() == [-1, -1, 1]
    assert pictures.label_names == ["x", "y"]


def test_shards_are_one_data_set(rows: Any, tmp_path: Path) -> None:
    for name in ("0", "1"):
        rows.to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "README.md").write_text("a data set")
    pictures = opened(tmp_path)
    assert (pictures.label_names, pictures.labels) == (["cat", "dog"], [1, 0, 1, 0])
    write(tmp_path / "2.parquet")
    with pytest.raises(ValueError, match="cannot read "):
        opened(tmp_path)


@pytest.mark.parametrize("names", [["dog", "cat"], None])
def test_shards_of_other_classes_are_refused(names: list[str] | None, tmp_path: Path) -> None:
    for number, given in enumerate((["cat", "dog"], names)):
        table = pa.table({"image": [RED, BLUE], "label": [0, 1]})
        features = {"label": {"_type": "ClassLabel", "names": given}} if given else {}
        info: Any = {"huggingface": json.dumps({"info": {"features": features}})}
        parquet.write_table(table.replace_schema_metadata(info), tmp_path / f"{number}.parquet")
    with pytest.raises(ValueError, match=r"1\.parquet: its classes are not those of .*0\.parquet"):
        opened(tmp_path)


def test_a_split_is_found_by_its_name(rows: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    rows.select([0]).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    assert len(opened(tmp_path)) == 2
    assert len(opened(tmp_path, split="test")) == 1
    with pytest.raises(ValueError, match="has no split 'validation' in the names"):
        opened(tmp_path, split="validation")


def test_what_datasets_saved_is_read(rows: Any, tmp_path: Path) -> None:
    import datasets

    rows = rows.add_column("text", ["one", "two"])
    rows.select([1, 0]).save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "all")
    pictures = opened(tmp_path / "one", caption_column="text")
    assert (pictures.label_names, pictures.labels, pictures.captions) == (["cat", "dog"], [0, 1], [("two",), ("one",)])
    assert pictures[0][0][:, 0, 0].tolist() == [-1, -1, 1]
    assert opened(tmp_path / "all").labels == [1, 0]
    assert opened(tmp_path / "all", split="test").labels == [1]
    with pytest.raises(ValueError, match="all has no split 'dev', only train, test"):
        opened(tmp_path / "all", split="dev")


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", "data.parquet", ""])
def test_a_saved_set_names_only_its_own_files(name: str, rows: Any, tmp_path: Path) -> None:
    rows.save_to_disk(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(ValueError, match=r"state\.json names files outside its folder"):
        opened(tmp_path)


@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
@pytest.mark.parametrize("is_dictionary", [False, True])
def test_only_arrow_that_is_not_compressed_is_read(
    compression: str | None, is_dictionary: bool, tmp_path: Path
) -> None:
    label = pa.array(["a", "b"])
    columns = {"image": [RED, BLUE], "label": label.dictionary_encode() if is_dictionary else label}
    (tmp_path / "data.arrow").write_bytes(hostile.stream(columns, compression))
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    (tmp_path / "dataset_info.json").write_text("{}")
    if compression is None:
        assert opened(tmp_path).label_names == ["a", "b"]
    else:
        with pytest.raises(ValueError, match="its buffers are compressed"):
            opened(tmp_path)


def test_a_column_that_is_not_asked_for_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "FREE_BYTES", 2**16)
    content = hostile.table({"image": [RED] * 4, "label": ["a"] * 4, "other": hostile.repeated(bytes(2**20), 4)})
    (tmp_path / "set.parquet").write_bytes(content)
    assert len(opened(tmp_path / "set.parquet")) == 4
    with pytest.raises(ValueError, match=r"set\.parquet: its columns image, label, other have 1,\d+,\d+ bytes"):
        opened(tmp_path / "set.parquet", caption_column="other")


def test_a_value_that_stands_in_every_row_is_counted_in_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "FREE_BYTES", 2**18)
    image = hostile.repeated(RED + bytes(2**16), 100)
    (tmp_path / "set.parquet").write_bytes(hostile.table({"image": image, "label": ["a"] * 100}, compression="zstd"))
    with pytest.raises(ValueError, match=r"set\.parquet: its columns image, label decode to more than \d+,\d+ bytes"):
        opened(tmp_path / "set.parquet")


def test_a_footer_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = hostile.table({"image": [bytes(2**20)], "label": ["a"]}, compression="zstd")
    path = tmp_path / "set.parquet"
    path.write_bytes(hostile.lying(content))
    assert parquet.read_metadata(path).row_group(0).column(0).total_uncompressed_size == 100
    monkeypatch.setattr(tables, "FREE_BYTES", 2**16)
    with pytest.raises(ValueError, match=r"set\.parquet: its columns image, label have 1,\d+,\d+ bytes"):
        opened(path)


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("use_dictionary", [True, False])
def test_pages_are_measured_as_an_honest_footer_says(compression: str, version: str, use_dictionary: bool) -> None:
    generator = np.random.default_rng(0)
    columns = {
        "bytes": [{"bytes": generator.bytes(3000), "path": None} for _ in range(1000)],
        "texts": [["a"] * (row % 4) for row in range(1000)],
        "long": ["x" * 5000] * 1000,
        "numbers": generator.random(1000),
        "nulls": [None] * 1000,
    }
    file = io.BytesIO()
    settings = {"compression": compression, "data_page_version": version, "use_dictionary": use_dictionary}
    parquet.write_table(pa.table(columns), file, row_group_size=400, **settings)
    metadata = parquet.read_metadata(file)
    for column in range(metadata.num_columns):
        chunks = [metadata.row_group(group).column(column) for group in range(metadata.num_row_groups)]
        sizes = measure_columns(file, [column], metadata.num_columns)
        total = sum(chunk.total_uncompressed_size for chunk in chunks)  # with the headers of the pages
        assert total * 0.98 - 1000 < sizes.num_bytes <= total
        assert sizes.num_bytes / 3 <= sizes.largest <= sizes.num_bytes
        assert sizes.num_values == max(chunk.num_values for chunk in chunks)


def test_arrow_is_not_asked_for_what_ends_the_process(tmp_path: Path) -> None:
    """The size histogram of this one is wrong: pyarrow 26 aborts where Python asks for the column's metadata."""
    name, content = hostile.hostile_tables(4, 349)[348]
    (tmp_path / name).write_bytes(content)
    with contextlib.suppress(ValueError):
        opened(tmp_path / name)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "header",
    [
        b"\x19\xf7" + b"\xff" * 8 + b"\x7f",  # a list of 2**63 doubles
        b"\x15" + b"\xff" * 2**20,  # a number of a million bytes
    ],
)
def test_a_header_takes_no_longer_than_its_length(header: bytes) -> None:
    file = io.BytesIO()
    parquet.write_table(pa.table({"label": np.arange(2**20)}), file, use_dictionary=False, compression="none")
    file.seek(parquet.read_metadata(file).row_group(0).column(0).data_page_offset)
    file.write(header)
    with pytest.raises(ValueError, match="has no header"):
        measure_columns(file, [0], 1)


def test_pages_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many row groups that stand in one place take a time that their footer alone decides."""
    file = io.BytesIO()
    parquet.write_table(pa.table({"label": np.arange(9)}), file)
    read_footer = parquet_pages._read_footer
    monkeypatch.setattr(parquet_pages, "_read_footer", lambda file: {4: read_footer(file)[4] * 99})
    with pytest.raises(ValueError, match="its columns have more bytes than the file"):
        measure_columns(file, [0], 1)


def test_rows_and_values_are_counted_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "set.parquet", text=[["a"] * 5, ["b"]])
    monkeypatch.setattr(tables, "MAX_VALUES", 5)
    with pytest.raises(ValueError, match=r"set\.parquet: a column has 6 values, at most 5 are read"):
        opened(path, caption_column="text")
    monkeypatch.setattr(tables, "MAX_ROWS", 1)
    with pytest.raises(ValueError, match=r"set\.parquet: it has 2 rows, at most 1 are read"):
        opened(path)


def test_captions_are_not_padded_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "set.parquet", text=[["a"] * 5, ["b"]])
    monkeypatch.setattr(data, "MAX_CAPTIONS", 9)
    with pytest.raises(ValueError, match="5 captions for each of 2 items are too many: at most 9"):
        opened(path, caption_column="text")


def test_a_file_without_rows_or_with_a_column_twice_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set\.parquet has no rows"):
        opened(write(tmp_path / "set.parquet", image=pa.array([], pa.binary()), label=pa.array([], pa.string())))
    twice = pa.Table.from_arrays([pa.array([RED]), pa.array(["a"]), pa.array(["b"])], ["image", "label", "label"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match=r"twice\.parquet: it has more than one column 'label'"):
        opened(tmp_path / "twice.parquet")


def test_a_file_of_another_kind_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "pictures.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"pictures\.zip is neither a folder nor a \.parquet file"):
        opened(tmp_path / "pictures.zip")


def test_a_fifo_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "set.parquet")
    with pytest.raises(ValueError, match=r"set\.parquet is not a regular file"):
        opened(tmp_path / "set.parquet")


def test_labels_keep_their_order(tmp_path: Path) -> None:
    labels = [int(label) for label in np.random.default_rng(0).integers(0, 9, 50)]
    pictures = opened(write(tmp_path / "set.parquet", image=[RED] * 50, label=labels))
    assert pictures.label_names == [str(label) for label in sorted(set(labels))]
    assert [pictures.label_names[label] for label in pictures.labels] == list(map(str, labels))


# ----------------------------------------------------------------------------------------------------------------------
# By the `datasets` library


@pytest.mark.parametrize(
    ("image", "kind", "label", "message"),
    [
        ([RED, None], "picture", [0, 1], "cannot read the picture 1 of .*: the row has none"),
        ([RED, b"garbage"], "picture", [0, 1], "cannot read the picture 1 of .*: it is none of"),
        ([RED, hostile.EPS], "picture", [0, 1], "cannot read the picture 1 of .*: it is none of"),
        (["a.png", "b.png"], "string", [0, 1], "image of .* must contain pictures, got Value"),
        ([RED, BLUE], "picture", [[0], [1]], r"label of .* must contain numbers or texts, got \[0\]"),
        ([RED, BLUE], "picture", [float("nan"), 1.0], "has rows without label"),
        ([RED, BLUE], "picture", [None, 1], "has rows without label"),
    ],
)
def test_rows_of_datasets_that_are_none_are_named(
    image: Any, kind: str, label: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    datasets.disable_progress_bars()
    feature = datasets.Image() if kind == "picture" else datasets.Value("string")
    found = datasets.Dataset.from_dict({"image": image, "label": label}).cast_column("image", feature)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: found)
    with pytest.raises(ValueError, match=message):
        from_datasets(DataConfig(source="someone/set", image_size=8))
