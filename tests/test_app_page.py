"""The functions behind the page: what a choice changes on it, and what it keeps."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_dit

pytest.importorskip("gradio", reason='needs the page: pip install "skipdit[app]"')

import skipdit.app.models
from skipdit.app.downloads import Downloads
from skipdit.app.generate import Shown, Side
from skipdit.app.jobs import Jobs
from skipdit.app.models import Models, labels_of
from skipdit.app.page import NUM_KEPT, Page
from skipdit.diffusion import Objective, make_scheduler
from skipdit.pipelines import ClassToImagePipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline of 16x16 pixels."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("home") / "tiny"
    model = tiny_dit(6, sample_size=16, patch_size=4, in_channels=3, out_channels=3, num_classes=4)
    scheduler = make_scheduler(Objective(process="flow", prediction_type="flow_prediction"), "euler")
    ClassToImagePipeline(model, scheduler).save_pretrained(path)
    return path


def page_of(*paths: Path) -> Any:
    """A page, built: its components are its members."""
    jobs = Jobs()
    jobs.close()
    page = Page(Models([str(path) for path in paths], device="cpu"), jobs, Downloads(), [])

    async def build() -> None:
        page.build()

    asyncio.run(build())  # elsewhere Gradio makes event loops of its own, and leaves them open
    return page


def test_the_samples_of_the_last_comparisons_stay_in_memory(folder: Path) -> None:
    """All of them stayed, in each page's state."""
    page = page_of(folder)
    samples = torch.rand(1, 3, 8, 8)
    sides = Side("full", 4, samples=samples, seconds=1), Side("cached", 4, samples=samples / 2, seconds=1)
    tokens = [page.comparisons.keep(Shown(*sides, [f"number {number}"], "N2")) for number in range(NUM_KEPT + 2)]
    assert len(page.comparisons.kept) == NUM_KEPT
    for number, token in enumerate(tokens):
        drawn = page.amplify(token, 10)
        assert (f"number {number}" in drawn) is (number >= 2)
        assert ("no longer in memory: generate them again" in drawn) is (number < 2)
    assert page.amplify(None, 10) == ""


def test_a_schedule_is_offered_on_its_own_model_alone(folder: Path) -> None:
    page = page_of(folder)
    own = {"tiny": {"made here": object()}}
    changes = page.offer_made("tiny", own, ("tiny", "made here"))
    assert changes[page.other]["value"] == "made here"
    assert changes[page.budget] == "Other"
    for others in (("emoji", own, ("tiny", "made here")), ("tiny", own, None)):  # another model; none was made
        assert "value" not in page.offer_made(*others)[page.other]


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of memory (CUDA out of memory"),
        (RuntimeError("CUDA error: invalid device ordinal"), "CUDA error: invalid device ordinal"),
        (MemoryError(), "out of memory"),
    ],
)
def test_a_model_that_cannot_be_opened_is_said_with_what_to_do(
    error: Exception, what: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page showed no more than the word Error."""

    def fail(*args: object, **options: object) -> None:
        raise error

    page = page_of(folder)
    monkeypatch.setattr(skipdit.app.models, "load_source", fail)
    (note,) = page.choose_model("emoji", {}).values()
    assert f"emoji cannot be opened ({what}" in note
    assert "choose another model, or start the page with another --device, or --dtype bfloat16" in note
    assert "value" in str(page.choose_model("tiny", {})[page.labels])  # which is in memory


@pytest.mark.filterwarnings("ignore")  # of transformers and diffusers, about files as they were published
def test_pipelines_of_diffusers_have_their_classes_steps_and_guidance(folder: Path, tmp_path: Path) -> None:
    """DiT of diffusers could not be chosen, and FLUX was run with the guidance of our models."""
    pytest.importorskip("transformers")
    pytest.importorskip("sentencepiece")
    from published import dit_xl_2, flux_dev

    page = page_of(dit_xl_2(tmp_path / "dit"), flux_dev(tmp_path / "flux"))
    assert {"class 7", "the 7th"} < set(labels_of(page.models.open("dit")))
    assert labels_of(page.models.open("flux")) == []
    for name, steps, scale in (("dit", 50, 4.0), ("flux", 28, 3.5), ("emoji", 50, 2.0)):
        changes = page.choose_model(name, {})
        assert (changes[page.steps], changes[page.wanted_steps]) == (steps, steps)
        assert (changes[page.guidance]["value"], changes[page.guidance]["visible"]) == (scale, True)
