"""Learns the rule of `--cache auto` from calibrated models: `RULE` of `skipdit.cache.auto`.

    python benchmarks/learn_auto.py emoji emoji-text emoji-clips emoji-text-clips --out out/auto

The effect of reuse at each step is measured once per model, as by `skipdit calibrate`, and stored in `--out`. `--site`
tells where values are reused: with the first and the last unit fresh (`units`, from which today's rule is), or at the
output of the whole model. Then densities and factors are changed at random, and a change is kept if the schedules come
closer to the best ones with equal compute: in the mean over models and speedups of the squared difference in predicted
dB. `--without MODEL` leaves a model out, to test the rule on it.
"""

import argparse
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from skipdit.cache import auto
from skipdit.cache.auto import TIMESTEPS, AutoRule, AutoSchedule
from skipdit.cache.schedule import resolve
from skipdit.cache.site import MiddleUnits, Site, WholeOutput
from skipdit.calibration.calibrate import make_runner, progress
from skipdit.calibration.config import CalibrateConfig
from skipdit.calibration.find import COHERENCES, search_for
from skipdit.calibration.plan import plan
from skipdit.calibration.search import Search, Variants
from skipdit.calibration.trials import Measurement, Trials, measure
from skipdit.loading import load_source

SITES: dict[str, Site] = {"output": WholeOutput(), "units": MiddleUnits()}
SPEEDUPS = (1.4, 1.5, 1.65, 1.8, 1.9, 2.0, 2.25, 2.5, 2.8, 3.2, 4.0)
MAX_AGE = 12
RANGE = math.log(0.05), math.log(100)  # of densities
WORST = 1e-3  # mean squared error (30 dB) of the best schedule, from which on no rule is useful
WIDEST = 15.0  # limit of the difference to the best schedule in dB, as no rule comes close everywhere
NUM_SAMPLES = {"class-to-video": 2, "text-to-video": 2}


def measured_of(name: str, where: str, out: Path, device: str) -> Measurement:
    """Measure a model, or read the stored measurement. where: one of `SITES`."""
    path, site = out / f"{name}-{where}.npz", SITES[where]
    if not path.exists():
        source = load_source(name, device=device)
        config = source.complete(CalibrateConfig(num_samples=NUM_SAMPLES.get(source.sampler.task.name, 4)))
        trials = Trials(max_age=MAX_AGE)
        run = make_runner(source, config)
        with progress(name, run.num_inference_steps + trials.num_probed + 1) as advance:
            measurement = measure(replace(run, advance=advance), site, trials, advance=advance)
        arrays = asdict(measurement) | {"reference": measurement.reference.numpy()}
        del arrays["site"]
        out.mkdir(parents=True, exist_ok=True)
        np.savez(path, allow_pickle=False, **arrays)
    with np.load(path) as arrays:
        return Measurement(
            site=site,
            changes=arrays["changes"],
            sensitivity=arrays["sensitivity"],
            reuse_costs=tuple(arrays["reuse_costs"].tolist()),
            num_units=int(arrays["num_units"]),
            timesteps=tuple(arrays["timesteps"].tolist()),
            reference=torch.from_numpy(arrays["reference"]),
        )


@dataclass(frozen=True)
class Rule:
    """The learned values at `TIMESTEPS`."""

    dense: np.ndarray
    """logarithms of densities where many steps are full"""
    sparse: np.ndarray
    """logarithms of densities where few are"""
    factors: np.ndarray
    """of each term of the prediction"""

    def perturb(self, generator: np.random.Generator, width: float) -> "Rule":
        def move(values: np.ndarray) -> np.ndarray:
            return generator.normal(0, width, values.shape) * (generator.random(values.shape) < 0.3)

        dense, sparse = (np.clip(shape + move(shape), *RANGE) for shape in (self.dense, self.sparse))
        return Rule(dense, sparse, self.factors + 0.3 * move(self.factors))

    def rounded(self) -> AutoRule:
        """Return the rule as it is written in `skipdit.cache.auto`."""
        dense, sparse, *factors = (
            tuple(np.round(row, 2).tolist()) for row in (np.exp(self.dense), np.exp(self.sparse), *self.factors)
        )
        return AutoRule(dense, sparse, tuple(factors))

    def apply(self) -> None:
        auto.RULE = self.rounded()


class Model:
    """One measured model, and its best schedules."""

    def __init__(self, name: str, measured: Measurement) -> None:
        self.name, self.measured = name, measured
        order = Trials().of(measured.site).orders[-1]
        searches = [Search(measured, order, coherence) for coherence in COHERENCES]
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
        """Return the change by the last values, and those by the terms that factors multiply."""
        if (step, full) not in self.known:
            root = math.sqrt(self.measured.sensitivity[step])
            self.known[step, full] = self.search.terms(step, full) @ self.measured.changes[0, step] * root
        return self.known[step, full]

    def error(self, variants: Variants, factors: np.ndarray) -> float:
        changes: list[np.ndarray] = []
        full = tuple[int, ...]()
        at = np.stack([np.interp(self.measured.timesteps, TIMESTEPS, row) for row in factors], axis=1)
        for step, variant in enumerate(variants):
            if variant is None:
                full = (*full, step)[-self.search.order - 1 :]
            elif step - full[0] > self.search.lookback:
                return math.inf
            else:
                first, *others = self.parts(step, full)
                changes.append(first + sum(factor * other for factor, other in zip(at[step], others, strict=False)))
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
    start = auto.RULE
    factors = np.zeros((models[0].search.order, len(TIMESTEPS)))
    factors[: len(start.factors)] = start.factors
    best = Rule(np.log(np.array(start.dense)), np.log(np.array(start.sparse)), factors)
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
    parser.add_argument("--site", choices=SITES, default="units")
    parser.add_argument("--out", type=Path, default=Path("out/auto"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the measurement")
    parser.add_argument("--trials", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    where = arguments.site, arguments.out, arguments.device
    models = [Model(name, measured_of(name, *where)) for name in arguments.models]
    known = [model for model in models if model.name not in arguments.without]
    rule = learn(known, arguments.trials, arguments.seed)
    print(rule.rounded())
    for model in models:
        left_out = " (left out)" if model.name in arguments.without else ""
        behind = ", ".join(f"{speedup:g}x {decibel:.1f}" for speedup, decibel in model.behind(rule).items())
        print(f"{model.name}{left_out}: predicted dB behind the best: {behind}")


if __name__ == "__main__":
    main()
