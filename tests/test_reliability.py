"""docs/reliability.md says what the code does, and names the tests that hold it."""

import ast
import asyncio
import importlib
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import tiny_dit
from torch import Tensor

import skipdit
from skipdit.diffusion import Objective, make_scheduler
from skipdit.pipelines import ClassToImagePipeline


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


def test_every_fault_has_a_test_that_exists(text: str, repo_root: Path) -> None:
    table = text.partition("\n## Every fault, and the test that holds it\n")[2]
    rows = [line for line in table.splitlines() if line.startswith("| ") and line != "| fault | test |"]
    assert len(rows) > 100
    defined: dict[str, set[str]] = {}
    for row in rows:
        named = re.findall(r"`tests/(\w+\.py)::(\w+)`", row)
        assert named, row
        for file, name in named:
            if file not in defined:
                tree = ast.parse((repo_root / "tests" / file).read_text(encoding="utf-8"))
                defined[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert name.startswith("test_"), row
            assert name in defined[file], row


def test_dependencies_begin_where_the_page_says(text: str, repo_root: Path) -> None:
    project = tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = dict(re.findall(r"([\w-]+)>=([\d.]+)", "\n".join(project["dependencies"])))
    assert f"begin at torch {asked['torch']} and Pillow {asked['pillow'].removesuffix('.0')}," in text
    known_holes = {"torch": (2, 10), "pillow": (12, 3)}
    for name, fixed in known_holes.items():
        assert tuple(map(int, asked[name].split("."))) >= fixed


# ----------------------------------------------------------------------------------------------------------------------
# What a server does with pipelines over one cached model


@pytest.fixture
def pipelines() -> list[ClassToImagePipeline]:
    model = tiny_dit(4)
    both = [ClassToImagePipeline(model, make_scheduler(Objective(), "ddim")) for _ in range(2)]
    for pipeline in both:
        pipeline.set_progress_bar_config(disable=True)
        skipdit.enable_cache(pipeline, "N2")
    return both


def sample(pipeline: ClassToImagePipeline, label: int, num_inference_steps: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(label)
    return pipeline(
        [label], num_inference_steps=num_inference_steps, generator=generator, output_type="latent", guidance_scale=2.0
    ).images


def test_asyncio_with_a_pipeline_for_each_task(pipelines: list[ClassToImagePipeline]) -> None:
    steps = (4, 6)
    alone = [[sample(pipelines[0], label, steps[number]) for label in range(8)] for number in range(2)]

    async def requests(number: int) -> list[Tensor]:
        return [
            await asyncio.to_thread(sample, pipelines[number], label, steps[number]) for label in range(8)
        ]  # fmt: skip

    async def serve() -> list[list[Tensor]]:
        return list(await asyncio.gather(requests(0), requests(1)))

    for expected, found in zip(alone, asyncio.run(serve()), strict=True):
        assert all(map(torch.equal, expected, found))


def test_a_run_and_a_fork_inside_a_run_disturb_none(
    pipelines: list[ClassToImagePipeline],
) -> None:
    outer, inner = pipelines
    expected, expected_inside = sample(outer, 1), sample(inner, 2, 4)
    inside: list[bool] = []

    def run() -> None:
        inside.append(torch.equal(sample(inner, 2, 4), expected_inside))

    def fork() -> None:
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(sample(inner, 2, 4), expected_inside) else 1)
        inside.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0)

    for act in (run, fork):
        assert torch.equal(in_the_middle(outer, act), expected)
    assert inside == [True, True]


def test_another_cache_in_the_middle_of_a_run_is_that_of_the_next(
    pipelines: list[ClassToImagePipeline],
) -> None:
    pipeline, other = pipelines
    skipdit.enable_cache(other, "N3")
    expected = sample(other, 1)
    skipdit.enable_cache(pipeline, "N2")
    in_the_middle(pipeline, lambda: skipdit.enable_cache(pipeline, "N3"))
    assert torch.equal(sample(pipeline, 1), expected)


def in_the_middle(pipeline: ClassToImagePipeline, act: Callable[[], object]) -> Tensor:
    """Sample, and act once after the third call of the model."""
    calls: list[int] = []

    def after(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            handle.remove()
            act()

    handle = pipeline.transformer.register_forward_hook(after)
    return sample(pipeline, 1)
