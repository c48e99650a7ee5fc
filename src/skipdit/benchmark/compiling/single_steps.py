"""Times single steps of a class-to-image DiT: the overhead of a cache at a reuse step, and the cost of conditioning."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from skipdit.benchmark.compiling.report import CONDITIONING, OVERHEAD, TIMESTEP, StepRow
from skipdit.benchmark.measure import compiled, seconds_of
from skipdit.cache.enable import cache_summary, disable_cache, enable_cache, last_stream
from skipdit.cache.methods import CacheMethod
from skipdit.cache.schedule import IntervalSchedule
from skipdit.cache.site import DeepFeatures
from skipdit.models.dit import DiT


@torch.no_grad()
def bare_reuse_step(model: DiT, inputs: Mapping[str, Tensor], deep_features: Tensor, k: int) -> Tensor:
    """Call the modules that a reuse step runs directly: embeddings, the k first and the k last units, the final
    layer."""
    hidden_states, grid = model.embed_patches(inputs["hidden_states"])
    conditioning = condition(model, inputs)
    skips: list[Tensor] = []
    for block in model.blocks[:k]:
        hidden_states = block(hidden_states, conditioning)
        skips.append(hidden_states)
    hidden_states = deep_features
    for (block,) in model.units()[-k:]:
        skip = skips.pop()
        hidden_states = block(hidden_states, conditioning, skip if block.long_skip is not None else None)
    return model.predict_patches(hidden_states, conditioning, grid)


def embed_timestep(model: DiT, inputs: Mapping[str, Tensor]) -> Tensor:
    latents = inputs["hidden_states"]
    return model.embed_timestep(inputs["timestep"], len(latents), latents.dtype)


def condition(model: DiT, inputs: Mapping[str, Tensor]) -> Tensor:
    return embed_timestep(model, inputs) + model.class_embedder(inputs["class_labels"])


def condition_all(model: DiT, inputs: Mapping[str, Tensor]) -> None:
    """Compute everything in a step that depends only on the timestep and the class: their embeddings and
    modulations."""
    conditioning = condition(model, inputs)
    for module in (*model.dit_blocks, model.final_layer):
        module.modulation(F.silu(conditioning))


def step_inputs(model: DiT, batch_size: int, timestep: float) -> dict[str, Tensor]:
    shape = (batch_size, *(model.config[name] for name in ("in_channels", "sample_size", "sample_size")))
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(shape, generator=generator),
        "timestep": torch.tensor(timestep),
        "class_labels": torch.zeros(batch_size, dtype=torch.long),
    }


@torch.no_grad()
def time_overhead(name: str, model: DiT, batch_size: int, num_repetitions: int, *, compile_it: bool) -> StepRow:
    """Time reuse steps, called as by a diffusers pipeline, and their bare units in turn. Without compilation the
    outputs of both are bit-equal."""
    bare = torch.compile(bare_reuse_step, fullgraph=True) if compile_it else bare_reuse_step
    enable_cache(model, CacheMethod(schedule=IntervalSchedule(interval=10**6), site=DeepFeatures(1)))
    try:
        inputs = step_inputs(model, batch_size, 999.0)
        model(**inputs, return_dict=False)
        stream = last_stream(model)
        assert stream is not None
        (((values,),),) = (state.stored.values() for state in stream.states)
        (deep_features,) = values.values()
        seconds, base_seconds, outputs = [], [], []
        calls = [
            (seconds, lambda: outputs.append(model(**inputs, return_dict=False)[0])),
            (base_seconds, lambda: outputs.append(bare(model, inputs, deep_features, 1))),
        ]
        for repetition in range(num_repetitions + 2):
            inputs["timestep"] = torch.tensor(998.0 - 900.0 * repetition / (num_repetitions + 2))
            for times, call in calls if repetition % 2 else calls[::-1]:
                times.append(seconds_of(call))
            assert compile_it or torch.equal(*outputs[-2:]), "the bare units are not those of the reuse step"
        assert cache_summary(model).steps_reused == num_repetitions + 2
    finally:
        disable_cache(model)
    mode = "compiled" if compile_it else "eager"
    return StepRow(OVERHEAD, name, mode, batch_size, tuple(seconds[2:]), tuple(base_seconds[2:]))


@torch.no_grad()
def time_conditioning(name: str, model: DiT, batch_size: int, num_repetitions: int) -> list[StepRow]:
    inputs = step_inputs(model, batch_size, 500.0)
    parts = {TIMESTEP: embed_timestep, CONDITIONING: condition_all}
    seconds: dict[str, list[float]] = {what: [] for what in parts}
    base_seconds = []
    for _ in range(num_repetitions + 2):
        for what, run in parts.items():
            seconds[what].append(seconds_of(lambda run=run: run(model, inputs)))
        base_seconds.append(seconds_of(lambda: model(**inputs)))
    return [
        StepRow(what, name, "eager", batch_size, tuple(times[2:]), tuple(base_seconds[2:]))
        for what, times in seconds.items()
    ]


def time_steps(
    name: str, model: DiT, batch_sizes: Sequence[int], num_repetitions: int, *, has_compiler: bool
) -> list[StepRow]:
    rows = [time_overhead(name, model, size, num_repetitions, compile_it=False) for size in batch_sizes]
    if has_compiler:
        for size in batch_sizes:
            with compiled(model, fullgraph=True):
                rows.append(time_overhead(name, model, size, num_repetitions, compile_it=True))
    return rows + [row for size in batch_sizes for row in time_conditioning(name, model, size, num_repetitions)]
