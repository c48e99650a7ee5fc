"""The options of `skipdit calibrate`. Imports nothing heavy, so that `--help` is instant."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from skipdit.options import MAX_ORDER, NumInferenceStepsOrDefault, check_numbers, check_option, check_range, choose

if TYPE_CHECKING:
    from skipdit.cache.site import Site

BY_THRESHOLD = ("smoothcache", "magcache")  # methods whose schedules follow from a threshold
KIN = ("dpcache", "l2p", "budcache")


class Target(NamedTuple):
    """The target of one schedule."""

    name: str
    """name of its file"""
    speedup: float = 1.0
    """least speedup, by compute or by the clock"""
    seconds: float | None = None
    """most seconds per run"""
    psnr_db: float | None = None
    """least PSNR"""


@dataclass(frozen=True, kw_only=True)
class Trials:
    """The predictions that are tried at each step."""

    orders: tuple[int, ...] = ()
    """orders of the predictions: from the last values (0), or also from their changes (1 and above); by default 1, or 2
    for the output of the whole model"""
    max_age: int = 10
    """largest age of a prediction, in steps"""
    num_probed: int = 8
    """number of steps whose effect on the final sample is measured, spread over the run and denser at both ends"""

    def __post_init__(self) -> None:
        check_range(self, "max_age", "num_probed")
        if len(set(self.orders)) < len(self.orders):
            raise ValueError(f"orders must be given once each, got {self.orders}")
        if any(not 0 <= order <= MAX_ORDER for order in self.orders):
            raise ValueError(f"orders must be between 0 (hold) and {MAX_ORDER}, got {self.orders}")

    @property
    def lookback(self) -> int:
        """Return the number of earlier steps whose values are tried: as far back as a prediction of the largest order
        and age may reach."""
        return self.max_age + (self.max_age + 1) * max(self.orders, default=1)

    def of(self, site: "Site") -> "Trials":
        """Return these trials with the orders of a site, if none are given."""
        return self if self.orders else replace(self, orders=(site.fitted_order,))


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """The targets and settings of a calibration."""

    method: str = "output-taylor"
    """a cache method that reuses one thing (output-taylor, skip-taylor, delta-taylor, ...), or smoothcache"""
    shallow_units: tuple[int, ...] = (1,)
    """numbers of units at each end that run at a reuse step, for methods that have such units; a schedule may choose
    among them"""
    speedups: tuple[float, ...] = (1.5, 1.8, 2.0, 2.5, 3.0)
    """by compute; a schedule is written for each"""
    by_clock: bool = False
    """measure speedups by the clock of this machine, on which the saving per reuse step is timed first"""
    target_psnr: tuple[float, ...] = ()
    """least PSNR in dB on other seeds, as estimated on one more seed; a schedule is written for each"""
    target_seconds: tuple[float, ...] = ()
    """most seconds per run of num_samples on this machine; a schedule is written for each"""
    labels: tuple[str, ...] = ()
    """class names or numbers, repeated in turn; by default those of skipdit sample"""
    prompt: tuple[str, ...] = ()
    """texts, repeated in turn; for the text tasks"""
    num_samples: int = 4
    """pictures or clips per run"""
    num_held_out: int = 8
    """pictures or clips per run of the report"""
    num_inference_steps: NumInferenceStepsOrDefault = None
    """denoising steps of a run, for which the schedules are made; by default 50, or as many as a pipeline of diffusers
    takes"""
    guidance_scale: float | None = None
    """scale of classifier-free guidance; 1 disables guidance; by default 2, or that of a pipeline of diffusers"""
    seed: int = 0
    """seed of the runs in which schedules are searched"""
    held_out_seed: int = 1000
    """seed of the runs that the report measures"""
    trials: Trials = Trials()
    """the predictions that are tried at each step"""
    fits: bool = True
    """fit the factors of each reuse step's prediction to the measurement; otherwise they are Taylor's"""
    kin: tuple[str, ...] = ()
    """published rules that also find schedules from the same measurement, for comparison: dpcache, l2p, budcache"""
    kin_trials: int = 60
    """number of cached runs in which budcache tries its schedules"""
    refine: int = 0
    """number of exchanges of single steps to try on each schedule afterwards, each in a cached run"""
    rivals: tuple[str, ...] = (
        *(f"skip-taylor:{schedule}" for schedule in ("N2", "N3", "N4", "N5", "N4-800-100")),
        *(f"auto:{speedup}" for speedup in ("1.5", "1.8", "2", "2.5", "3")),
    )
    """fixed specs to compare with in the report"""

    def __post_init__(self) -> None:
        from skipdit.cache.methods import METHODS, parse_method
        from skipdit.cache.predictor import TaylorPredictor

        check_numbers(self)
        # a calibrated prediction is Taylor's, of one site
        with_site = [name for name, row in METHODS.items() if row.site and row.predictor is TaylorPredictor]
        check_option(self, "method", (*with_site, "smoothcache"))
        check_range(self, "num_samples", "num_held_out", "num_inference_steps")
        check_range(self, "refine", "kin_trials", least=0)
        for name in self.kin:
            choose("kin", name, KIN)
        if not self.targets:
            raise ValueError("give at least one of speedups, target_psnr and target_seconds")
        if any(not seconds > 0 for seconds in self.target_seconds):
            raise ValueError(f"target_seconds must be above 0, got {self.target_seconds}")
        if self.method in BY_THRESHOLD and (self.by_clock or self.target_psnr or self.target_seconds or self.kin):
            raise ValueError(f"{self.method} has a rule of its own, which takes speedups by compute alone")
        if any(not speedup > 1 for speedup in self.speedups):
            raise ValueError(f"speedups must be above 1, got {self.speedups}")
        if self.seed == self.held_out_seed:
            raise ValueError(f"held_out_seed must differ from seed, got {self.seed} for both")
        used = self.site.shallow_units
        if self.shallow_units not in (used, type(self).shallow_units):
            running = "all units run" if self.site.needs_units else "no unit runs at a reuse step"
            raise ValueError(
                f"shallow_units of {self.method} must be "
                f"{'one number' if used else f'left out, as {running}'}, got {self.shallow_units}"
            )
        for spec in self.rivals:
            parse_method(spec)

    @property
    def site(self) -> "Site":
        from skipdit.cache.methods import EVERY, METHODS
        from skipdit.cache.site import BranchOutputs

        make = METHODS[self.method].site
        return BranchOutputs(EVERY) if make is None else make(self.shallow_units)

    @property
    def targets(self) -> list["Target"]:
        """Return the targets, one per schedule."""
        clock = "-clock" if self.by_clock else ""
        return [
            *(Target(f"{speedup:g}x{clock}", speedup=speedup) for speedup in self.speedups),
            *(Target(f"{decibel:g}dB", psnr_db=decibel) for decibel in self.target_psnr),
            *(Target(f"{seconds:g}s", seconds=seconds) for seconds in self.target_seconds),
        ]

    @property
    def estimate_seed(self) -> int:
        """Return the seed on which quality is estimated, which differs from those of the search and of the report."""
        return next(seed for seed in range(self.seed + 1, self.seed + 3) if seed != self.held_out_seed)

    @property
    def needs_clock(self) -> bool:
        return self.by_clock or bool(self.target_seconds)
