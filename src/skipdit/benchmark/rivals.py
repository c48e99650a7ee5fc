"""Finds the caches of other libraries, which are compared in a checkout of the repository and are no part of the wheel.

`benchmarks/rivals` has `rivals_of`, which makes them for a loaded model, and `COMPILED`, those that are compiled.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks" / "rivals"
NAME = "skipdit_rivals"


def load_rivals() -> ModuleType:
    """Import `benchmarks/rivals` of the checkout that this package is run from. `ValueError` where it is none."""
    if NAME in sys.modules:
        return sys.modules[NAME]
    path = FOLDER / "__init__.py"
    spec = importlib.util.spec_from_file_location(NAME, path, submodule_search_locations=[str(FOLDER)])
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(
            "caches of other libraries are set up in benchmarks/rivals of the repository, which this installation does "
            'not have: install a checkout (pip install -e ".[rivals]"), or leave them out: bench cache --no-rivals, '
            "bench compile --rivals without a name"
        )
    module = sys.modules[NAME] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[NAME]
        raise
    return module
