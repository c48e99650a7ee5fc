"""Reads the weights of feature networks, with errors that name the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skipdit.files.untrusted import open_regular, printable

MAX_WEIGHTS_BYTES = 2**30


@contextmanager
def errors_named(fault: str) -> Iterator[None]:
    """Raise `ValueError` with `fault` and the first line of the reason for any error inside the block. Errors of the
    file system and of memory are raised as they are."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch, transformers, zipfile and pickle raise errors of many classes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{fault}: {printable(reason)}") from error


@contextmanager
def reading_weights(file: Path, network: str) -> Iterator[None]:
    """Raise `ValueError` if a file is too large, or if reading it inside the block as the weights of a network
    fails."""
    with open_regular(file) as opened:
        if (size := opened.seek(0, 2)) > MAX_WEIGHTS_BYTES:
            raise ValueError(f"{printable(file)} has {size:,} bytes, at most {MAX_WEIGHTS_BYTES:,} are read")
    with errors_named(f"{printable(file)} does not hold the weights of {network}"):
        yield
