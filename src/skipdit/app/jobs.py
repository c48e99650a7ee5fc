"""A queue of jobs that run one at a time, report their progress, and can be cancelled at any step."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from skipdit.terminal import describe, is_expected

LOGGER = logging.getLogger(__name__)
MAX_WAITING = 16

State = Literal["waiting", "running", "done", "failed", "cancelled"]


class Cancelled(Exception):
    """Raised in a job that was cancelled."""


@dataclass(eq=False)
class Job:
    """Work that waits, runs or is over. Only the thread that runs it writes its fields."""

    owner: str
    """the open page that submitted it"""
    kind: str
    """kind of work; a page may have one job of each at a time"""
    work: Callable[["Job"], object]
    """returns the result, and calls `check`, `tell` or `advance` at each step"""
    state: State = "waiting"
    doing: str = ""
    """current activity, in a few words"""
    done: int = 0
    """steps of this activity so far"""
    total: int = 0
    """steps of this activity in all; 0 if unknown"""
    shown: Any = None
    """preliminary result"""
    result: Any = None
    message: str = ""
    """reason of a failure"""
    version: int = 0
    """number of changes so far"""
    is_cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    def check(self) -> None:
        """Raise `Cancelled` if the job was cancelled."""
        if self.is_cancelled.is_set():
            raise Cancelled

    def tell(self, **fields: object) -> None:
        """Set `doing`, `done`, `total` or `shown`. Raises `Cancelled` if the job was cancelled."""
        self.check()
        vars(self).update(fields)
        self.version += 1

    def advance(self) -> None:
        """Count a step. Raises `Cancelled` if the job was cancelled."""
        self.tell(done=self.done + 1)


class Jobs:
    """Runs jobs one after another in one thread."""

    def __init__(self) -> None:
        self.waiting: list[Job] = []
        self.running: Job | None = None
        self.changed = threading.Condition()
        self.is_closed = False
        self.thread = threading.Thread(target=self._run_all, name="skipdit jobs", daemon=True)
        self.thread.start()

    def submit(self, owner: str, kind: str, work: Callable[[Job], object]) -> Job:
        """Append a job to the queue. `ValueError` if its owner already has one of this kind, or the queue is full."""
        with self.changed:
            if any((job.owner, job.kind) == (owner, kind) for job in self._open_jobs()):
                raise ValueError("this page is running one already: cancel it first")
            if len(self.waiting) >= MAX_WAITING:
                raise ValueError(f"{MAX_WAITING} jobs are waiting already: try again later")
            job = Job(owner, kind, work)
            self.waiting.append(job)
            self.changed.notify_all()
        return job

    def place(self, job: Job) -> int:
        """Return the number of jobs before this one, including the one that runs."""
        with self.changed:
            before = self.waiting.index(job) if job in self.waiting else 0
            return before + (self.running is not None and self.running is not job)

    def cancel(self, owner: str, kind: str | None = None) -> None:
        """Cancel all jobs of an owner, or those of one kind; a running job stops at its next step."""
        with self.changed:
            for job in self._open_jobs():
                if job.owner == owner and kind in (None, job.kind):
                    job.is_cancelled.set()
                    if job in self.waiting:
                        self.waiting.remove(job)
                        self._end(job, "cancelled")

    def close(self) -> None:
        """Cancel all jobs, and wait up to 10 seconds for the one that runs."""
        with self.changed:
            self.is_closed = True
            for job in self._open_jobs():
                job.is_cancelled.set()
            self.changed.notify_all()
        self.thread.join(timeout=10)

    def _open_jobs(self) -> list[Job]:
        return [*([] if self.running is None else [self.running]), *self.waiting]

    def _end(self, job: Job, state: State, message: str = "") -> None:
        job.message, job.state = message, state
        job.version += 1

    def _run_all(self) -> None:
        while True:
            with self.changed:
                self.running = None
                self.changed.wait_for(lambda: self.is_closed or self.waiting)
                if self.is_closed:
                    return
                job = self.running = self.waiting.pop(0)
                job.state = "running"
                job.version += 1
            self._run(job)

    def _run(self, job: Job) -> None:
        try:
            job.check()
            job.result = job.work(job)
        except Cancelled:
            self._end(job, "cancelled")
        except Exception as error:
            if is_expected(error):
                self._end(job, "failed", describe(error))
                return
            LOGGER.error("a job of the page failed", exc_info=error)
            message = f"something unexpected went wrong ({type(error).__name__}); the terminal tells more"
            self._end(job, "failed", message)
        else:
            self._end(job, "done")
