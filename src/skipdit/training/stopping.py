"""Stop a run on a signal, but only after its current step, so that its checkpoint is exact."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal ended a run, and its checkpoint is written. status: exit status, 128 plus the signal's number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.status = 128 + number


@dataclass
class Stop:
    """A request to stop."""

    signal: int = 0
    """number of the first signal; 0 without one"""


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Yield a `Stop` that Ctrl-C, SIGTERM and SIGHUP only set, so that it can be checked after each step.

    A second Ctrl-C raises `KeyboardInterrupt` at once. Signals that were already ignored, as under nohup, stay ignored.
    Under torchrun only the first Ctrl-C counts, since it forwards a Ctrl-C that every process has already received.
    """
    stop, alone = Stop(), os.environ.get("WORLD_SIZE", "1") == "1"
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    terminals = [handle for handle in (1, 2) if os.isatty(handle)]  # isatty is False once a terminal is gone

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.signal and alone:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            let_go_of(terminals)
        stop.signal = stop.signal or number

    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = {number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in ours:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number in ours:
            signal.signal(number, before[number])


def let_go_of(terminals: list[int]) -> None:
    """Redirect the handles of a closed terminal, on which every write fails, to /dev/null."""
    null = os.open(os.devnull, os.O_WRONLY)
    for handle in terminals:
        os.dup2(null, handle)
    os.close(null)


def ignore_signals(worker: int) -> None:
    """Ignore signals in a data worker, since a terminal's Ctrl-C reaches all processes: the main process handles it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
