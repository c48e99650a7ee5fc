"""The tasks. Each has a file here, which says what it is called, how it is asked for, sampled, trained and opened.

`TASKS` is the table: a new task is a file and a row. What tasks share is in `task` (sampling, opening) and `training`,
and, by what they are asked for, in `labels` and `prompts`.
"""

import importlib
from collections import UserDict
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from skipdit.tasks.task import Task


class TaskTable(UserDict[str, Any]):
    """Hold tasks by name. One that is given as a module, which defines it as `TASK`, is imported when first used."""

    def __getitem__(self, name: str) -> "Task":
        found = super().__getitem__(name)
        if isinstance(found, str):
            found = self.data[name] = importlib.import_module(found).TASK
        return found


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
