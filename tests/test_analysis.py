"""The stability measurements on tiny models, and the report."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import inputs, tiny_dit, tiny_pipeline
from torch import Tensor, nn

from skipdit.analysis.jacobian import (
    half_function,
    jacobian_profile,
    model_function,
    unit_bound,
    unit_function,
    unit_inputs,
)
from skipdit.analysis.measure import AnalyzeConfig, measure
from skipdit.analysis.record import record_inputs, record_outputs
from skipdit.analysis.report import analyze
from skipdit.analysis.sections import figure_names, holds
from skipdit.analysis.surface import filter_normalised, perturbation_surface, sample_normalised
from skipdit.analysis.trajectory import (
    LinearSteps,
    cosine_similarity,
    error_growth,
    guided_prediction,
    sample_run,
    similarity_over_steps,
    step_jacobian_norms,
)
from skipdit.analysis.weights import TrainingLog, find_training_log, layer_norms, long_skip_spectra
from skipdit.cache.methods import METHODS, parse_method
from skipdit.cache.runtime import rules_on
from skipdit.cli import main
from skipdit.files.output import OutputFolder
from skipdit.models.long_skip import LongSkipConfig
from skipdit.pipelines import ClassToImagePipeline
from skipdit.runs import Runner
from skipdit.spectral import jacobian_norms

CONFIG = AnalyzeConfig(
    num_pictures=2,
    num_inference_steps=6,
    jacobian_timesteps=2,
    growth_timesteps=2,
    surface_size=3,
    surface_timesteps=(500,),
    methods=("N2", "delta:N2"),
)
SKIPS = {
    "plain": None,
    "replace": LongSkipConfig(),
    "residual": LongSkipConfig(fusion="residual", init="xavier"),
    "rms": LongSkipConfig(norm="rms_norm", num_pairs=2),
}


# ----------------------------------------------------------------------------------------------------------------------
# Reading intermediates


def transcribed_bounds(gamma: float, alpha: float, num_layers: int) -> list[float]:
    """The paper's bound on a decoder layer's Jacobian norm as a third party has it, (1 - alpha) gamma + alpha
    gamma^(2l - L), for l from L/2 + 1 to L: below gamma, as the theorem says, where gamma < 1, and not where
    gamma > 1 (docs/stability.md)."""
    layers = range(num_layers // 2 + 1, num_layers + 1)
    return [(1 - alpha) * gamma + alpha * gamma ** (2 * layer - num_layers) for layer in layers]


def test_recording_leaves_the_model_untouched() -> None:
    model = tiny_dit()
    latents, labels = inputs()
    before, keys = model(latents, torch.tensor(300), labels).sample, list(model.state_dict())
    with (
        record_outputs(model, ["blocks.2", "blocks.2.attn", "final_layer"]) as outputs,
        record_inputs(model, ["blocks.3"]) as given,
    ):
        assert torch.equal(model(latents, torch.tensor(300), labels).sample, before)
        model(latents, torch.tensor(300), labels)
    assert [len(calls) for calls in outputs.values()] == [2, 2, 2]
    assert torch.equal(outputs["blocks.2"][0], given["blocks.3"][0][0])
    model(latents, torch.tensor(300), labels)
    assert len(outputs["blocks.2"]) == 2
    assert list(model.state_dict()) == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_recording_ends_when_the_block_fails() -> None:
    model = tiny_dit()
    with pytest.raises(RuntimeError, match="enough"), record_outputs(model, ["blocks.0"]):
        raise RuntimeError("enough")
    with (
        pytest.raises(ValueError, match=r"DiT has no submodule 'blocks\.99'"),
        record_outputs(model, ["blocks.0", "blocks.99"]),
    ):
        pass
    assert not any(module._forward_hooks for module in model.modules())


# ----------------------------------------------------------------------------------------------------------------------
# Jacobians


def dense_norm(function, point: Tensor, sample: int) -> float:
    jacobian = torch.autograd.functional.jacobian(function, point)[sample].select(point.ndim - 1, sample)
    return torch.linalg.svdvals(jacobian.reshape(-1, point[0].numel()))[0].item()


@pytest.mark.parametrize("name", SKIPS)
def test_jacobian_norms_equal_dense_ones_and_stay_below_their_bounds(name: str) -> None:
    model = nn.Module.to(tiny_dit(4, SKIPS[name]), torch.float64)
    latents, labels = inputs(size=4)
    latents, timestep = latents.double(), torch.tensor(500.0)
    given = unit_inputs(model, latents, timestep, labels)
    functions = {
        "unit 1": (unit_function(model, given, 1), given[1][0]),
        "unit 3": (unit_function(model, given, 3), given[3][0]),
        "first half": (half_function(model, given, second=False), given[0][0]),
        "second half": (half_function(model, given, second=True), given[2][0]),
        "model": (model_function(model, timestep, labels), latents),
    }
    for what, (function, point) in functions.items():
        found = jacobian_norms(function, point, tolerance=1e-4)
        for sample in range(2):
            assert found.value[sample].item() == pytest.approx(dense_norm(function, point, sample), rel=1e-3), what
    for unit in range(4):
        function, point = unit_function(model, given, unit), given[unit][0]
        bound = unit_bound(model.blocks[unit], *given[unit])
        for sample in range(2):
            assert dense_norm(function, point, sample) <= bound[sample].item()


@pytest.mark.parametrize("seed", range(6))
def test_no_unit_exceeds_its_bound_whatever_the_weights(seed: int) -> None:
    """Weights from nearly none to large, which saturate attention."""
    torch.manual_seed(seed)
    model = nn.Module.to(tiny_dit(4, list(SKIPS.values())[seed % 4]), torch.float64)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02 * 3**seed / 3)
    latents, labels = inputs()
    given = unit_inputs(model, latents.double(), torch.tensor(40.0 + 150 * seed), labels)
    for unit in range(4):
        norms = jacobian_norms(unit_function(model, given, unit), given[unit][0], tolerance=1e-3)
        assert (norms.value <= unit_bound(model.blocks[unit], *given[unit])).all()


def test_halves_are_what_the_model_runs() -> None:
    for num_layers in (5, 6):
        model = tiny_dit(num_layers)
        latents, labels = inputs()
        given = unit_inputs(model, latents, torch.tensor(77), labels)
        middle = num_layers // 2
        with record_outputs(model, [f"blocks.{num_layers - 1}"]) as recorded, torch.no_grad():
            model(latents, torch.tensor(77), labels)
        with torch.no_grad():
            first = half_function(model, given, second=False)(given[0][0])
            assert torch.equal(first, given[middle][0])
            assert torch.equal(half_function(model, given, second=True)(first), recorded[f"blocks.{num_layers - 1}"][0])


def test_a_profile_covers_every_unit() -> None:
    latents, labels = inputs()
    ticks = []
    profile = jacobian_profile(tiny_dit(5), latents, torch.tensor(300), labels, advance=lambda: ticks.append(1))
    assert len(profile.units) == len(profile.bounds) == 5
    assert len(ticks) == 8
    assert all(norm <= bound for norm, bound in zip(profile.units, profile.bounds, strict=True))
    assert max(profile.errors.values()) < 0.05


@pytest.mark.parametrize(("gamma", "below"), [(0.95, True), (0.5, True), (1.05, False), (2.0, False)])
def test_the_transcribed_theorem_needs_gamma_below_one(gamma: float, below: bool) -> None:
    """For every decoder layer, gamma^(2l - L) < gamma only if gamma < 1; at 2l - L = 1 both are equal."""
    for num_layers in (12, 13, 28):
        bounds = transcribed_bounds(gamma, 0.5, num_layers)
        assert len(bounds) == num_layers - num_layers // 2
        strict = [bound for layer, bound in enumerate(bounds, num_layers // 2 + 1) if 2 * layer - num_layers > 1]
        assert all(bound < gamma if below else bound > gamma for bound in strict)
        assert bounds[-1] == pytest.approx(0.5 * gamma + 0.5 * gamma**num_layers)


# ----------------------------------------------------------------------------------------------------------------------
# Along a run


def runner_of(pipeline: ClassToImagePipeline) -> Runner:
    return Runner.of_latents(pipeline, (1, 7), num_inference_steps=8, guidance_scale=2.0)


def test_a_run_keeps_what_the_pipeline_saw() -> None:
    pipeline = tiny_pipeline()
    run = sample_run(runner_of(pipeline))
    assert run.latents.shape == (9, 2, 4, 8, 8)
    assert run.features.shape[:2] == (8, 4)
    expected = pipeline(
        [1, 7],
        guidance_scale=2.0,
        num_inference_steps=8,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    assert torch.equal(run.latents[-1], expected)
    cached = sample_run(runner_of(pipeline), parse_method("N2"))
    assert torch.equal(cached.latents[1], run.latents[1])
    assert not torch.equal(cached.latents[2], run.latents[2])
    assert type(pipeline.transformer).__call__ is nn.Module.__call__


SPECS = (
    "N2",
    "skip-branch:N3",
    "delta-dit:N2",
    "faster-diffusion:N2",
    "fora:N2",
    "taylorseer:N3",
    "pab:N2",
    "auto:1.3",
)


@pytest.mark.parametrize("spec", [*SPECS, "fbcache:0.6", "fbcache:0.9", "teacache:0.2", "adacache:0.5"])
def test_a_run_is_followed_under_every_cache(spec: str) -> None:
    """Also where the last unit is left out, or a reuse is refused after the first unit."""
    torch.manual_seed(0)
    pipeline = tiny_pipeline()
    full, method = sample_run(runner_of(pipeline)), parse_method(spec)
    cached = sample_run(runner_of(pipeline), method)
    assert cached.latents.shape == full.latents.shape
    assert cached.features.shape == full.features.shape
    assert cached.compute_ratio > 1
    assert torch.equal(cached.features[0], full.features[0])
    growth = error_growth(runner_of(pipeline), full, torch.ones(8), method)
    assert growth.injected[0] < 1e-6
    assert growth.injected.max() > 1e-4
    assert growth.feature_similarity.isfinite().all()


def test_similarity_over_steps_by_hand() -> None:
    pipeline = tiny_pipeline()
    run = sample_run(runner_of(pipeline))
    timesteps, similarity, pairs = similarity_over_steps(runner_of(pipeline))
    assert similarity.shape == (6, 7)
    assert timesteps.tolist() == run.timesteps[1:].tolist()
    by_hand = cosine_similarity(run.features[1:], run.features[:-1]).mean(dim=1)
    torch.testing.assert_close(similarity[-1], by_hand, atol=1e-6, rtol=0)
    torch.testing.assert_close(pairs.diagonal(), torch.ones(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(pairs.diagonal(1), by_hand, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_solver_steps_make_the_pipelines_run(scheduler: str) -> None:
    """x' = a x + b F(x) with the probed factors walks the very path that the pipeline walks."""
    if scheduler == "euler":
        from skipdit.diffusion import Objective, make_scheduler

        flow = make_scheduler(Objective(process="flow", prediction_type="sample"), "euler")
        pipeline = ClassToImagePipeline(tiny_dit(out_channels=4), flow)
        pipeline.set_progress_bar_config(disable=True)
    else:
        pipeline = tiny_pipeline()
    run = sample_run(runner_of(pipeline))
    solver = LinearSteps.of(pipeline, 8)
    with torch.no_grad():
        for step, timestep in enumerate(run.timesteps):
            predict = guided_prediction(runner_of(pipeline), timestep)
            made = solver.a[step] * run.latents[step] + solver.b[step] * predict(run.latents[step])
            torch.testing.assert_close(made, run.latents[step + 1], atol=1e-3, rtol=1e-4)


