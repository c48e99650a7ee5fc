"""Read the sizes in a parquet file before Arrow does: Arrow trusts the footer, and aborts the process on some malformed
content (`RowGroupMetaData.column` of pyarrow 26 on a wrong size histogram).

Parquet uses Thrift's compact protocol (thrift-compact-protocol.md of Apache Thrift). Field numbers are those of
parquet.thrift (Apache Parquet): FileMetaData, RowGroup, ColumnChunk, ColumnMetaData, PageHeader.
"""

import os
from collections.abc import Collection
from typing import Any, BinaryIO, NamedTuple, TypeGuard

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


def _rows_of(value: Any) -> list[dict[int, Any]]:
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ValueError("its footer is not as expected")
    return value


def _read_footer(file: BinaryIO) -> dict[int, Any]:
    end = file.seek(-8, os.SEEK_END)
    length = int.from_bytes(file.read(4), "little")
    if length > min(end, MAX_FOOTER_BYTES):
        raise ValueError(f"its footer has {length:,} bytes, at most {MAX_FOOTER_BYTES:,} are read")
    file.seek(end - length)
    try:
        return _Compact(file.read(length)).struct()
    except (IndexError, RecursionError) as error:
        raise ValueError("its footer is not as expected") from error


def _find_chunk(metadata: Any) -> tuple[int, int]:
    """Return the position and the length of one chunk of a column, in bytes."""
    # total_compressed_size, data_page_offset, dictionary_page_offset
    length, data, dictionary = (metadata.get(n) for n in (7, 9, 11)) if isinstance(metadata, dict) else (None,) * 3
    if not (_is_size(length) and _is_size(data)):
        raise ValueError("its footer has no position of a column")
    return dictionary if _is_size(dictionary) and 0 < dictionary < data else data, length


def _measure_chunk(file: BinaryIO, position: int, end: int) -> tuple[int, int]:
    """Return the number of decoded bytes and of values in one chunk of a column."""
    num_bytes = num_values = 0
    while position < end:
        header, header_length = _read_header(file, position)
        unpacked, packed = header.get(2), header.get(3)  # uncompressed_page_size, compressed_page_size
        # num_values of a data page of version 1 or 2
        count = next((header[field].get(1) for field in (5, 8) if isinstance(header.get(field), dict)), 0)
        if not (_is_size(unpacked) and _is_size(packed) and _is_size(count)):
            raise ValueError(f"the page at byte {position} has no size")
        num_bytes, num_values, position = num_bytes + unpacked, num_values + count, position + header_length + packed
    return num_bytes, num_values


def _is_size(number: Any) -> TypeGuard[int]:
    return isinstance(number, int) and number >= 0


def _read_header(file: BinaryIO, position: int) -> tuple[dict[int, Any], int]:
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

    def struct(self) -> dict[int, Any]:
        fields, field = {}, 0
        while (byte := self.byte()) != 0:
            field = field + (byte >> 4) if byte >> 4 else self.integer()
            kind = byte & 0x0F
            fields[field] = kind == 1 if kind in (1, 2) else self.value(kind)
        return fields

    def value(self, kind: int) -> Any:
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
