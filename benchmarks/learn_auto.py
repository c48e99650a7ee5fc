"""Learns the rule of `--cache auto` from calibrated models: `AUTO_DENSE`, `AUTO_SPARSE` and `AUTO_FACTORS`.

    python benchmarks/learn_auto.py emoji emoji-text emoji-clips emoji-text-clips --out out/auto

The effect of reuse at each step is measured once per model, as by `skipdit calibrate --method skip-taylor`, and stored
in `--out`: what is learned is measured with the first and the last unit fresh, and `auto` uses it for the output too.
Then densities and factors are changed at random, and a change is kept if the schedules come closer to the best ones
with equal compute: in the mean over models and speedups of the squared difference in predicted dB. `--without MODEL`
leaves a model out, to test the rule on it.
"""

import argparse
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from skipdit.cache import schedule as schedules
from skipdit.cache.methods import AUTO_FACTORS
from skipdit.cache.schedule import AUTO_TIMESTEPS, AutoSchedule, resolve
from skipdit.cache.site import MiddleUnits
from skipdit.calibration.calibrate import make_runner, progress
from skipdit.calibration.config import CalibrateConfig
from skipdit.calibration.find import COHERENCES, search_for
from skipdit.calibration.plan import plan
from skipdit.calibration.search import Search, Variants
from skipdit.calibration.trials import Measurement, Trials, measure
from skipdit.loading import load_source

SPEEDUPS = (1.4, 1.5, 1.65, 1.8, 1.9, 2.0, 2.25, 2.5, 2.8)
ORDER = 1
RANGE = math.log(0.05), math.log(100)  # of densities
WORST = 1e-3  # mean squared error (30 dB) of the best schedule, from which on no rule is useful
WIDEST = 15.0  # limit of the difference to the best schedule in dB, as no rule comes close everywhere
NUM_SAMPLES = {"class-to-video": 2, "text-to-video": 2}


def measured_of(name: str, out: Path, device: str) -> Measurement:
    """Measure a model, or read the stored measurement."""
    path = out / f"{name}.npz"
    if not path.exists():
        source = load_source(name, device=device)
        config = source.complete(CalibrateConfig(num_samples=NUM_SAMPLES.get(source.sampler.task.name, 4)))
        trials = Trials(orders=(ORDER,), max_age=10)
        run = make_runner(source, config)
        with progress(name, run.num_inference_steps + trials.num_probed + 1) as advance:
            measurement = measure(replace(run, advance=advance), MiddleUnits(), trials, advance=advance)
        arrays = asdict(measurement) | {"reference": measurement.reference.numpy()}
        del arrays["site"]
        out.mkdir(parents=True, exist_ok=True)
        np.savez(path, allow_pickle=False, **arrays)
    with np.load(path) as arrays:
        return Measurement(
            site=MiddleUnits(),
            changes=arrays["changes"],
            sensitivity=arrays["sensitivity"],
            reuse_costs=tuple(arrays["reuse_costs"].tolist()),
            num_units=int(arrays["num_units"]),
            timesteps=tuple(arrays["timesteps"].tolist()),
            reference=torch.from_numpy(arrays["reference"]),
        )


@dataclass(frozen=True)
class Rule:
    """The learned values at `AUTO_TIMESTEPS`."""

    dense: np.ndarray
    """logarithms of densities where many steps are full"""
    sparse: np.ndarray
    """logarithms of densities where few are"""
    factors: np.ndarray

    def perturb(self, generator: np.random.Generator, width: float) -> "Rule":
        size = self.dense.shape
        moves = (generator.normal(0, width, size) * (generator.random(size) < 0.3) for _ in range(3))
        dense, sparse = (np.clip(shape + next(moves), *RANGE) for shape in (self.dense, self.sparse))
        return Rule(dense, sparse, self.factors + 0.3 * next(moves))

    def apply(self) -> None:
        schedules.AUTO_DENSE, schedules.AUTO_SPARSE = tuple(np.exp(self.dense)), tuple(np.exp(self.sparse))
        schedules.auto_densities.cache_clear()


