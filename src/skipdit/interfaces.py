"""Names for what diffusers does not type: its objects get their parts and settings as attributes at run time."""

from typing import Any

Fields = dict[str, Any]
"""Values by name: keyword arguments, the entries of a config, or a JSON object."""

Config = Any
"""The config of a model or pipeline: its entries are also attributes, which diffusers does not declare."""

Pipeline = Any
"""A `DiffusionPipeline` of diffusers or skipdit, with its `transformer`, `scheduler` and `vae`."""

Transformer = Any
"""A `ModelMixin` with a `config`, whose keys are attributes too, and a forward that returns an object with `sample`."""

VAE = Any
"""An autoencoder of diffusers, which decodes latents; `None` in a pipeline that works on pixels."""

ModelOutput = Any
"""The return value of a forward: a tensor, a tuple, or a `BaseOutput` of diffusers."""

Latents = Any
"""The noisy latents that a forward takes: a tensor, or one per sample in a list."""

Scheduler = Any
"""A `SchedulerMixin` with `set_timesteps`, `timesteps` and `step`."""

Figure = Any
"""A figure of matplotlib or plotly, which are optional."""
