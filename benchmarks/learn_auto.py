"""Learns the densities of `--cache auto` from one calibrated model: `AUTO_DENSITY` in `skipdit.cache.schedule`.

    python benchmarks/learn_auto.py emoji

What reuse costs at each step is measured once, as `skipdit calibrate` does; then the densities are moved at random,
and kept where they come nearer to the best schedules of equal compute, in the mean square of predicted dB over
speedups.
"""

import argparse
import math
from dataclasses import replace

import numpy as np

from skipdit.cache import schedule as schedules
from skipdit.cache.schedule import AutoSchedule, resolve
from skipdit.cache.site import DeepFeatures
from skipdit.calibration.calibrate import CalibrateConfig, make_runner, progress
from skipdit.calibration.plan import choose, plan, predict_error
from skipdit.calibration.search import Search
from skipdit.calibration.trials import Measured, Trials, measure
from skipdit.loading import load_source

SPEEDUPS = (1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6, 2.8, 3.0)
ORDER = 2
COHERENCE = 1.0


def losses(measured: Measured, densities: np.ndarray, front: tuple) -> list[float]:
    """By how many dB a rule of these densities falls behind the best schedule of equal compute, for each speedup."""
    schedules.AUTO_DENSITY = tuple(np.exp(densities))
    schedules.auto_scale.cache_clear()
    errors, found = Search(measured, ORDER, fits=False).errors(), []
    for speedup in SPEEDUPS:
        rule = AutoSchedule(speedup=speedup).for_cost(measured.reuse_costs[0])
        full = resolve(rule, measured.timesteps)
        variants = [None if is_full else 0 for is_full in full]
        cost = float(np.mean([1.0 if is_full else measured.reuse_costs[0] for is_full in full]))
        best = choose(front, speedup=1 / cost)
        try:
            error = predict_error(errors, [step for step, is_full in enumerate(full) if is_full], variants, COHERENCE)
        except ValueError:  # a longer rest than was measured
            found.append(60.0)
            continue
        found.append(10 * math.log10(max(error, 1e-12) / max(best.predicted_error, 1e-12)))
    return found


def learn(measured: Measured, num_trials: int, seed: int) -> tuple[np.ndarray, list[float]]:
    front = plan(Search(measured, ORDER, fits=False).errors(), coherence=COHERENCE)
    generator = np.random.default_rng(seed)
    best = np.log(np.array(schedules.AUTO_DENSITY))
    lost = losses(measured, best, front)
    for trial in range(num_trials):
        width = 0.6 * 0.1 ** (trial / num_trials)
        tried = best + generator.normal(0, width, best.shape) * (generator.random(best.shape) < 0.4)
        other = losses(measured, tried, front)
        if np.mean(np.square(other)) < np.mean(np.square(lost)):
            best, lost = tried, other
    return best - best.mean(), lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="emoji")
    parser.add_argument("--trials", type=int, default=4000)
    arguments = parser.parse_args()
    source, config = load_source(arguments.model), CalibrateConfig()
    run, trials = make_runner(source, config), Trials(orders=(ORDER,), max_age=9)
    with progress("measuring", config.num_inference_steps + trials.num_probed + 1) as advance:
        run = replace(run, advance=advance)
        measured = measure(run, DeepFeatures(), trials, advance=advance)
    densities, lost = learn(measured, arguments.trials, config.seed)
    print("AUTO_TIMESTEPS =", schedules.AUTO_TIMESTEPS)
    print("AUTO_DENSITY =", tuple(round(float(each), 2) for each in np.exp(densities)))
    print("predicted dB behind the best:", ", ".join(f"{s:g}x {db:.1f}" for s, db in zip(SPEEDUPS, lost, strict=True)))


if __name__ == "__main__":
    main()
