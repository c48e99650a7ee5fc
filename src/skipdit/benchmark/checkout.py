"""Finds `benchmarks/rivals`, which sets up caches of other libraries and is in a checkout only, not in the wheel."""

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType

LOGGER = logging.getLogger(__name__)
NAME = "skipdit_rivals"


def find_rivals() -> Path:
    """Return their folder, which need not be there: of the checkout that this package, or else the command, is run
    from."""
    checkouts = Path(__file__).resolve().parents[3], Path.cwd()
    folders = [folder / "benchmarks" / "rivals" for folder in checkouts if (folder / "src" / "skipdit").is_dir()]
    return next((folder for folder in folders if folder.is_dir()), folders[0] if folders else Path("benchmarks/rivals"))


def load_rivals() -> ModuleType | None:
    """Import them as `skipdit_rivals`; say in a warning that they are left out where there is no checkout."""
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
