"""Find files of installed packages."""

import importlib.util
from pathlib import Path


def find_in_package(package: str, *parts: str) -> Path | None:
    """Return a file of an installed package, which is not imported; `None` if it is not there."""
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or ()
    return next((file for folder in folders if (file := Path(folder).joinpath(*parts)).is_file()), None)
