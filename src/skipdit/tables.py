"""Data sets in tables: parquet files and what `datasets` saves. Sizes are checked before anything is decoded, only the
columns that are asked for are read, and only in batches that a small file cannot blow up.
"""

import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

from skipdit.folders import as_captions, walk
from skipdit.parquet_pages import measure_columns
from skipdit.picture_files import PICTURE_SUFFIXES, reason_of
from skipdit.untrusted import open_regular, parse_json, printable, printable_path, read_json
from skipdit.video_files import VIDEO_SUFFIXES

MAX_ROWS = 2**21  # of a data set
MAX_VALUES = 2**23  # of a column, which may hold lists
FREE_BYTES, MAX_EXPANSION = 2**27, 8  # the asked columns of a file may decode to so much, and so many times its size
BATCH_BYTES = 2**26  # of the rows that are decoded at once, where a dictionary's value could stand in each of them
SPLITS = ("train", "validation", "valid", "val", "dev", "test")  # as `datasets` finds them in the names of files


class SavedState(TypedDict):
    """What of `state.json` is read: `datasets.Dataset.save_to_disk` writes it."""

    _data_files: list[dict[str, str]]


class SavedSplits(TypedDict):
    """`dataset_dict.json`."""

    splits: list[str]


@dataclass(frozen=True)
class Table:
    """Some columns of one or more files. name: what an error calls it. class_names: of the columns for which the
    schema says them (`ClassLabel` of `datasets`)."""

    name: str
    columns: Mapping[str, Any]
    class_names: Mapping[str, list[str]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def encoded(self, column: str, row: int) -> bytes:
        """Return the bytes of a picture or video; `ValueError` where there are none."""
        content = self.columns[column][row].as_py()
        content = content["bytes"] if isinstance(content, dict) else content
        if not content:
            raise ValueError(f"row {row} of {self.name} has no bytes in {column} (a path alone is not read)")
        return content

    def values(self, column: str) -> list[Any]:
        """Return a column as Python values."""
        with _refusing(self.name):
            return self.columns[column].to_pylist()

    def classes(self, column: str) -> tuple[list[int], list[str]]:
        """Return the class of each row and the class names."""
        return to_classes(self.values(column), column, self.name, self.class_names.get(column))

    def captions(self, column: str) -> list[list[str]]:
        """Return one or more texts per row."""
        return as_captions(self.values(column), self.name, column)


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Whatever pyarrow raises becomes one `ValueError` that names the table."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"cannot read {name}: {reason_of(error)}") from error


def to_classes(
    values: Sequence[Any], column: str, source: str, names: Sequence[str] | None = None
) -> tuple[list[int], list[str]]:
    """Labels of any simple type as classes in sorted order, with their names; numbers of classes where `names` are
    given. `ValueError` where a row has none.
    """
    if any(value is None or value != value or (names is not None and value == -1) for value in values):
        raise ValueError(f"{source} has rows without {column}")
    if names is not None:
        wrong = next((value for value in values if not isinstance(value, int) or not 0 <= value < len(names)), None)
        if wrong is not None:
            raise ValueError(f"{column} of {source} must be 0 to {len(names) - 1}, got {printable(wrong)}")
        return list(values), list(names)
    if isinstance(next(iter(values), None), (bytes, dict, list, tuple)):
        raise ValueError(f"{column} of {source} must hold numbers or texts, got {printable(values[0], 40)}")
    found = sorted(set(values))
    classes = {name: label for label, name in enumerate(found)}
    return [classes[value] for value in values], [str(name) for name in found]


def read_table(paths: Sequence[Path], name: str, encoded: Sequence[str] = (), plain: Sequence[str] = ()) -> Table:
    """Read columns of parquet files or of Arrow streams, one after the other. name: what an error calls them.

    encoded: columns with pictures or videos, plain bytes or `{bytes, path}` structs. plain: others. `OSError` /
    `ValueError` where there is no such file or column, it holds something else, or it is too large.
    """
    import pyarrow as pa

    wanted = list(dict.fromkeys([*encoded, *plain]))
    chunks: dict[str, list[Any]] = {column: [] for column in wanted}
    class_names: dict[str, list[str]] = {}
    num_rows = 0
    for path in paths:
        what = name if len(paths) == 1 else printable_path(path)
        with open_regular(path) as file, _refusing(what):
            source = _Parquet(file) if path.suffix.lower() == ".parquet" else _Stream(path)
            check_columns(source.schema, encoded, plain)
            found = {each: names for each, names in class_names_of(source.schema, what).items() if each in plain}
            if path != paths[0] and found != class_names:
                raise ValueError(
                    f"its classes are others than those of {printable_path(paths[0])}, or in another order"
                )
            class_names = found
            num_bytes, most = 0, FREE_BYTES + MAX_EXPANSION * path.stat().st_size
            for batch in source.batches(encoded, wanted, most):
                num_rows += batch.num_rows
                for column in wanted:
                    part = batch.column(column)
                    part = part.dictionary_decode() if pa.types.is_dictionary(part.type) else part
                    num_bytes += part.nbytes
                    chunks[column].append(part)
                if num_bytes > most:
                    raise ValueError(f"its columns {', '.join(wanted)} decode to more than {most:,} bytes")
                if num_rows > MAX_ROWS:
                    raise ValueError(f"it has more than {MAX_ROWS:,} rows")
    if not num_rows:
        raise ValueError(f"{name} has no rows")
    with _refusing(name):
        return Table(name, {column: pa.chunked_array(parts) for column, parts in chunks.items()}, class_names)


def check_columns(schema: Any, encoded: Sequence[str], plain: Sequence[str]) -> None:
    """`ValueError` where a column is missing or of a type that is not read."""
    from pyarrow import types

    for column in [*encoded, *plain]:
        if schema.names.count(column) != 1:
            how = "no" if column not in schema.names else "more than one"
            raise ValueError(f"it has {how} column {column!r}, only {printable(', '.join(schema.names))}")
    for column in encoded:
        if not _holds_bytes(schema.field(column).type):
            found = printable(schema.field(column).type, 60)
            raise ValueError(f"{column} must hold bytes or {{bytes, path}}, got {found}")
    for column in plain:
        if types.is_struct(kind := schema.field(column).type) or types.is_map(kind) or types.is_union(kind):
            raise ValueError(f"{column} must hold numbers or texts, got {printable(kind, 60)}")


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        places = kind.get_all_field_indices("bytes")
        return len(places) == 1 and _holds_bytes(kind.field(places[0]).type)
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_binary(kind) or types.is_large_binary(kind)


def class_names_of(schema: Any, name: str) -> dict[str, list[str]]:
    """Return the names that `datasets` writes into a schema for its columns of classes."""
    content = (schema.metadata or {}).get(b"huggingface")
    if content is None:
        return {}
    info = parse_json(content, dict[str, Any], f"the schema of {name}").get("info")
    features = info.get("features") if isinstance(info, dict) else None
    return {
        column: feature["names"]
        for column, feature in (features.items() if isinstance(features, dict) else ())
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and _are_texts(feature.get("names"))
    }


def _are_texts(names: Any) -> bool:
    return isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)