def test_samplers_whose_steps_are_no_function_are_refused() -> None:
    for name in ("dpm", "ddpm"):
        with pytest.raises(ValueError, match="first-order"):
            LinearSteps.of(tiny_pipeline(name), 8)


def test_errors_stay_below_their_bound_and_a_control_makes_none() -> None:
    pipeline = tiny_pipeline()
    run = sample_run(runner_of(pipeline))
    norms = step_jacobian_norms(runner_of(pipeline), run, num_timesteps=8)
    assert norms.shape == (8,)
    growth = error_growth(runner_of(pipeline), run, norms, parse_method("N2"))
    assert growth.measured[0] < 1e-6
    assert growth.measured[-1] > 1e-4
    assert (growth.geometric >= growth.predicted * 0.999).all()
    torch.testing.assert_close(growth.measured[1], growth.injected[1], rtol=1e-2, atol=1e-6)
    assert holds(growth.measured, 1.05 * growth.predicted)
    assert growth.feature_similarity[0] == pytest.approx(1, abs=1e-6)
    control = error_growth(runner_of(pipeline), run, norms, parse_method("N1"))
    assert control.measured.max() == 0
    assert not holds(growth.measured, control.predicted)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "guidance"])  # whose branches share a call here
def test_errors_are_measured_under_any_cache(method: str) -> None:
    """Also where one leaves out the last unit, or calls the model twice in a step."""
    pipeline = tiny_pipeline()
    run = sample_run(runner_of(pipeline))
    row = METHODS[method]
    specs = [spec for spec in (f"{method}:N2", f"{method}:0.9", f"{method}:1.5") if is_spec(spec)]
    for spec in specs:
        parsed = parse_method(spec)
        try:
            rules_on(parsed, pipeline.transformer)
        except ValueError:
            continue
        growth = error_growth(runner_of(pipeline), run, torch.ones(8, dtype=torch.float64), parsed)
        assert growth.measured.shape == growth.feature_similarity.shape == (8,), row
        assert growth.compute_ratio > 1
        assert growth.measured[-1] > 0
        assert "step" not in vars(pipeline.scheduler)


