"""`skipdit ema`: writes a pipeline whose weights are averaged over another length than those of a run."""

from pathlib import Path

from skipdit.files.output import absolute, atomic_folder, check_apart, check_replaceable
from skipdit.loading import load_source
from skipdit.training.loop import MAX_SHARD_SIZE
from skipdit.training.posthoc_ema import Combination, reconstruct


def write_average(run: Path, length: float, out: Path, step: int | None = None) -> Combination:
    """Write the pipeline of a run with averaged weights, in float32, into the folder `out`.

    length: standard deviation of the averaging weights over time, as a share of the steps up to `step`. step: that of a
    snapshot, by default the last. Raises `OSError` or `ValueError` if the run does not have such an average.
    """
    out = absolute(out)
    check_apart(out, [run])
    check_replaceable(out, "model")
    sampler = load_source(str(run), device="cpu", decodes=False).sampler
    average = reconstruct(run, sampler.pipeline.transformer, length, step)
    with atomic_folder(out, "model") as draft:
        sampler.save(draft, MAX_SHARD_SIZE)
    return average
