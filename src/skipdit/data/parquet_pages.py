"""Read the sizes in a parquet file before Arrow does: Arrow trusts the footer, and aborts the process on some malformed
content (`RowGroupMetaData.column` of pyarrow 26 on a wrong size histogram).

Parquet uses Thrift's compact protocol (thrift-compact-protocol.md of Apache Thrift). Field numbers are those of
parquet.thrift (Apache Parquet): FileMetaData, RowGroup, ColumnChunk, ColumnMetaData, PageHeader.
"""

import os
from collections.abc import Collection
from typing import BinaryIO, NamedTuple

from skipdit.files.untrusted import as_type_or_none

Struct = dict[int, object]  # by the number of the field

MAX_FOOTER_BYTES = 2**22
HEADER_BYTES = (2**10, 2**16, 2**20)  # bytes read for a page header: the next size if it is longer


class Sizes(NamedTuple):
    """Decoded sizes of some columns."""

    num_bytes: int
    """bytes of all pages"""
    largest: int
    """bytes of the largest chunk"""
    num_values: int
    """most values in a chunk"""


def measure_columns(file: BinaryIO, columns: Collection[int], num_columns: int) -> Sizes:
    """Return the sizes in the pages of these columns. columns: indices of leaves of the schema. `ValueError` if the
    file is malformed."""
    num_bytes = largest = num_values = num_packed = 0
    for group in _rows_of(_read_footer(file).get(4)):  # row_groups
        chunks = _rows_of(group.get(1))  # columns
        if len(chunks) != num_columns:
            raise ValueError(f"a row group has {len(chunks)} columns, not {num_columns}")
        for column in columns if group.get(3) != 0 else ():  # num_rows
            start, length = _find_chunk(chunks[column].get(3))  # meta_data
            num_packed += length
            if num_packed > file.seek(0, os.SEEK_END):
                raise ValueError("its columns have more bytes than the file")
            decoded, values = _measure_chunk(file, start, start + length)
            num_bytes, largest, num_values = num_bytes + decoded, max(largest, decoded), max(num_values, values)
    return Sizes(num_bytes, largest, num_values)


def _rows_of(value: object) -> list[Struct]:
    if (rows := as_type_or_none(value, list[Struct])) is None:
        raise ValueError("its footer is not as expected")
    return rows


def _read_footer(file: BinaryIO) -> Struct:
    end = file.seek(-8, os.SEEK_END)
    length = int.from_bytes(file.read(4), "little")
    if length > min(end, MAX_FOOTER_BYTES):
        raise ValueError(f"its footer has {length:,} bytes, at most {MAX_FOOTER_BYTES:,} are read")
    file.seek(end - length)
    try:
        return _Compact(file.read(length)).struct()
    except (IndexError, RecursionError) as error:
        raise ValueError("its footer is not as expected") from error


def _sizes_of(value: object, *numbers: int) -> list[int | None]:
    """Return the sizes in these fields of a struct, each `None` if it is missing or below 0."""
    fields = as_type_or_none(value, Struct) or {}
    sizes = [as_type_or_none(fields.get(number), int) for number in numbers]
    return [None if size is None or size < 0 else size for size in sizes]


def _find_chunk(metadata: object) -> tuple[int, int]:
    """Return the position and the length of one chunk of a column, in bytes."""
    # total_compressed_size, data_page_offset, dictionary_page_offset
    length, data, dictionary = _sizes_of(metadata, 7, 9, 11)
    if length is None or data is None:
        raise ValueError("its footer has no position of a column")
    return dictionary if dictionary is not None and 0 < dictionary < data else data, length


def _measure_chunk(file: BinaryIO, position: int, end: int) -> tuple[int, int]:
    """Return the number of decoded bytes and of values in one chunk of a column."""
    num_bytes = num_values = 0
    while position < end:
        header, header_length = _read_header(file, position)
        unpacked, packed = _sizes_of(header, 2, 3)  # uncompressed_page_size, compressed_page_size
        # num_values of a data page of version 1 or 2
        page = next((header[field] for field in (5, 8) if field in header), {1: 0})
        (count,) = _sizes_of(page, 1)
        if unpacked is None or packed is None or count is None:
            raise ValueError(f"the page at byte {position} has no size")
        num_bytes, num_values, position = num_bytes + unpacked, num_values + count, position + header_length + packed
    return num_bytes, num_values


def _read_header(file: BinaryIO, position: int) -> tuple[Struct, int]:
    """Return the fields of the page header at `position`, and its length in bytes."""
    for num_bytes in HEADER_BYTES:
        file.seek(position)
        reader = _Compact(file.read(num_bytes))
        try:
            return reader.struct(), reader.position
        except (IndexError, RecursionError):
            continue
    raise ValueError(f"the page at byte {position} has no header")


class _Compact:
    """Reader of a struct in Thrift's compact protocol; it skips strings and maps. `IndexError` at the end of the
    content."""

    def __init__(self, content: bytes) -> None:
        self.content, self.position = content, 0

    def byte(self) -> int:
        self.position += 1
        return self.content[self.position - 1]

    def varint(self) -> int:
        number = 0
        for shift in range(0, 70, 7):  # of 64 bits
            byte = self.byte()
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number
        raise IndexError("a number has more than 64 bits")

    def integer(self) -> int:
        number = self.varint()
        return number >> 1 if number % 2 == 0 else -(number >> 1) - 1

    def struct(self) -> Struct:
        fields: Struct = {}
        field = 0
        while (byte := self.byte()) != 0:
            field = field + (byte >> 4) if byte >> 4 else self.integer()
            kind = byte & 0x0F
            fields[field] = kind == 1 if kind in (1, 2) else self.value(kind)
        return fields

    def value(self, kind: int) -> object:
        match kind:
            case 1 | 2 | 3:
                return self.byte()
            case 4 | 5 | 6:
                return self.integer()
            case 7:
                self.position += 8
            case 8:
                length = self.varint()
                self.position += length
            case 9 | 10:
                byte = self.byte()
                count = self.varint() if byte >> 4 == 15 else byte >> 4
                if count > len(self.content) - self.position:  # each entry has a byte or more
                    raise IndexError("a list is longer than the content")
                return [self.value(byte & 0x0F) for _ in range(count)]
            case 12:
                return self.struct()
            case _:
                raise IndexError(f"there is no field of kind {kind}")
        return None