class Model:
    """One measured model, and its best schedules."""

    def __init__(self, name: str, measured: Measurement) -> None:
        self.name, self.measured = name, measured
        searches = [Search(measured, ORDER, coherence) for coherence in COHERENCES]
        fronts = [plan(search.errors(), coherence=search.coherence) for search in searches]
        self.search, self.best = searches[0], {}
        for speedup in SPEEDUPS:
            try:
                error = self.search.error(search_for(self.search, fronts, speedup=speedup))
            except ValueError:
                continue
            if error < WORST:
                self.best[speedup] = error
        self.known: dict[tuple[int, tuple[int, ...]], np.ndarray] = {}

    def parts(self, step: int, full: tuple[int, ...]) -> np.ndarray:
        """Return the change by the last values, and that by the term that a factor multiplies."""
        if (step, full) not in self.known:
            root = math.sqrt(self.measured.sensitivity[step])
            self.known[step, full] = self.search.terms(step, full) @ self.measured.changes[0, step] * root
        return self.known[step, full]

    def error(self, variants: Variants, factors: np.ndarray) -> float:
        changes: list[np.ndarray] = []
        full = tuple[int, ...]()
        at = np.interp(self.measured.timesteps, AUTO_TIMESTEPS, factors)
        for step, variant in enumerate(variants):
            if variant is None:
                full = (*full, step)[-ORDER - 1 :]
            elif step - full[0] > self.search.lookback:
                return math.inf
            else:
                first, *others = self.parts(step, full)
                changes.append(first + sum(at[step] * other for other in others))
        stack, share = np.stack(changes), self.search.coherence
        together = float(np.square(stack.sum(axis=0)).mean())
        return (1 - share) * float(np.square(stack).mean(axis=1).sum()) + share * together

    def behind(self, rule: Rule) -> dict[float, float]:
        """Return by how many dB the rule falls behind the best schedule, by speedup."""
        rule.apply()
        differences = {}
        for speedup, best in self.best.items():
            full = resolve(
                AutoSchedule(speedup=speedup).for_cost(self.measured.reuse_costs[0]), self.measured.timesteps
            )
            if all(full):
                continue
            error = self.error(tuple(None if is_full else 0 for is_full in full), rule.factors)
            differences[speedup] = min(10 * math.log10(max(error, 1e-12) / max(best, 1e-12)), WIDEST)
        return differences


def loss(models: list[Model], rule: Rule) -> float:
    return float(np.mean([np.mean(np.square(list(model.behind(rule).values()))) for model in models]))


def learn(models: list[Model], num_trials: int, seed: int) -> Rule:
    generator = np.random.default_rng(seed)
    dense, sparse = np.log(np.array(schedules.AUTO_DENSE)), np.log(np.array(schedules.AUTO_SPARSE))
    best = Rule(dense, sparse, np.array(AUTO_FACTORS))
    least_loss = loss(models, best)
    for trial in range(num_trials):
        candidate = best.perturb(generator, 0.6 * 0.1 ** (trial / num_trials))
        candidate_loss = loss(models, candidate)
        if candidate_loss < least_loss:
            best, least_loss = candidate, candidate_loss
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--without", nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path("out/auto"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the measurement")
    parser.add_argument("--trials", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    models = [Model(name, measured_of(name, arguments.out, arguments.device)) for name in arguments.models]
    rule = learn([model for model in models if model.name not in arguments.without], arguments.trials, arguments.seed)
    print("AUTO_TIMESTEPS =", AUTO_TIMESTEPS)
    values = {"DENSE": np.exp(rule.dense), "SPARSE": np.exp(rule.sparse), "FACTORS": rule.factors}
    for name, array in values.items():
        print(f"AUTO_{name} =", tuple(round(float(value), 2) for value in array))
    for model in models:
        left_out = " (left out)" if model.name in arguments.without else ""
        behind = ", ".join(f"{speedup:g}x {decibel:.1f}" for speedup, decibel in model.behind(rule).items())
        print(f"{model.name}{left_out}: predicted dB behind the best: {behind}")


if __name__ == "__main__":
    main()
