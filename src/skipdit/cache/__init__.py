"""Feature caches: a denoising step runs in full and stores something, or takes that back and runs the rest.

A method is a choice of when x what x how; nothing else.

- *when*: `schedule` (static: a pure function of the timesteps seen), `gates` (by what a step shows)
- *what*: `site` (units, or branches inside them); *how*: `predictor` (hold, or Taylor)
- `methods`: every published method is a row; specs and schedule.json are read there

The way of one call, from the outside in:

1. `enable.CachedModel.__call__`: the class that a model has while a cache is on
2. `runtime.CacheRuntime.call`: one lock, one call
3. `streams.Streams.next`: of which stream this call is the next step (`conditions`: what tells streams apart)
4. `steppers`: `ScheduledSteps` or `ProbedSteps` decide and make the step; `calibrate` has two more, which record
5. `compiled.Call`: the model's forward under a `ForwardPlan`, eager or as one of a few whole graphs
6. `skipdit.models.forward_plan`: what each unit of that forward does

Beside them: `costs` (FLOPs of the whole model, counted at the first step of each shape), `plan` and `calibrate` (the
search for schedules), `fingerprint` (whether a schedule was made for this model), `ranks` (shards decide alike),
`state` (the summary), `check` (whether a declared family fits).

Private ways of torch and diffusers that this folder leans on: `Module._compiled_call_impl` and `Module._call_impl`
(`compiled`), `torch._dynamo.config.recompile_limit` (`compiled`), `Tensor._version` (`conditions`),
`_reset_stateful_cache` and `cache_context` of diffusers (`enable`); of accelerate's and diffusers' hooks see
`skipdit.models.class_swap`.
"""