def is_spec(spec: str) -> bool:
    try:
        parse_method(spec)
    except ValueError:
        return False
    return True


# ----------------------------------------------------------------------------------------------------------------------
# Surfaces and weights


def test_directions_have_the_norms_they_are_named_for() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, 2, 2, generator=generator)
    weight[2] = 0
    direction = filter_normalised(weight, generator)
    torch.testing.assert_close(direction.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1))
    assert not filter_normalised(torch.ones(4), generator).any()
    batch = torch.randn(3, 4, 2, generator=generator)
    torch.testing.assert_close(sample_normalised(batch, generator).flatten(1).norm(dim=1), batch.flatten(1).norm(dim=1))


@pytest.mark.parametrize("quantity", ["weights", "inputs"])
def test_a_surface_is_one_in_the_middle_and_falls(quantity) -> None:
    model = tiny_dit()
    latents, labels = inputs()
    before = copy.deepcopy(model.state_dict())
    grids = [
        perturbation_surface(model, latents, torch.tensor(400), labels, [-radius, 0.0, radius], quantity=quantity)
        for radius in (0.02, 0.3)
    ]
    assert all(grid[1, 1].item() == pytest.approx(1, abs=1e-5) for grid in grids)
    assert (grids[1] <= grids[0] + 1e-6).all()
    assert grids[1][0, 0] < grids[1][1, 1] - 1e-4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_spectra_of_the_two_halves() -> None:
    model = tiny_dit()
    weight = model.blocks[4].long_skip.proj.weight.detach().double()
    spectrum = long_skip_spectra(model)[4]
    for part, matrix in (("whole", weight), ("hidden", weight[:, :32]), ("skip", weight[:, 32:])):
        torch.testing.assert_close(getattr(spectrum, part), torch.linalg.svdvals(matrix))
    assert sorted(long_skip_spectra(model)) == [3, 4, 5]
    assert long_skip_spectra(tiny_dit(long_skip=None)) == {}
    norms = layer_norms(model)
    expected = torch.linalg.svdvals(model.blocks[1].mlp.fc2.weight.detach().double())[0]
    assert norms["mlp.fc2"][1].item() == pytest.approx(expected.item())


