"""What a new thing needs, as CONTRIBUTING says: one of each is added here to the tables, by one row or one file.

A task is added in `test_tasks.py`, a family of diffusers in `test_surgery_in_use.py`.
"""

import dataclasses
from pathlib import Path

import pytest
import tiny_model
import torch
from tiny import randomize
from torch import Tensor

import skipdit
from skipdit.cache.methods import METHODS, MethodEntry
from skipdit.cache.site import UnitRange
from skipdit.checkpoints import OWN_FOLDERS, load_model
from skipdit.diffusion import Objective, make_scheduler
from skipdit.metrics.table import ALWAYS, METRICS, Metric, compare_pictures, join_values, score_cells
from skipdit.models.long_skip import LongSkipConfig
from skipdit.pipelines import ClassToImagePipeline

FLOW = Objective(process="flow", prediction_type="flow_prediction")


def sample(pipeline: ClassToImagePipeline, steps: int = 6) -> Tensor:
    """Return the pictures of two classes (2 3 4 4) from seed 0."""
    generator = torch.Generator().manual_seed(0)
    output = pipeline([0, 1], num_inference_steps=steps, guidance_scale=2.0, generator=generator, output_type="pt")
    return output.images.float()


@pytest.fixture
def pipeline() -> ClassToImagePipeline:
    """A pipeline of the tests' own model."""
    model = randomize(tiny_model.Mixer(long_skip=LongSkipConfig().to_dict())).eval()
    pipeline = ClassToImagePipeline(model, make_scheduler(FLOW, "euler"))  # pyright: ignore[reportArgumentType]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_new_model_is_a_file_and_a_row(
    pipeline: ClassToImagePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tiny_model.py` and the row below are all: every kind of cache runs on it, and it is saved and opened."""
    full = sample(pipeline)
    for spec in ("N2", "skip-taylor:N3-o1", "delta:N2", "fora:N2", "fbcache:0.5"):
        with skipdit.cached(pipeline, spec) as cache:
            cached = sample(pipeline)
            assert cache.summary().steps_reused > 0, spec
        assert 0 < (cached - full).abs().max() < 1, spec
    with skipdit.cached(pipeline, "N1"):
        assert torch.equal(sample(pipeline), full)

    pipeline.transformer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be one of DiT"):
        load_model(tmp_path)
    monkeypatch.setitem(OWN_FOLDERS, "Mixer", tiny_model.read_folder)
    pipeline.transformer = load_model(tmp_path)
    assert type(pipeline.transformer) is tiny_model.Mixer
    assert torch.equal(sample(pipeline), full)


def test_a_new_cache_method_is_a_row(pipeline: ClassToImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of parts that exist: the offset of the last units, at an interval."""
    with pytest.raises(ValueError, match="last-units"):
        skipdit.enable_cache(pipeline.transformer, "last-units:N2")
    row = MethodEntry(source="this test", rules=lambda spec: (spec.rule(UnitRange(2, at="last")),))
    monkeypatch.setitem(METHODS, "last-units", row)
    full = sample(pipeline)
    with skipdit.cached(pipeline, "last-units:N2") as cache:
        assert not torch.equal(sample(pipeline), full)
        summary = cache.summary()
    assert (summary.steps_full, summary.steps_reused) == (3, 3)
    assert 1 < summary.compute_ratio < 1.5  # two of six units, at every second step


def test_a_new_metric_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its column is in every table, with its digits; others stay as they are."""

    def mean_error(pictures: Tensor, reference: Tensor) -> Tensor:
        return (pictures - reference).abs().mean(dim=(1, 2, 3))

    pictures = torch.rand(4, 3, 16, 16)
    before = score_cells(join_values([compare_pictures(pictures, pictures / 2)]))
    METRICS.append(Metric("error", "mean error", mean_error, digits=3, check=lambda: None))
    try:
        metrics = (*ALWAYS, METRICS[-1])
        scores = join_values([compare_pictures(pictures, pictures / 2, metrics)])
        expected = f"{pictures.mean() / 2:.3f}"
        assert str(score_cells(scores)["mean error"]).startswith(expected)
        assert score_cells(scores) == {**before, "mean error": score_cells(scores)["mean error"]}
        assert dataclasses.asdict(scores["error"])["mean"] == pytest.approx(float(pictures.mean() / 2))
    finally:
        METRICS.pop()
