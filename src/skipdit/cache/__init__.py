"""Feature caches: a denoising step either runs in full and stores something, or takes that back and runs the rest.

A method is a choice of when x what x how, and nothing else.

- *when*: `schedule` (static: a pure function of the timesteps seen), `gates` (adaptive: from what a step shows)
- *what*: `site` (units, or branches inside them); *how*: `predictor` (hold, or Taylor)
- `methods`: one row per published method; specs and schedule.json are read there

The path of one call, from the outside in:

1. `enable.CachedModel.__call__`: the class that a model has while a cache is on
2. `runtime.CacheRuntime.call`: one lock, one call
3. `streams.Streams.next`: which stream this call continues (`conditions`: what tells streams apart)
4. `steppers`: `ScheduledSteps` or `ProbedSteps` decides on the step and makes it; `skipdit.calibration` has two more,
   which record
5. `compiled.Call`: the model's forward under a `ForwardPlan`, eager or as one of a few whole graphs
6. `skipdit.models.forward_plan`: what each unit of that forward does

Also here: `fingerprint` (was a schedule made for this model?), `ranks` (shards decide alike), `state` (the summary).
Elsewhere: `skipdit.guidance` (predictions beside the steps), `skipdit.models.costs` (FLOPs of the whole model, counted
at the first step of each shape), `skipdit.models.check` (does a declared family fit?), `skipdit.calibration` (the
search for schedules).

Private APIs of torch and diffusers that this folder relies on: `Module._compiled_call_impl` and
`torch._dynamo.config.recompile_limit` (`compiled`), `Tensor._version` (`conditions`), `_reset_stateful_cache` and
`cache_context` of diffusers (`enable`). Those that opening a model takes are in `skipdit.models`: `class_swap` (hooks
of accelerate and diffusers), `surgery` (`Module._call_impl` and `_compiled_call_impl` of blocks), `forward_plan`
(`Tensor._version`).
"""
