"""Settings of `skipdit analyze`. Imports nothing heavy, so that `--help` is instant."""

from dataclasses import dataclass

from skipdit.options import NumInferenceSteps, check_above, check_fields, check_range


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig:
    """Settings of the measurements of each model."""

    labels: tuple[int, ...] = ()
    """class numbers, one per picture; by default spread over the classes"""
    num_pictures: int = 4
    """pictures per run, if no labels are given"""
    num_inference_steps: NumInferenceSteps = 50
    """denoising steps per run"""
    guidance_scale: float = 2.0
    """strength of classifier-free guidance; none at 1"""
    methods: tuple[str, ...] = ("N2", "delta:N2", "skip-taylor:N4-800-100-o1")
    """caches whose features and errors are measured; the report names those that a model cannot use"""
    jacobian_timesteps: int = 6
    """number of timesteps at which the norms of units and halves are measured, on two pictures"""
    growth_timesteps: int = 12
    """number of timesteps at which the norms of solver steps are measured"""
    surface_size: int = 9
    """points per side of a perturbation surface; odd"""
    weight_radius: float = 0.2
    """largest step along a direction in the weights, relative to their norms"""
    input_radius: float = 0.2
    """largest step along a direction in the latents, relative to their norm"""
    surface_timesteps: tuple[int, ...] = (200, 800)
    """timesteps of the surfaces, above 0 and at most 1000"""
    seed: int = 0
    """seed of the noise and the directions"""

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, "num_pictures", "jacobian_timesteps")
        check_range(self, "num_inference_steps", least=3, most=1000)
        check_range(self, "growth_timesteps", least=2)
        check_range(self, "surface_size", least=3)
        if self.surface_size % 2 == 0:
            raise ValueError(
                f"surface_size must be odd, so that one point is the unchanged model, got {self.surface_size}"
            )
        check_above(self, "weight_radius", "input_radius")
        if not self.surface_timesteps or not all(0 < timestep <= 1000 for timestep in self.surface_timesteps):
            raise ValueError(
                f"surface_timesteps must be one or more numbers above 0 and at most 1000, got {self.surface_timesteps}"
            )
        from skipdit.cache.methods import parse_method

        for method in self.methods:
            parse_method(method)
