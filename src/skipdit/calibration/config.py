"""What `skipdit calibrate` does."""

from dataclasses import dataclass

from skipdit.cache.methods import EVERY, METHODS, parse_method
from skipdit.cache.predictor import TaylorPredictor
from skipdit.cache.site import BranchOutputs, Site
from skipdit.calibration.trials import Trials
from skipdit.options import NumInferenceSteps, check_numbers, check_option, check_range, choose

# what a calibrated prediction is of is a row with a site; its basis is Taylor's
WITH_SITE = tuple(name for name, row in METHODS.items() if row.site and row.predictor is TaylorPredictor)
KIN = ("dpcache", "l2p")


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """What `skipdit calibrate` does."""

    method: str = "skip-taylor"
    """a row of the cache methods with one site (skip-taylor, delta-taylor, taylorseer, ...), or smoothcache"""
    shallow_units: tuple[int, ...] = (1,)
    """numbers of fresh units at each end among which a schedule may choose"""
    speedups: tuple[float, ...] = (1.5, 1.8, 2.0, 2.5, 3.0)
    """by compute; a schedule is written for each"""
    psnr_db: tuple[float, ...] = ()
    """least predicted PSNR; a schedule is written for each"""
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
    """rules of kin by which schedules are found too, from the same measurement: dpcache, l2p"""
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
        check_range(self, "refine", least=0)
        for name in self.kin:
            choose("kin", name, KIN)
        if not self.speedups and not self.psnr_db:
            raise ValueError("give at least one of speedups and psnr_db")
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
    def targets(self) -> dict[str, dict[str, float]]:
        """What `choose` is asked for, by the name of the schedule."""
        speedups = {f"{speedup:g}x": {"speedup": speedup} for speedup in self.speedups}
        return speedups | {f"{decibel:g}dB": {"psnr_db": decibel} for decibel in self.psnr_db}