def test_training_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(json.dumps({"step": s, "loss": 1 / s, "unit_gradient_norms": [s, 2]}) for s in (1, 2)))
    log = TrainingLog.read(path)
    assert log.steps.tolist() == [1, 2]
    assert log.unit_gradient_norms.tolist() == [[1, 2], [2, 2]]
    assert find_training_log("emoji") is None
    (tmp_path / "pipeline").mkdir()
    for model in (tmp_path, tmp_path / "pipeline"):
        monkeypatch.chdir(model)
        assert find_training_log(str(model)) == find_training_log(".") == path
    whole = path.read_text()
    for cut in ('{"step": 3, "lo', "{", "\x00"):
        path.write_text(f"{whole}\n{cut}")
        assert TrainingLog.read(path).steps.tolist() == [1, 2]
    path.write_text(f"{whole}\n")
    assert TrainingLog.read(path).steps.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it holds no step"),
        ("\n", "line 1 is not valid JSON"),
        ("{", "line 1 is not valid JSON"),
        ("[]\n", "line 1 is not as expected: Expected `object`, got `array`"),
        ("5\n", "line 1 is not as expected"),
        ("null\n", "line 1 is not as expected"),
        ('{"step": 1}', "missing required field `loss`"),
        ('{"step": 1, "loss": NaN}\n', "NaN is not a JSON number"),
        ('{"step": 1, "loss": "\x1b[2J"}\n', "line 1 is not valid JSON"),
        ('{"step": 1, "loss": 1e999}\n', "too large"),
        ('{"step": 1, "loss": 1}\nplain line\n', "line 2 is not valid JSON"),
        ('{"step": 1, "loss": 1, "unit_gradient_norms": [[1]]}\n', "Expected `float`, got `array`"),
        ('{"step": 1, "loss": ' + "[" * 100_000 + "}\n", "line 1"),
        (
            '{"step": 1, "loss": 1, "unit_gradient_norms": [1]}\n{"step": 1, "loss": 1, "unit_gradient_norms": []}\n',
            "expected sequence of length 1",
        ),
    ],
)
def test_other_logs_are_refused_in_one_line(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"log\.jsonl is not a log of skipdit train") as raised:
        TrainingLog.read(path)
    assert reason in str(raised.value)
    assert str(raised.value).isprintable()


