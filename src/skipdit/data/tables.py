"""Read data sets in tables: parquet files, and what `datasets` saves. Sizes are checked before anything is decoded, and
only the requested columns are read, in batches whose size is bounded regardless of the file.
"""

import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal, TypedDict

from msgspec import Meta

from skipdit.data.folders import as_captions, walk
from skipdit.data.parquet_pages import measure_columns
from skipdit.data.picture_files import PICTURE_SUFFIXES, reason_of
from skipdit.data.video_files import VIDEO_SUFFIXES
from skipdit.files.untrusted import as_type_or_none, open_regular, parse_json, printable, printable_path, read_json
from skipdit.interfaces import Fields

if TYPE_CHECKING:
    import pyarrow as pa

MAX_ROWS = 2**21  # of a data set
MAX_VALUES = 2**23  # of a column, which may have lists
FREE_BYTES, MAX_EXPANSION = 2**27, 8  # columns may decode to the former plus the latter times the size of their file
BATCH_BYTES = 2**26  # of rows decoded at a time, even if all of them have a dictionary's largest value
SPLITS = ("train", "validation", "valid", "val", "dev", "test")  # names that `datasets` finds in file names


class SavedState(TypedDict):
    """The fields read from `state.json`, which `datasets.Dataset.save_to_disk` writes."""

    _data_files: list[dict[str, str]]


class ClassLabel(TypedDict):
    """A column of classes in the schema that `datasets` writes."""

    _type: Literal["ClassLabel"]
    names: Annotated[list[str], Meta(min_length=1)]


class SchemaInfo(TypedDict):
    """The columns in that schema."""

    features: Fields


class SavedSplits(TypedDict):
    """Contents of `dataset_dict.json`."""

    splits: list[str]


@dataclass(frozen=True)
class Table:
    """Some columns of one or more files."""

    name: str
    """what errors call it"""
    columns: "Mapping[str, pa.ChunkedArray]"
    """pyarrow arrays by column"""
    class_names: Mapping[str, list[str]]
    """class names by column, if the schema has them (`ClassLabel` of `datasets`)"""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def encoded(self, column: str, row: int) -> bytes:
        """Return the bytes of a picture or video; `ValueError` if there are none."""
        content, _ = read_cell(self.columns[column][row].as_py())
        if not content:
            raise ValueError(f"row {row} of {self.name} has no bytes in {column} (a path alone is not read)")
        return content

    def values(self, column: str) -> list:
        """Return a column as Python values."""
        with _arrow_errors(self.name):
            return self.columns[column].to_pylist()

    def classes(self, column: str) -> tuple[list[int], list[str]]:
        """Return the class of each row and the class names."""
        return to_classes(self.values(column), column, self.name, self.class_names.get(column))

    def captions(self, column: str) -> list[list[str]]:
        """Return one or more texts per row."""
        return as_captions(self.values(column), self.name, column)


def read_cell(cell: object) -> tuple[bytes | None, str | None]:
    """Return the bytes and the path in a cell of pictures or videos: plain bytes, or `{bytes, path}`."""
    match cell:
        case bytes():
            return cell, None
        case {"bytes": bytes(content)} if content:
            return content, None
        case {"path": str(path)}:
            return None, path
    return None, None


