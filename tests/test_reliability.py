"""docs/reliability.md says what the code does."""

import importlib
import re
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def text(repo_root: Path) -> str:
    return (repo_root / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_the_limits_are_those_of_the_code(text: str) -> None:
    rows = re.findall(r"^\| `([\w.]+)\.([A-Z_]+)` \| ([\d,]+) \|", text, re.MULTILINE)
    assert len(rows) > 30
    for module, name, value in rows:
        assert getattr(importlib.import_module(f"skipdit.{module}"), name) == int(value.replace(",", "")), name


def test_every_named_test_file_exists(text: str, repo_root: Path) -> None:
    for line in re.findall(r"^\*`.*\*$", text, re.MULTILINE):
        for name in re.findall(r"`(?:tests/)?([\w*]+\.py)`", line):
            assert list((repo_root / "tests").glob(name)), name
