"""What `skipdit analyze` is asked for; nothing heavy is imported, so that its help is there at once."""

from dataclasses import dataclass

from skipdit.options import NumInferenceSteps, check_above, check_fields, check_range


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig:
    """What is measured of each model."""

    labels: tuple[int, ...] = ()
    """class numbers, one per picture; by default spread over the classes"""
    num_pictures: int = 4
    """pictures of a run, where no labels are given"""
    num_inference_steps: NumInferenceSteps = 50
    """denoising steps of a run"""
    guidance_scale: float = 2.0
    """strength of classifier-free guidance; none at 1"""
    methods: tuple[str, ...] = ("N2", "delta:N2", "skip-taylor:N4-800-100-o1")
    """caches whose features and errors are followed; those that a model cannot have are left out and named"""
    jacobian_timesteps: int = 6
    """timesteps at which the norms of units and halves are measured, on two pictures"""
    growth_timesteps: int = 12
    """timesteps at which the norms of solver steps are measured"""
    surface_size: int = 9
    """points per side of a perturbation surface; odd"""
    weight_radius: float = 0.2
    """largest coefficient of a direction in weights, in their norms"""
    input_radius: float = 0.2
    """largest coefficient of a direction in latents, in their norms"""
    surface_timesteps: tuple[int, ...] = (200, 800)
    """timesteps of the surfaces, above 0 up to 1000"""
    seed: int = 0
    """of noise and directions"""

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, "num_pictures", "jacobian_timesteps")
        check_range(self, "num_inference_steps", least=3, most=1000)
        check_range(self, "growth_timesteps", least=2)
        check_range(self, "surface_size", least=3)
        if self.surface_size % 2 == 0:
            raise ValueError(f"surface_size must be odd, so that the unmoved model is a point, got {self.surface_size}")
        check_above(self, "weight_radius", "input_radius")
        if not self.surface_timesteps or not all(0 < each <= 1000 for each in self.surface_timesteps):
            raise ValueError(f"surface_timesteps must be one or more above 0 up to 1000, got {self.surface_timesteps}")
        from skipdit.cache.methods import parse_method

        for method in self.methods:
            parse_method(method)