class _Parquet:
    """A parquet file, its sizes checked by what its pages say."""

    def __init__(self, file: BinaryIO) -> None:
        from pyarrow.parquet import ParquetFile

        self.raw = file
        self.file = ParquetFile(file, pre_buffer=False)
        self.schema = self.file.schema_arrow

    def batches(self, encoded: Sequence[str], columns: Sequence[str], most: int) -> Iterable[Any]:
        from pyarrow import types

        metadata = self.file.metadata
        if metadata.num_rows > MAX_ROWS:
            raise ValueError(f"it has {metadata.num_rows:,} rows, at most {MAX_ROWS:,} are read")
        leaves = [
            f"{column}.bytes" if column in encoded and types.is_struct(self.schema.field(column).type) else column
            for column in columns
        ]
        paths = [self.file.schema.column(index).path for index in range(len(self.file.schema))]
        asked = [
            i for i, path in enumerate(paths) if any(path == leaf or path.startswith(f"{leaf}.") for leaf in leaves)
        ]
        sizes = measure_columns(self.raw, asked, len(paths))
        if sizes.num_bytes > most:
            what = f"have {sizes.num_bytes:,} bytes, at most {most:,} are read"
            raise ValueError(f"its columns {', '.join(columns)} {what}")
        if sizes.num_values > MAX_VALUES:
            raise ValueError(f"a column has {sizes.num_values:,} values, at most {MAX_VALUES:,} are read")
        # a dictionary's value can stand in every row of a batch
        size = max(1, min(1024, BATCH_BYTES // max(1, sizes.largest)))
        return self.file.iter_batches(size, columns=leaves, use_threads=False)


class _Stream:
    """A stream of Arrow batches, as `datasets` saves its sets. Its offsets are checked, as nothing vouches for them."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.file = pa.memory_map(str(path))
        self.schema = pa.ipc.open_stream(self.file).schema

    def batches(self, encoded: Sequence[str], columns: Sequence[str], most: int) -> Iterable[Any]:
        import pyarrow as pa

        self.file.seek(0)
        if any(map(_is_compressed, pa.ipc.MessageReader.open_stream(self.file))):
            raise ValueError("its buffers are compressed, which `datasets` does not do")
        self.file.seek(0)
        options = pa.ipc.IpcReadOptions(included_fields=[self.schema.get_field_index(column) for column in columns])
        for batch in pa.ipc.open_stream(self.file, options=options):
            batch.validate(full=True)
            yield batch


def _is_compressed(message: Any) -> bool:
    """Say whether the buffers of an Arrow message are compressed: they say their size only when they are unpacked.
    Arrow's Message.fbs: Message.header, DictionaryBatch.data, RecordBatch.compression."""
    content = message.metadata.to_pybytes()

    def number(place: int, kind: str) -> int:
        return struct.unpack_from(kind, content, place)[0]

    def field(table: int, index: int) -> int:
        """The place of a field of a flatbuffer's table, 0 where the table has none."""
        fields = table - number(table, "<i")
        offset = number(fields + 4 + 2 * index, "<H") if 4 + 2 * index < number(fields, "<H") else 0
        return table + offset if offset else 0

    def follow(place: int) -> int:
        return place + number(place, "<I")

    if message.type not in ("dictionary", "record batch"):
        return False
    header = follow(field(follow(0), 2))
    return field(follow(field(header, 1)) if message.type == "dictionary" else header, 3) != 0


def find_tables(folder: Path, split: str) -> list[Path]:
    """Return the parquet files or Arrow streams of a data set in a folder, none where it holds something else: what
    `save_to_disk` wrote, or parquet files and neither pictures nor videos; those of the split, where their names tell.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = read_json(folder / "dataset_dict.json", SavedSplits)["splits"]
        if split not in splits:
            raise ValueError(f"{printable_path(folder)} has no split {split!r}, only {printable(', '.join(splits))}")
        folder = folder / split
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        names = [part.get("filename", "") for part in read_json(folder / "state.json", SavedState)["_data_files"]]
        if not all(name.endswith(".arrow") and Path(name).name == name for name in names):
            raise ValueError(f"{printable_path(folder / 'state.json')} names files that are none of its own")
        return [folder / name for name in names]
    shards = []
    for _, _, files in walk(folder):
        suffixes = {path.suffix.lower() for path in files}
        if suffixes & (PICTURE_SUFFIXES | VIDEO_SUFFIXES):
            return []
        shards += [path for path in files if path.suffix.lower() == ".parquet"]
    shards.sort()
    named = [path for path in shards if any(map(partial(_is_of, path.relative_to(folder)), SPLITS))]
    found = [path for path in shards if _is_of(path.relative_to(folder), split)]
    if named and not found:
        raise ValueError(f"{printable_path(folder)} has no split {split!r} in the names of its parquet files")
    return found or shards


def _is_of(path: Path, split: str) -> bool:
    return re.search(rf"(?<![a-z0-9]){re.escape(split)}(?![a-z0-9])", str(path).lower()) is not None
