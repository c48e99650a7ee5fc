"""Finds `benchmarks/rivals`, which sets up caches of other libraries; it is in a checkout, but not in the wheel."""

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType

LOGGER = logging.getLogger(__name__)
NAME = "skipdit_rivals"


def find_rivals() -> Path:
    """Return the folder in the checkout of this package, or else in the current directory; it may not exist."""
    checkouts = Path(__file__).resolve().parents[3], Path.cwd()
    folders = [folder / "benchmarks" / "rivals" for folder in checkouts if (folder / "src" / "skipdit").is_dir()]
    return next((folder for folder in folders if folder.is_dir()), folders[0] if folders else Path("benchmarks/rivals"))


def load_rivals() -> ModuleType | None:
    """Import the folder as `skipdit_rivals`; return `None`, with a warning, if there is no checkout."""
    path = find_rivals() / "__init__.py"
    if NAME in sys.modules:
        return sys.modules[NAME]
    if not path.is_file():
        LOGGER.warning('caches of other libraries are left out: they need a checkout (pip install -e ".[rivals]")')
        return None
    spec = importlib.util.spec_from_file_location(NAME, path, submodule_search_locations=[str(path.parent)])
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[NAME] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[NAME]
        raise
    return module
