"""The models on the page: the bundled ones, and those given on the command line."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.utils.hooks import RemovableHandle

from skipdit.app.jobs import Job
from skipdit.files.untrusted import printable
from skipdit.interfaces import Pipeline
from skipdit.loading import BUNDLED, Source, load_source
from skipdit.options import DTypeName, choose
from skipdit.tasks import TASKS
from skipdit.terminal import describe, is_out_of_memory

LOGGER = logging.getLogger(__name__)

NUM_KEPT = 2  # models in memory


@dataclass(frozen=True)
class Offer:
    """A model on the page."""

    name: str
    """name on the page"""
    path: str
    """argument of `load_source`"""
    task: str


class Models:
    """The models on the page; the ones used last stay in memory."""

    def __init__(self, paths: Sequence[str] = (), device: str = "auto", dtype: DTypeName = "float32") -> None:
        """Open each model that is given by a path. `ValueError` or `OSError` if that fails.

        dtype: of the models that are named by paths; the bundled ones run in float32.
        """
        self.device = device
        self.dtype: DTypeName = dtype
        self.lock = threading.Lock()
        self.kept: OrderedDict[str, Source] = OrderedDict()
        self.offers = {name: Offer(name, name, bundled.task) for name, bundled in BUNDLED.items()}
        for path in paths:
            name = self._free_name(path)
            source = self._load(name, path)
            self.offers[name] = Offer(name, path, source.sampler.task.name)
            self._keep(name, source)

    def _free_name(self, path: str) -> str:
        resolved = Path(path).resolve()
        name = printable(resolved.parent.name if resolved.name == "pipeline" else resolved.name)
        taken = [name, *(f"{name} ({number})" for number in range(2, len(self.offers) + 2))]
        return next(each for each in taken if each not in self.offers)

    @property
    def tasks(self) -> list[str]:
        return [task for task in TASKS if self.of_task(task)]

    def of_task(self, task: str) -> list[str]:
        """Return the names of a task's models, the bundled ones last."""
        names = [name for name, offer in self.offers.items() if offer.task == task]
        return sorted(names, key=lambda name: name in BUNDLED)

    def path_of(self, name: str) -> str:
        """Return the name or path of a model outside the page."""
        return self.offers[choose("model", name, self.offers)].path

    def open(self, name: str) -> Source:
        """Return a model. `ValueError` if the name is unknown or the model cannot be used here."""
        path = self.path_of(name)
        with self.lock:
            source = self.kept.get(name) or self._load(name, path)
            self._keep(name, source)
        return source

    def _load(self, name: str, path: str) -> Source:
        dtype: DTypeName = "float32" if name in BUNDLED else self.dtype
        try:
            return load_source(path, device=self.device, dtype=dtype)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                LOGGER.error("%s could not be opened", name, exc_info=error)
            raise ValueError(
                f"{name} cannot be opened ({describe(error)}): choose another model, or start the page with another "
                "--device, or --dtype bfloat16"
            ) from error

    def _keep(self, name: str, source: Source) -> None:
        source.sampler.pipeline.set_progress_bar_config(disable=True)
        self.kept[name] = source
        self.kept.move_to_end(name)
        while len(self.kept) > NUM_KEPT:
            self.kept.popitem(last=False)


def labels_of(source: Source) -> list[str]:
    """Return the names of a model's classes, or their numbers if they have no names; empty without classes."""
    sampler = source.sampler
    num_classes = sampler.task.num_classes(sampler.pipeline)
    if num_classes is None:
        return []
    return list(sampler.pipeline.labels) or [str(number) for number in range(num_classes)]


def cancellable(pipeline: Pipeline, job: Job) -> RemovableHandle:
    """Make calls of a pipeline's transformer raise `Cancelled` in a `with` block once the job is cancelled."""
    return pipeline.transformer.register_forward_pre_hook(lambda *_: job.check())
