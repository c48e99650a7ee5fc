"""What `skipdit calibrate` does."""

from dataclasses import dataclass
from typing import NamedTuple

from skipdit.cache.methods import EVERY, METHODS, parse_method
from skipdit.cache.predictor import TaylorPredictor
from skipdit.cache.site import BranchOutputs, Site
from skipdit.calibration.trials import Trials
from skipdit.options import NumInferenceSteps, check_numbers, check_option, check_range, choose

# what a calibrated prediction is of is a row with a site; its basis is Taylor's
WITH_SITE = tuple(name for name, row in METHODS.items() if row.site and row.predictor is TaylorPredictor)
BY_THRESHOLD = ("smoothcache", "magcache")  # whose rule is a threshold
KIN = ("dpcache", "l2p", "budcache")


class Target(NamedTuple):
    """What one schedule is asked for."""

    name: str
    """of its file"""
    speedup: float = 1.0
    """by compute, or by the clock"""
    seconds: float | None = None
    """of a run, at most"""
    psnr_db: float | None = None
    """at least"""


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """What `skipdit calibrate` does."""

    method: str = "skip-taylor"
    """a row of the cache methods with one site (skip-taylor, delta-taylor, taylorseer, ...), or smoothcache"""
    shallow_units: tuple[int, ...] = (1,)
    """numbers of fresh units at each end among which a schedule may choose"""
    speedups: tuple[float, ...] = (1.5, 1.8, 2.0, 2.5, 3.0)
    """by compute; a schedule is written for each"""
    by_clock: bool = False
    """speedups are by the clock of this machine, whose saving per reuse step is measured first"""
    target_psnr: tuple[float, ...] = ()
    """least PSNR in dB on seeds not calibrated on, as estimated on one more seed; a schedule is written for each"""
    target_seconds: tuple[float, ...] = ()
    """most seconds of a run of num_samples on this machine; a schedule is written for each"""
    labels: tuple[str, ...] = ()
    """class names or numbers, repeated in turn; by default as of skipdit sample"""
    prompt: tuple[str, ...] = ()
    """texts, repeated in turn, for the text tasks"""
    num_samples: int = 4
    """pictures or clips of each run"""
    num_held_out: int = 8
    """pictures or clips of each run of the report"""
    num_inference_steps: NumInferenceSteps = 50
    """denoising steps of a run, for which the schedules are made"""
    guidance_scale: float = 2.0
    """strength of classifier-free guidance; none at 1"""
    seed: int = 0
    """of the runs that schedules are found on"""
    held_out_seed: int = 1000
    """of what the report measures"""
    trials: Trials = Trials()  # noqa: RUF009 (frozen)
    """what is tried at each step"""
    fits: bool = True
    """give each reuse step's prediction factors that fit what was measured; otherwise they are Taylor's"""
    kin: tuple[str, ...] = ()
    """rules of kin by which schedules are found too, from the same measurement: dpcache, l2p, budcache"""
    kin_trials: int = 60
    """cached runs in which budcache tries its schedules"""
    refine: int = 0
    """exchanges of single steps that are tried on each schedule afterwards, each a cached run"""
    rivals: tuple[str, ...] = (
        *(f"skip-taylor:{schedule}" for schedule in ("N2", "N3", "N4", "N5", "N4-800-100")),
        *(f"auto:{speedup}" for speedup in ("1.5", "1.8", "2", "2.5", "3")),
    )
    """fixed specs that the report shows beside"""

    def __post_init__(self) -> None:
        check_numbers(self)
        check_option(self, "method", (*WITH_SITE, "smoothcache"))
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
        known = self.site.shallow_units
        if self.shallow_units not in (known, type(self).shallow_units):
            raise ValueError(
                f"shallow_units of {self.method} must be "
                f"{'one number' if known else 'left out, as all units run'}, got {self.shallow_units}"
            )
        for spec in self.rivals:
            parse_method(spec)

    @property
    def site(self) -> Site:
        make = METHODS[self.method].site
        return BranchOutputs(EVERY) if make is None else make(self.shallow_units)

    @property
    def targets(self) -> list["Target"]:
        """What a schedule is asked for."""
        clock = "-clock" if self.by_clock else ""
        return [
            *(Target(f"{speedup:g}x{clock}", speedup=speedup) for speedup in self.speedups),
            *(Target(f"{decibel:g}dB", psnr_db=decibel) for decibel in self.target_psnr),
            *(Target(f"{seconds:g}s", seconds=seconds) for seconds in self.target_seconds),
        ]

    @property
    def estimate_seed(self) -> int:
        """Neither that of the search nor that of the report."""
        return next(seed for seed in range(self.seed + 1, self.seed + 3) if seed != self.held_out_seed)

    @property
    def needs_clock(self) -> bool:
        return self.by_clock or bool(self.target_seconds)
