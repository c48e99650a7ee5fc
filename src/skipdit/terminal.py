"""Messages of a command on a terminal, and what happens when it is stopped."""

import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from skipdit.files.untrusted import printable

if TYPE_CHECKING:
    from rich.progress import Progress

MAX_MESSAGE = 2000  # characters
SHOW_CURSOR = "\x1b[?25h"  # progress bars hide it


class Terminated(KeyboardInterrupt):
    """SIGTERM, which stops a run as Ctrl-C does."""


@contextlib.contextmanager
def messages() -> Iterator[None]:
    """Print warnings as lines on stderr, with untrusted names of files and keys escaped."""
    factory, formatter = logging.getLogRecordFactory(), warnings.formatwarning
    logger, handler = logging.getLogger("skipdit"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("skipdit: warning: %(message)s"))
    logger.addHandler(handler)
    logging.setLogRecordFactory(_PlainRecord)
    warnings.formatwarning = _format_warning
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = formatter


class _PlainRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return "\n".join(printable(line, MAX_MESSAGE) for line in super().getMessage().splitlines())


def _format_warning(message: Warning | str, category: type[Warning], *place: object, **more: object) -> str:
    return f"skipdit: warning: {one_line(str(message))}\n"


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raise `Terminated` in the block on SIGTERM; a second SIGTERM ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Terminated


def progress_bar(*, shown: bool = True) -> "Progress":
    """Return a progress bar with the number of items, the time that they took, and what is left."""
    from rich import progress

    columns = (
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.description}"),
    )
    return progress.Progress(*columns, disable=not shown)


@contextlib.contextmanager
def counting(description: str, total: int | None, *, shown: bool = True) -> Iterator[Callable[..., None]]:
    """Show a progress bar inside the block; yield `advance(count=1, description=...)`, which counts items that are done
    and may name the next one."""
    with progress_bar(shown=shown) as bar:
        task = bar.add_task(description, total=total)

        def advance(count: int = 1, description: str | None = None) -> None:
            bar.update(task, advance=count, description=description)

        yield advance


def say_stopped(stopped: KeyboardInterrupt) -> int:
    """Print how a run was stopped, with the notes on the exception, and return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if stream.isatty():
            stream.write(SHOW_CURSOR)
            stream.flush()
    by, status = ("SIGTERM", 143) if type(stopped) is Terminated else ("Ctrl-C", 130)
    notes = "; ".join(getattr(stopped, "__notes__", ()))
    print(f"skipdit: stopped by {by}" + (f": {one_line(notes)}" if notes else ""), file=sys.stderr)
    return status


def drop_output() -> int:
    """Redirect a stdout that nobody reads any more, as after `| head`, to nowhere, and return the exit status."""
    with contextlib.suppress(OSError, ValueError):  # no real file in a test or a notebook
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if Python, or PyTorch on a CPU or GPU, ran out of memory."""
    match error:
        case MemoryError():
            return True
        case RuntimeError():
            return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return False


def is_expected(error: BaseException) -> bool:
    """Return True for an error that one line explains: a user's mistake, or a lack of memory."""
    match error:
        case RecursionError() | ValueError() | OSError():
            return True
    return is_out_of_memory(error)


def describe(error: BaseException) -> str:
    """Return one line that says what went wrong; for an error with a data worker's traceback, its last line."""
    text = str(error).strip()
    if type(error) is RecursionError:
        return f"something is nested too deeply ({one_line(text)})"
    if is_out_of_memory(error):
        return f"out of memory{text and f' ({one_line(text)})'}"
    lines = text.splitlines() or [repr(error)]
    return one_line(lines[-1] if lines[0].startswith("Caught ") else text or repr(error))


def one_line(text: str) -> str:
    return printable(" ".join(line.strip() for line in text.splitlines()), MAX_MESSAGE)
