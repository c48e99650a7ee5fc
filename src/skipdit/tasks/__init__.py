"""The tasks: one module each, with its name, its option on the command line, and how it is sampled, trained and opened.

`TASKS` is the table: a new task is a module and a row. Shared code is in `task` (sampling, opening) and `training`;
that of class-conditional tasks is in `labels`, that of text-conditional ones in `prompts`.
"""

import importlib
from collections import UserDict
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from skipdit.tasks.task import Task


class TaskTable(UserDict[str, Any]):
    """Tasks by name. A value may be the name of a module that defines `TASK`, which is imported on first use."""

    def __getitem__(self, name: str) -> "Task":
        task = super().__getitem__(name)
        if isinstance(task, str):
            task = self.data[name] = importlib.import_module(task).TASK
        return task


TASKS = TaskTable(
    {
        "class-to-image": "skipdit.tasks.class_to_image",
        "class-to-video": "skipdit.tasks.class_to_video",
        "text-to-image": "skipdit.tasks.text_to_image",
        "text-to-video": "skipdit.tasks.text_to_video",
    }
)

if TYPE_CHECKING:
    TaskName = str
else:
    TaskName = Literal[tuple(TASKS)]  # so that a command line lists the names