@contextmanager
def _arrow_errors(name: str) -> Iterator[None]:
    """Turn whatever pyarrow raises into one `ValueError` that names the table."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"cannot read {name}: {reason_of(error)}") from error


def to_classes(
    values: Sequence, column: str, source: str, names: Sequence[str] | None = None
) -> tuple[list[int], list[str]]:
    """Return the class of each row and the class names: labels of any simple type in sorted order, or, if `names` are
    given, indices into them. `ValueError` if a row has no label."""
    if any(value is None or value != value or (names is not None and value == -1) for value in values):
        raise ValueError(f"{source} has rows without {column}")
    if names is not None:
        labels = [as_type_or_none(value, int) for value in values]
        for value, label in zip(values, labels, strict=True):
            if label is None or not 0 <= label < len(names):
                raise ValueError(f"{column} of {source} must be 0 to {len(names) - 1}, got {printable(value)}")
        return list(values), list(names)
    match values:
        case [bytes() | dict() | list() | tuple() as first, *_]:
            raise ValueError(f"{column} of {source} must contain numbers or texts, got {printable(first, 40)}")
    unique = sorted(set(values))
    classes = {name: label for label, name in enumerate(unique)}
    return [classes[value] for value in values], [str(name) for name in unique]


def label_names_of(feature: object) -> list[str] | None:
    """Return the class names of a column of `datasets`, if it has them."""
    import datasets

    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def undecoded(rows: Any, column: str, feature: object) -> Any:
    """Return rows of `datasets` whose pictures or videos in a column stay encoded, because the library would try every
    format of Pillow."""
    import datasets

    is_decoded = isinstance(feature, (datasets.Image, datasets.Video))
    return rows.cast_column(column, type(feature)(decode=False)) if is_decoded else rows


def read_table(paths: Sequence[Path], name: str, encoded: Sequence[str] = (), plain: Sequence[str] = ()) -> Table:
    """Read and concatenate columns of parquet files or Arrow streams. name: what errors call them.

    encoded: columns of pictures or videos, plain bytes or `{bytes, path}` structs. plain: other columns. `OSError` /
    `ValueError` if a file or column does not exist, has another type, or is too large.
    """
    import pyarrow as pa

    selected = list(dict.fromkeys([*encoded, *plain]))
    chunks: dict[str, list[pa.Array]] = {column: [] for column in selected}
    class_names: dict[str, list[str]] = {}
    num_rows = 0
    for path in paths:
        file_name = name if len(paths) == 1 else printable_path(path)
        with open_regular(path) as file, _arrow_errors(file_name):
            source = _Parquet(file) if path.suffix.lower() == ".parquet" else _Stream(path)
            check_columns(source.schema, encoded, plain)
            by_column = class_names_of(source.schema, file_name)
            file_class_names = {column: names for column, names in by_column.items() if column in plain}
            if path != paths[0] and file_class_names != class_names:
                raise ValueError(f"its classes are not those of {printable_path(paths[0])}, or not in the same order")
            class_names = file_class_names
            num_bytes, max_bytes = 0, FREE_BYTES + MAX_EXPANSION * path.stat().st_size
            for batch in source.batches(encoded, selected, max_bytes):
                num_rows += batch.num_rows
                for column in selected:
                    part = batch.column(column)
                    part = part.dictionary_decode() if pa.types.is_dictionary(part.type) else part
                    num_bytes += part.nbytes
                    chunks[column].append(part)
                if num_bytes > max_bytes:
                    raise ValueError(f"its columns {', '.join(selected)} decode to more than {max_bytes:,} bytes")
                if num_rows > MAX_ROWS:
                    raise ValueError(f"it has more than {MAX_ROWS:,} rows")
    if not num_rows:
        raise ValueError(f"{name} has no rows")
    with _arrow_errors(name):
        return Table(name, {column: pa.chunked_array(parts) for column, parts in chunks.items()}, class_names)


def check_columns(schema: "pa.Schema", encoded: Sequence[str], plain: Sequence[str]) -> None:
    """Raise `ValueError` if a column is missing or has an unsupported type."""
    from pyarrow import types

    for column in [*encoded, *plain]:
        if schema.names.count(column) != 1:
            count = "no" if column not in schema.names else "more than one"
            raise ValueError(f"it has {count} column {column!r}, only {printable(', '.join(schema.names))}")
    for column in encoded:
        if not _holds_bytes(schema.field(column).type):
            kind = printable(schema.field(column).type, 60)
            raise ValueError(f"{column} must contain bytes or {{bytes, path}}, got {kind}")
    for column in plain:
        if types.is_struct(kind := schema.field(column).type) or types.is_map(kind) or types.is_union(kind):
            raise ValueError(f"{column} must contain numbers or texts, got {printable(kind, 60)}")


def _holds_bytes(kind: "pa.DataType") -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        indices = kind.get_all_field_indices("bytes")
        return len(indices) == 1 and _holds_bytes(kind.field(indices[0]).type)
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_binary(kind) or types.is_large_binary(kind)


def class_names_of(schema: "pa.Schema", name: str) -> dict[str, list[str]]:
    """Return the class names, by column, that `datasets` writes into a schema."""
    content = (schema.metadata or {}).get(b"huggingface")
    if content is None:
        return {}
    info = as_type_or_none(parse_json(content, Fields, f"the schema of {name}").get("info"), SchemaInfo)
    features = {} if info is None else info["features"]
    labels = {column: as_type_or_none(feature, ClassLabel) for column, feature in features.items()}
    return {column: label["names"] for column, label in labels.items() if label is not None}


class _Parquet:
    """A parquet file whose sizes are read from its pages and checked."""

    def __init__(self, file: BinaryIO) -> None:
        from pyarrow.parquet import ParquetFile

        self.raw = file
        self.file = ParquetFile(file, pre_buffer=False)
        self.schema = self.file.schema_arrow

    def batches(self, encoded: Sequence[str], columns: Sequence[str], max_bytes: int) -> "Iterable[pa.RecordBatch]":
        from pyarrow import types

        metadata = self.file.metadata
        if metadata.num_rows > MAX_ROWS:
            raise ValueError(f"it has {metadata.num_rows:,} rows, at most {MAX_ROWS:,} are read")
        leaves = [
            f"{column}.bytes" if column in encoded and types.is_struct(self.schema.field(column).type) else column
            for column in columns
        ]
        paths = [self.file.schema.column(index).path for index in range(len(self.file.schema))]
        indices = [
            i for i, path in enumerate(paths) if any(path == leaf or path.startswith(f"{leaf}.") for leaf in leaves)
        ]
        sizes = measure_columns(self.raw, indices, len(paths))
        if sizes.num_bytes > max_bytes:
            raise ValueError(
                f"its columns {', '.join(columns)} have {sizes.num_bytes:,} bytes, at most {max_bytes:,} are read"
            )
        if sizes.num_values > MAX_VALUES:
            raise ValueError(f"a column has {sizes.num_values:,} values, at most {MAX_VALUES:,} are read")
        size = max(1, min(1024, BATCH_BYTES // max(1, sizes.largest)))
        return self.file.iter_batches(size, columns=leaves, use_threads=False)


class _Stream:
    """A stream of Arrow batches, as `datasets` saves it. Its offsets are untrusted and checked."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.file = pa.memory_map(str(path))
        self.schema = pa.ipc.open_stream(self.file).schema

    def batches(self, encoded: Sequence[str], columns: Sequence[str], max_bytes: int) -> "Iterable[pa.RecordBatch]":
        import pyarrow as pa

        self.file.seek(0)
        if any(map(_is_compressed, pa.ipc.MessageReader.open_stream(self.file))):
            raise ValueError("its buffers are compressed, which `datasets` never does")
        self.file.seek(0)
        options = pa.ipc.IpcReadOptions(included_fields=[self.schema.get_field_index(column) for column in columns])
        for batch in pa.ipc.open_stream(self.file, options=options):
            batch.validate(full=True)
            yield batch


