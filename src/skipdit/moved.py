"""Modules that have moved: a script that imports one by its old name still works, with a `DeprecationWarning`."""

import importlib
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "skipdit.clips": "skipdit.data.clips",
    "skipdit.compare": "skipdit.sampling.compare",
    "skipdit.folders": "skipdit.data.folders",
    "skipdit.latents": "skipdit.data.latents",
    "skipdit.sample_set": "skipdit.sampling.sets",
    "skipdit.tables": "skipdit.data.tables",
    "skipdit.videos": "skipdit.data.videos",
}


class MovedModules(MetaPathFinder, Loader):
    """Find a module by its old name, and fill it with the names of the one in its place."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is {new} now: import that", DeprecationWarning, stacklevel=2)
        names = vars(importlib.import_module(new))
        vars(module).update({name: value for name, value in names.items() if not name.startswith("__")})