def test_a_run_that_is_not_finite_is_not_measured() -> None:
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.transformer.blocks[0].mlp.fc1.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="samples latents that are not finite"):
        measure(pipeline, CONFIG)


# ----------------------------------------------------------------------------------------------------------------------
# The report


def test_a_report_on_two_models(tmp_path: Path) -> None:
    plain = tiny_pipeline(long_skip=None)
    log = TrainingLog(torch.arange(1, 31), torch.rand(30, dtype=torch.float64) + 0.1, torch.rand(30, 6) + 0.1)
    models = analyze(
        {"skip": tiny_pipeline(num_layers=5), "plain": plain}, CONFIG, OutputFolder(tmp_path, "analyze"), {"plain": log}
    )
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    assert drawn == {line.rpartition("](")[2][:-5] for line in page.splitlines() if line.startswith("![")}
    assert {"similarity", "cached_similarity", "error_growth_2", "jacobian_units", "surface_weights_500"} <= drawn
    assert {"gradient_norms_1", "training_loss", "long_skip_norms_1"} <= drawn
    assert drawn <= set(figure_names(CONFIG, 2))  # which are claimed before anything is measured
    assert "plain cannot use N2: this model has no long skips" in page
    assert "violated 0 times" in page
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["models"]["skip"]["num_long_skips"] == 2
    assert list(report["models"]["plain"]["caches"]) == ["delta:N2"]
    with np.load(tmp_path / "arrays.npz", allow_pickle=False) as arrays:
        assert arrays["skip/similarity"].shape == (5, 5)
        assert np.array_equal(arrays["plain/similarity"], models["plain"].similarity)
        assert arrays["plain/jacobian_units"].shape == (2, 6)
        assert arrays["plain/growth/delta:N2/measured"].shape == (6,)
        assert all(np.isfinite(array).all() for array in arrays.values())
    assert "plotly" in (tmp_path / "report.html").read_text(encoding="utf-8")
    with Image.open(tmp_path / "similarity.png") as picture:
        assert picture.width > picture.height


def test_the_same_seed_measures_the_same_and_the_pipeline_stays() -> None:
    pipeline = tiny_pipeline("dpm")
    scheduler, before = pipeline.scheduler, copy.deepcopy(pipeline.transformer.state_dict())
    first, second = (measure(pipeline, CONFIG).arrays() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert pipeline.scheduler is scheduler
    assert all(torch.equal(value, before[name]) for name, value in pipeline.transformer.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 2}, "steps must be at least 3, got 2"),
        ({"num_inference_steps": 1001}, "at most 1000"),
        ({"surface_size": 4}, "odd"),
        ({"weight_radius": 0.0}, "weight_radius must be above 0"),
        ({"surface_timesteps": ()}, "surface_timesteps"),
        ({"methods": ("nonsense",)}, "cache spec"),
    ],
)
def test_bad_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnalyzeConfig(**options)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "one" / "pipeline")
    sizes = ["--num-pictures", "1", "--steps", "4", "--surface-size", "3"]
    sizes += ["--jacobian-timesteps", "1", "--growth-timesteps", "2"]
    main(["analyze", str(tmp_path / "one" / "pipeline"), *sizes, "--methods", "N2", "--out", str(tmp_path / "out")])
    assert "report.md" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.md").read_text(encoding="utf-8").startswith("# Stability of one\n")
    for wrong, message in (
        (["--labels", "10"], "between 0 and 9, got 10"),
        (["--names", "a", "b"], "each model needs its own name, got a, b for 1"),
        (["--compare", str(tmp_path / "one" / "pipeline")], "give --names"),
        (["--compare", "nowhere"], "no model at nowhere"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["analyze", str(tmp_path / "one" / "pipeline"), *wrong, "--out", str(tmp_path / "bad")])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert not list((tmp_path / "bad").iterdir())
