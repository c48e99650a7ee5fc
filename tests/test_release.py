"""What a release contains: every file of the package, licences for all that is bundled, and metadata that installs."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

import skipdit

PACKAGE = "src/skipdit"
ALWAYS = {"README.md", "LICENSE", "NOTICE", "pyproject.toml"}  # in a source distribution, without being named
NEEDED = (  # by the tests and the documentation of a source distribution
    "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "mkdocs.yml",
    "tests/test_release.py", "tests/families/table.py", "docs/index.md", "docs/pictures/long_skips.png",
    "benchmarks/cache_quality.md", "benchmarks/skipdit.json", "benchmarks/rivals/__init__.py", ".ci/run",
    ".github/workflows/ci.yml",
)  # fmt: skip


def tracked(root: Path, *folders: str) -> set[str]:
    """The files of a checkout, those that are not committed yet too."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *folders]
    listing = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip("needs a git checkout")
    return {name for name in listing.stdout.split("\0") if name and (root / name).is_file()}


@pytest.fixture(scope="module")
def project(repo_root: Path) -> dict[str, Any]:
    return tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_a_wheel_holds_every_file_of_the_package(repo_root: Path) -> None:
    files = {file.distribution_path for file in WheelBuilder(str(repo_root)).recurse_included_files()}
    assert files == {name.removeprefix("src/") for name in tracked(repo_root, PACKAGE)}
    assert {Path(name).suffix for name in files} >= {".py", ".json", ".safetensors", ".parquet", ".md", ".typed"}


def test_a_source_distribution_holds_what_its_tests_need(repo_root: Path) -> None:
    files = {file.distribution_path for file in SdistBuilder(str(repo_root)).recurse_included_files()}
    assert set(NEEDED) <= files
    assert tracked(repo_root, PACKAGE, "tests", "docs", "benchmarks") <= files
    assert not [name for name in files if name.startswith(("out/", "runs/", "shared/"))]


def test_every_bundled_file_has_a_licence(repo_root: Path, project: dict[str, Any]) -> None:
    notice = (repo_root / "NOTICE").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| .* \| (MIT|Apache-2\.0) \|$", notice, re.MULTILINE)
    assert len(rows) == 4
    listed = {name for row, _ in rows for name in row.split(" (")[0].split(", ")}
    assets = repo_root / PACKAGE / "assets"
    for path in assets.rglob("*"):
        name = path.relative_to(assets)
        if path.is_file() and name.suffix != ".md" and "__pycache__" not in name.parts:
            assert listed & {str(name), name.parts[0]}, name
            assert name.parts[0] != "emoji" or str(name) in listed, name
    for name in project["license-files"]:
        assert (repo_root / name).is_file()
    assert project["license"] == "Apache-2.0"


def test_versions_agree(repo_root: Path, project: dict[str, Any]) -> None:
    citation = yaml.safe_load((repo_root / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["version"] == citation["version"] == skipdit.__version__
    assert citation["license"] == project["license"]
    readme = (repo_root / "README.md").read_text(encoding="utf-8")
    (torch,) = (name for name in project["dependencies"] if name.startswith("torch>"))
    least, beyond = re.fullmatch(r"torch>=2\.(\d+),<2\.(\d+)", torch).groups()  # type: ignore[union-attr]
    assert f"torch 2.{least} to 2.{int(beyond) - 1}." in readme
    assert f"Python {project['requires-python'].removeprefix('>=')} or newer" in readme
    (diffusers,) = (name for name in project["dependencies"] if name.startswith("diffusers"))
    assert f"diffusers is held at {re.findall(r'>=([0-9.]+)', diffusers)[0]}" in readme


def test_the_extra_of_tests_brings_what_they_import(project: dict[str, Any]) -> None:
    """The other extras are parts of it, but for the caches of another library."""
    extras = {
        name: {re.split(r"[=<>\[]", each)[0] for each in packages}
        for name, packages in project["optional-dependencies"].items()
    }
    for name in ("text", "plots", "pipelines", "docs", "metrics", "tensorboard", "app"):
        assert extras[name] <= extras["test"], name


def test_the_workflow_runs_what_it_names(repo_root: Path) -> None:
    workflow = yaml.safe_load((repo_root / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert ".ci/run" in steps
    assert (repo_root / ".ci" / "run").stat().st_mode & 0o100
    assert "mkdocs build --strict" in steps
    for path in (repo_root / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        template = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert path.name == "config.yml" or {"name", "description", "body"} <= set(template)


@pytest.mark.slow
def test_both_build_and_the_source_builds_the_same_wheel(repo_root: Path, tmp_path: Path) -> None:
    """`python -m build` makes the wheel from the source distribution."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(repo_root)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,), (source,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {name.removeprefix("src/") for name in tracked(repo_root, PACKAGE)}
    assert files == {name for name in names if ".dist-info/" not in name}
    info = f"skipdit-{skipdit.__version__}.dist-info"
    assert {f"{info}/licenses/{name}" for name in ("LICENSE", "NOTICE", f"{PACKAGE}/assets/emoji/LICENSES.md")} <= names
    assert b"skipdit = skipdit.cli:main" in zipfile.ZipFile(wheel).read(f"{info}/entry_points.txt")
    with tarfile.open(source) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {*NEEDED, *ALWAYS} <= inside
