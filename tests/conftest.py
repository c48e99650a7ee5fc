"""Fixtures of every test."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the network

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

REPO_ROOT = Path(__file__).resolve().parents[1]

# Shapes and types of the pure functions only: torch.compile also traces the models. As for a type checker, an int is a
# float. (The option --jaxtyping-packages of jaxtyping 0.3 does not take a configured checker with several packages.)
install_import_hook(
    ["skipdit.diffusion", "skipdit.metrics", "skipdit.cache.schedule"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)
torch.set_num_threads(1)
hypothesis.settings.register_profile("skipdit", deadline=None, derandomize=True)
hypothesis.settings.load_profile("skipdit")


@pytest.fixture(autouse=True)
def manual_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return REPO_ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the repository with reference outputs and data, where there is one."""
    folder = REPO_ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder shared/ beside the repository")
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The totals of a long run over hostile files."""
    runs = sys.modules.get("hostile_runs")
    if runs and runs.LONG and runs.ALL_TOTALS:
        terminalreporter.section("hostile files")
        for line in runs.table():
            terminalreporter.line(line)
