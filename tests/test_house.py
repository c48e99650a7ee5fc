"""The house rules that a linter does not know: names, layers, sizes, what is shipped."""

import ast
import importlib
import importlib.metadata
import importlib.resources
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import skipdit
from skipdit.files.output import check_whole
from skipdit.moved import MOVED

MAX_FUNCTION_LINES = 60
PIECES = ("startswith", "endswith", "removeprefix", "removesuffix", "partition", "rpartition", "split", "find")
MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(?:work|root|home|Users)/|/tmp/[\w-]*venv")


def run_python(code: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", skipdit.__all__)
def test_exported_name_resolves(name: str) -> None:
    exported = getattr(skipdit, name)
    assert exported.__name__ == name
    assert exported.__module__ == skipdit._MODULES[name]
    assert name in dir(skipdit)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        skipdit.no_such_name  # noqa: B018


@pytest.mark.parametrize("name", MOVED)
def test_a_module_that_has_moved_is_found_by_its_old_name(name: str) -> None:
    sys.modules.pop(name, None)
    with pytest.warns(DeprecationWarning, match=f"{name} is {MOVED[name]} now"):
        old = importlib.import_module(name)
    new = importlib.import_module(MOVED[name])
    public = [each for each in vars(new) if not each.startswith("__")]
    assert public
    assert all(getattr(old, each) is getattr(new, each) for each in public)


def test_version_is_that_of_the_distribution() -> None:
    assert skipdit.__version__ == importlib.metadata.version("skipdit")


def test_type_checkers_see_what_the_table_exports() -> None:
    tree = ast.parse(Path(skipdit.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imported == skipdit._MODULES


def test_import_is_light() -> None:
    result = run_python("import sys, skipdit; dir(skipdit); print(*sys.modules)")
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert "skipdit" in loaded
    assert not loaded & {"accelerate", "datasets", "diffusers", "matplotlib", "numpy", "torch", "transformers"}


def test_a_model_finds_its_verbs_by_itself(tmp_path: Path) -> None:
    """Where nothing but its own module was imported."""
    code = f"""
import sys, diffusers
from skipdit.models.dit import DiT
from skipdit.models.surgery import add_long_skips, long_skip_class
assert "skipdit.cache.enable" not in sys.modules and "skipdit.checkpoints" not in sys.modules
model = DiT(num_layers=4, num_attention_heads=1, attention_head_dim=8, sample_size=4)
model.enable_cache("delta:N2")
assert model.is_cache_enabled
model.disable_cache()
assert not model.is_cache_enabled
sizes = dict(num_attention_heads=1, attention_head_dim=8, sample_size=4, num_layers=2, num_embeds_ada_norm=4)
linked = diffusers.DiTTransformer2DModel(**sizes, in_channels=4, norm_num_groups=1)
add_long_skips(linked)
linked.save_pretrained({str(tmp_path)!r})
assert type(long_skip_class(diffusers.DiTTransformer2DModel).from_pretrained({str(tmp_path)!r})) is type(linked)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_layers_hold(repo_root: Path) -> None:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command(['--no-cache'])"
    result = run_python(code, cwd=repo_root)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_files_and_functions_are_short(repo_root: Path) -> None:
    too_long = []
    for folder, max_lines in (("src", 500), ("tests", 600)):
        for path in sorted((repo_root / folder).rglob("*.py")):
            code = path.read_text(encoding="utf-8")
            if (length := len(code.splitlines())) > max_lines:
                too_long.append(f"{path.name}: {length} lines")
            for node in ast.walk(ast.parse(code)) if folder == "src" else ():
                if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES:
                    too_long.append(f"{path.name}: {node.name}")
    assert too_long == []


def test_few_places_ask_for_a_type(repo_root: Path) -> None:
    calls = 0
    for path in (repo_root / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            calls += isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
    assert calls < 50


def test_tracked_files_name_no_machine_path(repo_root: Path) -> None:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repo_root,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("needs a git checkout")
    found = []
    for name in filter(None, listing.stdout.split("\0")):
        path = repo_root / name
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" not in content:
            lines = enumerate(content.decode("utf-8", "replace").splitlines(), start=1)
            found += [f"{name}:{number}" for number, line in lines if MACHINE_PATH.search(line)]
    assert found == []


def test_benchmarks_are_those_that_commands_wrote(repo_root: Path) -> None:
    """So that `skipdit bench ... --out benchmarks` may write them anew. After editing one by hand list it again:
    `OutputFolder(Path("benchmarks"), "bench").adopt(name)`."""
    check_whole(repo_root / "benchmarks", "bench")


def test_package_ships_its_assets() -> None:
    package = importlib.resources.files("skipdit")
    assert package.joinpath("py.typed").is_file()
    emoji = package.joinpath("assets", "emoji")
    licences = emoji.joinpath("LICENSES.md").read_text(encoding="utf-8")
    assert "Copyright (c) Microsoft Corporation" in licences
    assert "Copyright (c) 2023 LobeHub" in licences
    assert "Miles Johnson" in licences
    with importlib.resources.as_file(emoji.joinpath("fluent_emoji_64.parquet")) as path:
        table = pq.read_table(path)
    assert table.num_rows == 1601
    assert {"emoji", "label", "group", "image"} <= set(table.column_names)


def lines_that_spell_a_task(code: str) -> list[int]:
    """The lines that compare something with a task's name, or take the name of a task to pieces."""
    from skipdit.tasks import TASKS

    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Compare | ast.MatchValue):
            parts = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
            if any(isinstance(part, str) and part in TASKS for part in parts):
                found.add(node.lineno)
        if isinstance(node, ast.Attribute) and node.attr in PIECES and "task" in ast.unparse(node.value):
            found.add(node.lineno)
    return sorted(found)


@pytest.mark.parametrize(
    "code",
    [
        'task == "text-to-image"',
        '"class-to-video" in config.tasks',
        'size.task.endswith("video")',
        'BUNDLED[model].task.startswith("class")',
        'sampler.task.name.partition("-")',
        'match name:\n    case "text-to-video":\n        pass',
    ],
)
def test_what_spells_a_task_is_found(code: str) -> None:
    assert lines_that_spell_a_task(code)


def test_no_task_is_told_by_its_name(repo_root: Path) -> None:
    """What differs between tasks is a member of the task."""
    files = sorted((repo_root / "src").rglob("*.py"))
    found = {str(path.relative_to(repo_root)): lines_that_spell_a_task(path.read_text("utf-8")) for path in files}
    assert {path: lines for path, lines in found.items() if lines} == {}
