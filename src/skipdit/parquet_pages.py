"""What the pages of a parquet file say of their sizes: its footer, which Arrow believes, may say less.

Thrift's compact protocol (thrift-compact-protocol.md of Apache Thrift), PageHeader of parquet.thrift (Apache Parquet).
"""

from typing import Any, BinaryIO, NamedTuple, TypeGuard

HEADER_BYTES = (2**10, 2**16, 2**20)  # that are read of a page: the next where a header has more


class Pages(NamedTuple):
    """Of one chunk of a column: bytes that its pages decode to, and their values."""

    num_bytes: int
    num_values: int


def measure_pages(file: BinaryIO, start: int, num_bytes: int) -> Pages:
    """Return what the headers of the pages in a part of a file say. `ValueError` where they are none."""
    place, decoded, values = start, 0, 0
    while place < start + num_bytes:
        header, length = _read_header(file, place)
        unpacked, packed = header.get(2), header.get(3)  # uncompressed_page_size, compressed_page_size
        # num_values of a data page, of one of version 2
        count = next((header[field].get(1) for field in (5, 8) if isinstance(header.get(field), dict)), 0)
        if not (_is_size(unpacked) and _is_size(packed) and _is_size(count)):
            raise ValueError(f"the page at byte {place} has no size")
        decoded, values, place = decoded + unpacked, values + count, place + length + packed
    return Pages(decoded, values)


def _is_size(number: Any) -> TypeGuard[int]:
    return isinstance(number, int) and number >= 0


def _read_header(file: BinaryIO, place: int) -> tuple[dict[int, Any], int]:
    """The fields of the header there, and its length."""
    for num_bytes in HEADER_BYTES:
        file.seek(place)
        reader = _Compact(file.read(num_bytes))
        try:
            return reader.struct(), reader.place
        except (IndexError, RecursionError):
            continue
    raise ValueError(f"the page at byte {place} has no header")


class _Compact:
    """Reads a struct of Thrift's compact protocol; strings are passed over. `IndexError` at the end of the content."""

    def __init__(self, content: bytes) -> None:
        self.content, self.place = content, 0

    def byte(self) -> int:
        self.place += 1
        return self.content[self.place - 1]

    def varint(self) -> int:
        number = shift = 0
        while True:
            byte = self.byte()
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number
            shift += 7

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
                self.place += 8
            case 8:
                length = self.varint()
                self.place += length
            case 9 | 10:
                byte = self.byte()
                for _ in range(self.varint() if byte >> 4 == 15 else byte >> 4):
                    self.value(byte & 0x0F)
            case 12:
                return self.struct()
            case _:
                raise IndexError(f"a page header has no field of kind {kind}")
        return None
