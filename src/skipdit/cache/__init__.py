"""Feature caches: a denoising step either runs in full and stores features, or reuses them and runs only the rest.

A method is a choice of when x what x how, and nothing else.

- *when*: `schedule` (static: a pure function of the timesteps), `gates` (adaptive: from values of the step itself)
- *what*: `site` (units, branches inside them, or the `whole` model); *how*: `predictor` (hold, or Taylor)
- `changes` and `spectrum`: the numbers that gates decide by; `magnitudes`: MagCache's schedule, and its measuring run;
  `layers`: branches chosen for each step
- `methods`: one row per published method; specs and schedule.json are read there

The path of one call, from the outside in:

1. `enable.CachedModel.__call__`: the model's class while a cache is on
2. `runtime.CacheRuntime.call`: one call, under a lock
3. `streams.Streams.next`: finds the stream that this call continues (`timesteps` and `conditions` identify it)
4. `steppers`: `ScheduledSteps` or `ProbedSteps` decides on the step and runs it; `skipdit.calibration` has two more,
   which record
5. `compiled.Call`: the model's forward under a `ForwardPlan`, eager or as one of a few whole graphs
6. `skipdit.models.forward_plan`: what each unit of that forward does

Also here: `fingerprint` (was a schedule made for this model?), `ranks` (shards decide alike), `state` (the summary).
Elsewhere: `skipdit.pipelines` (unconditional predictions), `skipdit.models.costs` (FLOPs of the whole model, counted
at the first step of each shape), `skipdit.models.check` (does a declared family fit?), `skipdit.calibration` (the
search for schedules).

Private APIs of torch and diffusers that this folder relies on: `Module._compiled_call_impl` and
`torch._dynamo.config.recompile_limit` (`compiled`), `Tensor._version` (`conditions`), `_reset_stateful_cache` and
`cache_context` of diffusers (`enable`). Opening a model needs more of them, in `skipdit.models`: `class_swap` (hooks
of accelerate and diffusers), `surgery` (`Module._call_impl` and `_compiled_call_impl` of blocks), `forward_plan`
(`Tensor._version`).
"""
