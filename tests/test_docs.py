"""README and docs: every Python block runs, every command parses, every link leads somewhere, and the site builds.

In front of a Python block, `<!-- setup: NAME -->` names what stands before it (`docs_setups.py`), and `<!-- not run:
REASON -->` says why it is only compiled. Commands are parsed by the real command line; those of `EXECUTED` are run as
well, and `test_real_formats.py` runs those of published weights.
"""

import ast
import importlib
import importlib.util
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from docs_setups import SETUPS

import skipdit.commands
from skipdit import command_options
from skipdit.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"(?:<!--((?:(?!-->).)*)-->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND_LINES = ("console", "bash", "shell")
LANGUAGES = ("python", "text", *COMMAND_LINES)
LAUNCHERS = ("torchrun", "accelerate")
# commands that are run, with options that make them short
EXECUTED = {
    "skipdit info": [],
    "skipdit sample": ["--num-samples", "1", "--steps", "2", "--cache", "none", "--out", "out"],
    "skipdit train emoji --max-steps 20 --out runs/try": [
        "--max-steps", "1", "--batch-size", "2", "--num-samples", "1", "--sample-steps", "1", "--device", "cpu",
        "--model.num-layers", "4",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    mark: str
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in FENCE.finditer(text):
            mark, language, code = found.groups()
            line = text.count("\n", 0, found.start(3)) + 1
            yield Block(str(page.relative_to(ROOT)), line, (mark or "").strip(), language, code)


BLOCKS = list(blocks())
PYTHON = [block for block in BLOCKS if block.language == "python"]


def commands() -> Iterator[tuple[Block, list[str]]]:
    """Each command, in words, without its comment."""
    for block in BLOCKS:
        if block.language in COMMAND_LINES:
            for line in block.code.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield block, words


class Parsed(BaseException):
    """The command line was understood."""


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands read their options and then stop."""

    def parse(*arguments: Any) -> Any:
        command_options.parse(*arguments)
        raise Parsed

    for module in pkgutil.iter_modules(skipdit.commands.__path__):
        command: Any = importlib.import_module(f"skipdit.commands.{module.name}")
        if "parse" in vars(command):
            monkeypatch.setattr(command, "parse", parse)


def check_parses(arguments: Sequence[str]) -> None:
    name, *rest = arguments
    assert name in COMMANDS, arguments
    with pytest.raises(Parsed):
        COMMANDS[name](rest)


# ----------------------------------------------------------------------------------------------------------------------
# Blocks


def test_every_block_has_a_language_that_is_checked() -> None:
    assert len(PYTHON) > 15
    assert [f"{block}: {block.language!r}" for block in BLOCKS if block.language not in LANGUAGES] == []


@pytest.mark.filterwarnings("ignore")  # of diffusers and transformers, about tiny models
@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_every_python_block_runs(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = compile(block.code, str(block), "exec")
    kind, _, rest = block.mark.partition(":")
    if kind == "not run":
        assert rest.strip(), f"{block} does not say why it is not run"
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "skipdit":
                assert hasattr(skipdit, node.attr), f"{block}: skipdit.{node.attr}"
        return
    assert kind in ("", "setup"), f"{block}: {block.mark}"
    monkeypatch.chdir(tmp_path)
    names = SETUPS[rest.strip() or "none"](monkeypatch, tmp_path)
    exec(code, names)
    if "cache_summary(pipe))" in block.code and "pipe(" in block.code:
        assert re.search(r"[1-9]\d* full, [1-9]\d* reused", capsys.readouterr().out), f"{block} reused nothing"


@pytest.mark.usefixtures("parse_only")
def test_every_command_parses() -> None:
    seen = 0
    for block, words in commands():
        where = f"{block}: {' '.join(words)}"
        while "=" in words[0]:  # an environment variable
            words = words[1:]
        if words[0] in LAUNCHERS:
            words = ["skipdit", *words[words.index("skipdit") + 1 :]]
        if words[0] == "skipdit":
            try:
                check_parses(words[1:])
            except ValueError as error:
                pytest.fail(f"{where}: {error}")
            seen += 1
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), where
        elif words[0] == "pytest":
            assert all((ROOT / word).is_file() for word in words if word.startswith("tests/")), where
        else:
            assert words[0] in ("pip", "ruff", "pyright", "lint-imports", "mkdocs", "git", "ssh"), where
    assert seen > 50


def test_a_command_that_does_not_parse_is_found(parse_only: None) -> None:
    check_parses(["sample", "--cache", "N2"])
    with pytest.raises(ValueError, match="no-such-option"):
        check_parses(["sample", "--no-such-option", "2"])


def test_every_cache_that_is_shown_is_one() -> None:
    from skipdit.cache.methods import parse_method

    specs = {words[words.index("--cache") + 1] for _, words in commands() if "skipdit" in words and "--cache" in words}
    assert len(specs) > 4
    for spec in specs:
        if not spec.startswith(("calibrated", "none")) and not spec.endswith(".json"):
            parse_method(spec)


def test_every_extra_that_is_shown_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    shown = set(re.findall(r"pip install (?:-e )?\"?(?:skipdit|\.)\[([\w,]+)\]", text))
    assert {"text", "plots"} <= shown
    assert {name for names in shown for name in names.split(",")} <= set(project["optional-dependencies"])


@pytest.mark.parametrize("command", EXECUTED)
def test_short_commands_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(command)
    assert any(shown[: len(words)] == words for _, shown in commands())
    monkeypatch.chdir(tmp_path)
    main([*words[1:], *EXECUTED[command]])
    assert capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Links and the site


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as Python-Markdown and GitHub make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "") for heading in headings]
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in plain}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_inside_the_project_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name} links to {target}"
        assert found.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(found), f"{page.name} links to {target}"


def test_every_page_is_reached_from_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if page not in menu} == {"stability/report.md"}  # which stability.md links to


@pytest.mark.skipif(importlib.util.find_spec("mkdocstrings") is None, reason='needs pip install ".[docs]"')
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    site = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert "enable_cache" in site
    assert "Raises" in site
    page = (tmp_path / "site" / "how-to" / "pick-a-cache" / "index.html").read_text(encoding="utf-8")
    assert 'src="../../benchmarks/cache_quality.png"' in page
    assert (tmp_path / "site" / "benchmarks" / "cache_quality.png").is_file()