def _is_compressed(message: "pa.Message") -> bool:
    """Return True if the buffers of an Arrow message are compressed, so that their size is unknown until they are
    unpacked. Arrow's Message.fbs: Message.header, DictionaryBatch.data, RecordBatch.compression."""
    content = message.metadata.to_pybytes()

    def number(position: int, kind: str) -> int:
        return struct.unpack_from(kind, content, position)[0]

    def field(table: int, index: int) -> int:
        """Return the position of a field in a flatbuffer table, 0 if the table lacks it."""
        fields = table - number(table, "<i")
        offset = number(fields + 4 + 2 * index, "<H") if 4 + 2 * index < number(fields, "<H") else 0
        return table + offset if offset else 0

    def follow(position: int) -> int:
        return position + number(position, "<I")

    if message.type not in ("dictionary", "record batch"):
        return False
    header = follow(field(follow(0), 2))
    return field(follow(field(header, 1)) if message.type == "dictionary" else header, 3) != 0


def find_tables(folder: Path, split: str) -> list[Path]:
    """Return the parquet files or Arrow streams of a data set in a folder: those that `save_to_disk` wrote, or parquet
    files, unless there are pictures or videos too; if their names show the split, only those of this split."""
    if (folder / "dataset_dict.json").is_file():
        splits = read_json(folder / "dataset_dict.json", SavedSplits)["splits"]
        if split not in splits:
            raise ValueError(f"{printable_path(folder)} has no split {split!r}, only {printable(', '.join(splits))}")
        folder = folder / split
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        names = [part.get("filename", "") for part in read_json(folder / "state.json", SavedState)["_data_files"]]
        if not all(name.endswith(".arrow") and Path(name).name == name for name in names):
            raise ValueError(f"{printable_path(folder / 'state.json')} names files outside its folder")
        return [folder / name for name in names]
    shards = []
    for _, _, files in walk(folder):
        suffixes = {path.suffix.lower() for path in files}
        if suffixes & (PICTURE_SUFFIXES | VIDEO_SUFFIXES):
            return []
        shards += [path for path in files if path.suffix.lower() == ".parquet"]
    shards.sort()
    has_splits = any(_is_of_split(path.relative_to(folder), name) for path in shards for name in SPLITS)
    split_shards = [path for path in shards if _is_of_split(path.relative_to(folder), split)]
    if has_splits and not split_shards:
        raise ValueError(f"{printable_path(folder)} has no split {split!r} in the names of its parquet files")
    return split_shards or shards


def _is_of_split(path: Path, split: str) -> bool:
    return re.search(rf"(?<![a-z0-9]){re.escape(split)}(?![a-z0-9])", str(path).lower()) is not None
