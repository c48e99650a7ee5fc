"""A run that is asked to end finishes its step, so that its checkpoint is exact."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal ended a training; its checkpoint is written. status: as shells tell it, 128 and the signal's number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.status = 128 + number


@dataclass
class Stop:
    """What has been asked for. signal: the number of the first signal, 0 before."""

    signal: int = 0


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Inside, Ctrl-C, SIGTERM and SIGHUP only leave a note, to be read after each step.

    A second Ctrl-C raises `KeyboardInterrupt` at once. Signals that the process was told to ignore, as nohup does, stay
    ignored. Under torchrun, which passes a Ctrl-C on that every process has seen already, only the first counts.
    """
    stop, alone = Stop(), os.environ.get("WORLD_SIZE", "1") == "1"
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    terminals = [handle for handle in (1, 2) if os.isatty(handle)]  # one that is gone does not say so any more

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
    """Write nowhere instead of to a terminal that is gone, where every write fails."""
    null = os.open(os.devnull, os.O_WRONLY)
    for handle in terminals:
        os.dup2(null, handle)
    os.close(null)


def ignore_signals(worker: int) -> None:
    """Leave signals to the main process, in a data worker: a terminal's Ctrl-C reaches all of them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
