"""Finds the benchmarks that are run in a checkout of the repository and are no part of the wheel.

`benchmarks/rivals` sets up caches of other libraries, `benchmarks/compiling` compiles them and ours.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"


def load_from_checkout(name: str) -> ModuleType:
    """Import the package `benchmarks/{name}` of the checkout that this package is run from, as `skipdit_{name}`.

    `ValueError` where it is run from none.
    """
    module_name, path = f"skipdit_{name}", FOLDER / name / "__init__.py"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path, submodule_search_locations=[str(path.parent)])
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(
            f"this needs benchmarks/{name} of the repository, which this installation does not have: install a "
            'checkout (pip install -e ".[rivals]")' + "; or give --no-rivals" * (name == "rivals")
        )
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module
