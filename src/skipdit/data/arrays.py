"""Read and write sets of samples in the .npz files of ADM's evaluation: `arr_0`, uint8, (n h w 3) for pictures or
(n f h w 3) for clips. Files are mapped, so that no more than a batch is in memory, and nothing is unpickled.
"""

import io
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
from jaxtyping import UInt8

from skipdit.data.picture_files import reason_of
from skipdit.files.untrusted import open_regular, printable

MAX_HEADER = 10_000  # bytes of an array's header
MAX_STATISTICS_BYTES = 2**28  # of an array read into memory; a covariance of 4,096 features has 128 MiB
LOCAL_HEADER = 30  # bytes before the file name (APPNOTE.TXT 4.3.7)


def write_npz(
    path: Path, blocks: Iterator[np.ndarray], shape: tuple[int, ...], labels: Sequence[int | None] = ()
) -> None:
    """Write `arr_0`, uint8 in this shape, block by block, and the labels, unless one is `None`, as `arr_1`. Unlike
    `numpy.savez`, it keeps no more than a block in memory, and always writes the same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for block in blocks:
                file.write(np.ascontiguousarray(block).data)
        if labels and None not in labels:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
                np.lib.format.write_array(file, np.array(labels, dtype=np.int64))


def map_npz(path: Path) -> UInt8[np.ndarray, "items *frames height width 3"]:
    """Return `arr_0` of a file, memory-mapped. `OSError` if it cannot be read; `ValueError` if it is damaged,
    compressed, or contains anything but pictures or clips in uint8."""
    name = printable(path)
    with _opened(path) as (file, archive):
        info = _member(archive, "arr_0")
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError("its arrays are compressed: write it with numpy.savez")
        file.seek(info.header_offset)
        head = file.read(LOCAL_HEADER)
        file.seek(info.header_offset + LOCAL_HEADER + sum(struct.unpack_from("<HH", head, 26)))
        shape, dtype, is_fortran = _read_header(file)
        start = file.tell()
        size = file.seek(0, io.SEEK_END)
    if dtype != np.uint8 or is_fortran or len(shape) not in (4, 5) or shape[-1] != 3 or 0 in shape:
        actual = f"{printable(dtype)} {shape}{', in Fortran order' if is_fortran else ''}"
        raise ValueError(f"arr_0 of {name} must be uint8 (n, h, w, 3), or (n, f, h, w, 3) of clips, got {actual}")
    num_bytes = int(np.prod(shape, dtype=object))
    if start + num_bytes > size:
        raise ValueError(
            f"{name} is truncated: {start + num_bytes - size:,} of {num_bytes:,} bytes of arr_0 are missing"
        )
    return np.memmap(path, np.uint8, "r", start, shape)


def read_statistics(path: Path) -> dict[str, np.ndarray]:
    """Return those of `mu`, `sigma`, `mu_s` and `sigma_s` that a reference of ADM has, in float64. Errors as for
    `map_npz`."""
    name, arrays = printable(path), {}
    with _opened(path) as (_, archive):
        for key in ("mu", "sigma", "mu_s", "sigma_s"):
            if f"{key}.npy" not in archive.namelist():
                continue
            info = _member(archive, key)
            if info.file_size > MAX_STATISTICS_BYTES:
                raise ValueError(f"{key} has {info.file_size:,} bytes, at most {MAX_STATISTICS_BYTES:,} are read")
            with archive.open(info) as member:
                content = io.BytesIO(member.read(MAX_STATISTICS_BYTES))
            array = np.lib.format.read_array(content, allow_pickle=False, max_header_size=MAX_HEADER)
            arrays[key] = array.astype(np.float64)
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        has_mean, has_covariance = mean in arrays, covariance in arrays
        length = arrays[mean].size if has_mean else 0
        if has_mean != has_covariance or (has_mean and arrays[covariance].shape != (length, length)):
            raise ValueError(f"{mean} and {covariance} of {name} are not a mean and covariance of the same features")
        if not all(np.isfinite(arrays[key]).all() for key in (mean, covariance) if key in arrays):
            raise ValueError(f"{mean} or {covariance} of {name} is not finite")
    return arrays


def has_array(path: Path, name: str) -> bool:
    """Return True if a file has an array of this name. Errors as for `map_npz`."""
    with _opened(path) as (_, archive):
        return f"{name}.npy" in archive.namelist()


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, zipfile.ZipFile]]:
    """Yield a file and its archive; turn whatever is raised on a damaged one into one `ValueError`."""
    name = printable(path)
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            yield file, archive
    except OSError:
        raise
    except zipfile.BadZipFile as error:
        raise ValueError(f"cannot read {name}: it is truncated, or not an .npz file") from error
    except Exception as error:  # zipfile, struct and numpy raise any type on damaged files
        raise ValueError(f"cannot read {name}: {reason_of(error)}") from error


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    if f"{name}.npy" not in archive.namelist():
        names = ", ".join(archive.namelist()[:5]) or "nothing"
        raise ValueError(f"it has no {name}, only {printable(names)}")
    return archive.getinfo(f"{name}.npy")


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, bool]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file, max_header_size=MAX_HEADER)
    return shape, dtype, is_fortran
