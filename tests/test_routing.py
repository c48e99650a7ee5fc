"""Tokens routed past deep units: in a forward, and in training."""

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import inputs, randomize, tiny_dit, tiny_latte
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from training_runs import assert_same_run, make_config, make_data, read_log

import skipdit.training.loop
from skipdit.checkpoints import load_model
from skipdit.diffusion import training_loss
from skipdit.files.output import MARKER
from skipdit.models.dit import DiT
from skipdit.models.forward_plan import ForwardPlan, Units
from skipdit.models.latte import Latte
from skipdit.models.long_skip import LongSkipConfig
from skipdit.models.routing import TokenRoute, kept_tokens
from skipdit.models.surgery import add_fill_token, add_long_skips, remove_long_skips
from skipdit.training import (
    TokenRoutingConfig,
    TrainConfig,
    draw_kept_tokens,
    learning_rate_at,
    list_checkpoints,
    train,
)
from skipdit.training.batches import find_step_kinds
from skipdit.training.routing import StepKinds, make_plans, route_of

ALL = LongSkipConfig()
PLAIN_MODELS: dict[str, Callable[[LongSkipConfig | None], Any]] = {
    "dit": lambda long_skip: tiny_dit(6, long_skip),
    "latte": lambda long_skip: tiny_latte(6, long_skip),
}
every_model = pytest.mark.parametrize("name", PLAIN_MODELS)
NUM_TOKENS = 16
KEPT = torch.tensor([[1, 5, 6, 14], [0, 2, 9, 15]])


def arguments(name: str) -> dict[str, Any]:
    latents, labels = inputs()
    if name == "latte":
        clips = torch.stack([latents, latents.flip(-1), latents.flip(-2)], dim=1)
        return {"hidden_states": clips, "timestep": torch.tensor(500), "class_labels": labels}
    return {"hidden_states": latents, "timestep": torch.tensor([500, 300]), "class_labels": labels}


def routed(
    model: Any, kept: Tensor | None, *, start: int = 2, stop: int = 4, fill: bool = False, **given: Any
) -> Tensor:
    route = TokenRoute(start=start, stop=stop, fill=fill, leaves_out=kept is None)
    plan = ForwardPlan.of(model.long_skip_links, route=route)
    return model(**given, plan=plan, stored=None if kept is None else kept_tokens(kept)).output.sample


# ----------------------------------------------------------------------------------------------------------------------
# A forward


@every_model
@pytest.mark.parametrize("long_skip", [None, ALL, LongSkipConfig(fusion="residual")], ids=["plain", "all", "residual"])
def test_where_all_tokens_are_kept_nothing_changes(name: str, long_skip: LongSkipConfig | None) -> None:
    model, given = PLAIN_MODELS[name](long_skip), arguments(name)
    everything = torch.arange(NUM_TOKENS).expand(2, -1)
    with torch.no_grad():
        assert torch.equal(routed(model, everything, **given), model(**given).sample)
        assert torch.equal(routed(model, everything[:1], **given), model(**given).sample)
        assert not torch.allclose(routed(model, KEPT, **given), model(**given).sample, atol=1e-3)


@every_model
def test_tokens_that_are_not_kept_come_back_as_they_were(name: str) -> None:
    """Before unit 4, in all frames; and unit 2 sees the kept ones alone, as they left unit 1."""
    model, given = PLAIN_MODELS[name](ALL), arguments(name)
    entered: dict[int, Tensor] = {}
    for unit, blocks in enumerate(model.units()):
        blocks[0].register_forward_pre_hook(lambda _, args, unit=unit: entered.update({unit: args[0].detach()}))
    left: dict[int, Tensor] = {}
    for unit, blocks in enumerate(model.units()):
        blocks[-1].register_forward_hook(lambda *call, unit=unit: left.update({unit: call[2].detach()}))
    with torch.no_grad():
        routed(model, KEPT, **given)
    num_frames = 3 if name == "latte" else 1
    assert [entered[unit].shape[1] for unit in range(6)] == [16, 16, 4, 4, 16, 16]

    def by_frame(states: Tensor, rows: int) -> Tensor:
        """(b f) n d, or from blocks over time (b n) f d."""
        if name == "latte" and len(states) == 2 * rows:
            return states.unflatten(0, (2, rows)).transpose(1, 2)
        return states.unflatten(0, (2, num_frames))

    before, back, deep = by_frame(left[1], 16), by_frame(entered[4], 16), by_frame(left[3], 4)
    for sample in range(2):
        others = [token for token in range(NUM_TOKENS) if token not in KEPT[sample].tolist()]
        assert torch.equal(back[sample][:, others], before[sample][:, others])
        assert torch.equal(back[sample][:, KEPT[sample]], deep[sample])
        assert torch.equal(by_frame(entered[2], 4)[sample], before[sample][:, KEPT[sample]])


def by_hand(model: DiT, kept: Tensor | None, fill: Tensor | None, given: dict[str, Any]) -> Tensor:
    """Units 2 and 3 of 6 routed, block by block; kept: the same for all samples."""
    hidden_states = model.patch_embed(given["hidden_states"]) + model.position_embedding
    timesteps = model.timestep_frequencies(given["timestep"])
    conditioning = model.timestep_embedder(timesteps) + model.class_embedder(given["class_labels"])
    first = model.blocks[0](hidden_states, conditioning)
    second = model.blocks[1](first, conditioning)
    back = second.clone() if fill is None else fill.expand_as(second).clone()
    if kept is not None:
        third = model.blocks[2](second[:, kept], conditioning)
        back[:, kept] = model.blocks[3](third, conditioning, third)
    hidden_states = model.blocks[4](back, conditioning, second)
    hidden_states = model.blocks[5](hidden_states, conditioning, first)
    patches = model.final_layer(hidden_states, conditioning)
    return patches.view(2, 4, 4, 2, 2, 8).permute(0, 5, 1, 3, 2, 4).reshape(2, 8, 8, 8)


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("kept", [torch.tensor([[1, 5, 6, 14]]), None], ids=["kept", "left_out"])
def test_a_routed_forward_is_what_it_says_block_by_block(kept: Tensor | None, fill: bool) -> None:
    """Inner skips act on the kept tokens, outer ones on all. Without deep units only shallow ones run."""
    model, given = tiny_dit(6, LongSkipConfig(fill_token=True)), arguments("dit")
    with torch.no_grad():
        expected = by_hand(model, None if kept is None else kept[0], model.fill_token if fill else None, given)
        torch.testing.assert_close(routed(model, kept, fill=fill, **given), expected, rtol=1e-5, atol=1e-5)


@every_model
@pytest.mark.parametrize("fill", [False, True])
def test_gradients_reach_every_weight_that_takes_part(name: str, fill: bool) -> None:
    model, given = PLAIN_MODELS[name](LongSkipConfig(fill_token=True)), arguments(name)
    deep = {id(weight) for unit in (2, 3) for block in model.units()[unit] for weight in block.parameters()}
    for kept in (KEPT, None):
        model.zero_grad()
        routed(model, kept, fill=fill, **given).square().mean().backward()
        for key, weight in model.named_parameters():
            takes_part = (fill or key != "fill_token") and (kept is not None or id(weight) not in deep)
            assert (weight.grad is not None) == takes_part, key
            assert weight.grad is None or weight.grad.abs().max() > 0, key


def test_pictures_beside_a_clip_keep_the_tokens_of_its_frames() -> None:
    """Pictures of a joint sample change nothing in the clip, also where tokens are routed."""
    model, given = tiny_latte(6), arguments("latte")
    pictures = given | {"num_images": 1, "image_class_labels": torch.tensor([[4], [7]])}
    pictures["hidden_states"] = torch.cat([given["hidden_states"], given["hidden_states"][:, :1]], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(
            routed(model, KEPT, **pictures)[:, :3], routed(model, KEPT, **given), rtol=0, atol=1e-5
        )


def test_the_samples_of_a_batch_are_apart() -> None:
    model, given = tiny_dit(6), arguments("dit")
    with torch.no_grad():
        both = routed(model, KEPT, **given)
        for sample in range(2):
            one = {key: value[sample : sample + 1] for key, value in given.items()}
            torch.testing.assert_close(
                routed(model, KEPT[sample : sample + 1], **one)[0], both[sample], rtol=0, atol=1e-5
            )


@pytest.mark.parametrize(("name", "num_units"), [("dit", 4), ("latte", 3)])
def test_compiled_a_routed_forward_is_one_graph_for_all_draws(name: str, num_units: int) -> None:
    torch._dynamo.reset()
    model = tiny_dit(num_units) if name == "dit" else tiny_latte(num_units)
    given, stop = arguments(name), num_units - 1
    expected = [routed(model, kept, start=1, stop=stop, **given) for kept in (KEPT, KEPT.flip(0))]
    route = TokenRoute(start=1, stop=stop)
    plan, left_out = (
        ForwardPlan.of(model.long_skip_links, route=each) for each in (route, replace(route, leaves_out=True))
    )
    counter = CompileCounter()
    model.compile(fullgraph=True, backend=counter)
    for _ in range(2):
        for kept, wanted in zip((KEPT, KEPT.flip(0)), expected, strict=True):
            found = model(**given, plan=plan, stored=kept_tokens(kept)).output.sample
            assert torch.equal(found, wanted)
            found.mean().backward()
    assert counter.frame_count == 1
    model(**given, plan=left_out)
    model(**given)
    assert counter.frame_count == 3
    torch._dynamo.reset()


@every_model
def test_gradient_checkpointing_gives_equal_gradients_of_routed_forwards(name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = PLAIN_MODELS[name](LongSkipConfig(fill_token=True))
        if checkpointing:
            model.enable_gradient_checkpointing()
        routed(model, KEPT, fill=True, **arguments(name)).square().mean().backward()
        gradients.append([weight.grad for weight in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_what_cannot_be_routed_is_refused() -> None:
    model, given = tiny_dit(6), arguments("dit")
    with pytest.raises(ValueError, match="no fill token"):
        routed(model, KEPT, fill=True, **given)
    plan = ForwardPlan.of(model.long_skip_links, route=TokenRoute(start=2, stop=4))
    for stored in (None, {}):
        with pytest.raises(ValueError, match=r"pass stored=kept_tokens\(kept\)"):
            model(**given, plan=plan, stored=stored)
    left_out = ForwardPlan.of(model.long_skip_links, route=TokenRoute(start=2, stop=4, leaves_out=True))
    with pytest.raises(ValueError, match="keeps no tokens"):
        model(**given, plan=left_out, stored=kept_tokens(KEPT))
    for start, stop in ((0, 3), (3, 3), (4, 3)):
        with pytest.raises(ValueError, match=f"got {start} to {stop}"):
            TokenRoute(start=start, stop=stop)
    with pytest.raises(ValueError, match="the model has only 6 units"):
        ForwardPlan.of(model.long_skip_links, route=TokenRoute(start=2, stop=7))
    with pytest.raises(ValueError, match="either route tokens or"):
        ForwardPlan.of(model.long_skip_links, route=TokenRoute(start=2, stop=4), store=[Units(start=1, stop=5)])


# ----------------------------------------------------------------------------------------------------------------------
# The fill token


@pytest.mark.parametrize("model_class", [DiT, Latte])
def test_a_fill_token_is_saved_and_loaded(model_class: type[nn.Module], tmp_path: Path) -> None:
    model = tiny_dit(6) if model_class is DiT else tiny_latte(6)
    add_fill_token(model)
    assert model.config.long_skip["fill_token"] is True
    assert torch.equal(model.fill_token, torch.zeros(model.blocks[0].mlp.fc1.in_features))
    randomize(model)
    model.save_pretrained(tmp_path)
    for again in (model_class.from_pretrained(tmp_path), load_model(tmp_path)):
        assert torch.equal(again.fill_token, model.fill_token)
    remove_long_skips(model)
    assert model.fill_token is None
    assert "fill_token" not in model.state_dict()
    with pytest.raises(ValueError, match="needs long skips that skipdit added"):
        add_fill_token(model)
    add_long_skips(model, LongSkipConfig(fill_token=True))
    assert "fill_token" in model.state_dict()


def test_a_file_of_weights_tells_that_there_is_a_fill_token(tmp_path: Path) -> None:
    model = tiny_dit(6, LongSkipConfig(fill_token=True))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    again = load_model(tmp_path / "weights.safetensors", num_attention_heads=2, fusion="replace", sample_size=8)
    assert torch.equal(again.fill_token, model.fill_token)
    given = arguments("dit")
    with torch.no_grad():
        assert torch.equal(routed(again, KEPT, fill=True, **given), routed(model, KEPT, fill=True, **given))


# ----------------------------------------------------------------------------------------------------------------------
# What is drawn


def test_kept_tokens_are_drawn_anew_for_each_sample() -> None:
    kept = draw_kept_tokens(2000, 16, 0.25, torch.Generator().manual_seed(0))
    assert kept.shape == (2000, 4)
    assert bool((kept.diff(dim=1) > 0).all())
    assert 0 <= kept.min() <= kept.max() <= 15
    shares = torch.bincount(kept.flatten(), minlength=16) / 2000
    assert shares.min() > 0.2
    assert shares.max() < 0.3
    assert len(kept.unique(dim=0)) > 800
    assert draw_kept_tokens(3, 16, 0.01).shape == (3, 1)
    assert torch.equal(draw_kept_tokens(3, 16, 1.0), torch.arange(16).expand(3, -1))


def test_the_dense_end_is_a_share_of_the_flops() -> None:
    config = TokenRoutingConfig(mode="bypass", deep_drop=0.1, dense_end=0.2)
    plans = make_plans(config, tiny_dit(6))
    kinds = StepKinds(config, plans, {"dense": 100, "routed": 40, "shallow": 20})
    generators = [torch.Generator().manual_seed(step) for step in range(10_000)]
    steps = [kinds.at(step, 10_000, generator) for step, generator in enumerate(generators)]
    first = kinds.first_dense_step(10_000)
    assert set(steps[first:]) == {"dense"}
    assert set(steps[:first]) == {"routed", "shallow"}
    assert steps[:first].count("shallow") / first == pytest.approx(0.1, abs=0.01)
    spent = [kinds.flops[kind] for kind in steps]
    assert sum(spent[first:]) / sum(spent) == pytest.approx(0.2, abs=0.003)
    assert kinds.mean_flops == pytest.approx(sum(spent) / len(spent), rel=0.003)


@pytest.mark.parametrize(("end", "first"), [(0.0, 50), (1.0, 0)])
def test_a_run_may_end_without_dense_steps_or_be_dense(end: float, first: int) -> None:
    config = TokenRoutingConfig(mode="bypass", deep_drop=0.0, dense_end=end)
    kinds = StepKinds(config, make_plans(config, tiny_dit(6)), {"dense": 100, "routed": 40})
    assert kinds.first_dense_step(50) == first
    off = TokenRoutingConfig()
    kinds = StepKinds(off, make_plans(off, tiny_dit(6)), {"dense": 100})
    assert (kinds.first_dense_step(50), kinds.mean_flops) == (0, 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "tread"}, "mode must be one of off, bypass, fill, got 'tread'"),
        ({"share": 0.0}, "share .* got 0.0"),
        ({"share": 1.5}, "share .* got 1.5"),
        ({"share": float("nan")}, "share must be finite"),
        ({"num_shallow_units": 0}, "num_shallow_units .* got 0"),
        ({"deep_drop": 1.0}, r"deep_drop must be in \[0, 1\), got 1.0"),
        ({"dense_end": -0.1}, "dense_end .* got -0.1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenRoutingConfig(**options)


def test_by_default_as_many_units_see_all_tokens_as_fit() -> None:
    config = TokenRoutingConfig(mode="bypass")
    routes = [route_of(config, num_units) for num_units in (3, 4, 5, 24)]
    assert [(route.start, route.stop) for route in routes] == [(1, 2), (1, 3), (2, 3), (2, 22)]


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="num_shallow_units must be at most 2 for 6 units, got 3"):
        make_plans(TokenRoutingConfig(mode="bypass", num_shallow_units=3), tiny_dit(6))
    with pytest.raises(ValueError, match=r"at least 3 units, got 2: set routing\.mode off"):
        make_plans(TokenRoutingConfig(mode="bypass"), tiny_dit(2))
    with pytest.raises(ValueError, match=r"set model\.long_skip"):
        make_plans(TokenRoutingConfig(mode="fill"), tiny_dit(6, None))


# ----------------------------------------------------------------------------------------------------------------------
# A run

ROUTING = {
    "bypass": TokenRoutingConfig(mode="bypass", share=0.5, num_shallow_units=1, deep_drop=0.3),
    "fill": TokenRoutingConfig(mode="fill", share=0.5, num_shallow_units=1, deep_drop=0.3),
}
every_mode = pytest.mark.parametrize("mode", ROUTING)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Twelve steps of four blocks on 8x8 pixels in four tokens."""
    return make_config(make_data(tmp_path / "data"), max_steps=12)


def kinds_of(config: TrainConfig, out: Path) -> list[str]:
    """The kinds of a run's steps, as its log tells them."""
    model = load_model(out / "pipeline")
    task = config.model.build(skipdit.training.loop.open_items(config.data), config.objective, model)
    flops = find_step_kinds(task, config).flops
    spent = [0, *(entry["flops"] for entry in read_log(out))]
    names = {count * config.batch_size: kind for kind, count in flops.items()}
    return [names[after - before] for before, after in itertools.pairwise(spent)]


@every_mode
def test_a_routed_run_resumes_exactly(
    mode: str, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(config: TrainConfig, step: int) -> float:
        if step == 8:
            raise KeyboardInterrupt
        return learning_rate_at(config, step)

    config = replace(config, routing=ROUTING[mode])
    train(config, tmp_path / "whole", device="cpu")
    kinds = kinds_of(config, tmp_path / "whole")
    assert kinds[-2:] == ["dense", "dense"]
    assert set(kinds[:-2]) == {"routed", "shallow"}
    monkeypatch.setattr(skipdit.training.loop, "learning_rate_at", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "stopped", device="cpu")
    monkeypatch.undo()
    assert [path.name for path in list_checkpoints(tmp_path / "stopped")][-1] == "checkpoint-0000006"
    train(config, tmp_path / "stopped", device="cpu")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    spent = [[entry["flops"] for entry in read_log(tmp_path / name)] for name in ("whole", "stopped")]
    assert spent[0] == spent[1]


def test_deep_units_rest_in_shallow_steps(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, routing=ROUTING["bypass"])
    train(config, tmp_path / "run", device="cpu")
    for kind, entry in zip(kinds_of(config, tmp_path / "run"), read_log(tmp_path / "run"), strict=True):
        norms = entry["unit_gradient_norms"]
        assert (norms[1:3] == [0, 0]) == (kind == "shallow" or entry["step"] == 1)
    assert "shallow" in kinds_of(config, tmp_path / "run")[1:]


def test_a_share_of_one_is_a_dense_run(config: TrainConfig, tmp_path: Path) -> None:
    """But for rounding: gathered tokens lie otherwise in memory."""
    train(config, tmp_path / "dense", device="cpu")
    routing = TokenRoutingConfig(mode="bypass", share=1.0, num_shallow_units=1, deep_drop=0.0)
    train(replace(config, routing=routing), tmp_path / "routed", device="cpu")
    losses = [[entry["loss"] for entry in read_log(tmp_path / name)] for name in ("dense", "routed")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("long_skip", [None, ALL])
def test_the_log_tells_the_flops_that_torch_counts(
    long_skip: LongSkipConfig | None, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whole steps as they are made, forward and backward, of every kind."""
    model = replace(config.model, long_skip=long_skip)
    config = replace(config, model=model, routing=ROUTING["bypass"])
    counted = []
    backward = skipdit.training.loop.Run.backward

    def count(run: Any, *args: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loss = backward(run, *args)
        counted.append(counter.get_total_flops())
        return loss

    monkeypatch.setattr(skipdit.training.loop.Run, "backward", count)
    train(config, tmp_path / "run", device="cpu")
    told = [entry["flops"] for entry in read_log(tmp_path / "run")]
    assert told == torch.tensor(counted).cumsum(0).tolist()
    assert len(set(counted)) == 3


def test_a_checkpoint_from_before_routing_goes_on_dense(config: TrainConfig, tmp_path: Path) -> None:
    """Its settings do not know of routing, nor its state of FLOPs."""
    train(replace(config, max_steps=6), tmp_path / "run", device="cpu")
    path = list_checkpoints(tmp_path / "run")[-1] / "state.json"
    state = json.loads(path.read_text())
    del state["flops"], state["config"]["routing"]
    path.write_text(json.dumps(state))
    marker = json.loads((path.parent / MARKER).read_text())
    marker["files"]["checkpoint"]["state.json"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / MARKER).write_text(json.dumps(marker))
    train(config, tmp_path / "run", device="cpu")
    assert [entry["step"] for entry in read_log(tmp_path / "run")] == list(range(1, 13))


def test_a_routed_model_learns_what_a_dense_one_learns(config: TrainConfig, tmp_path: Path) -> None:
    """Three colours, told by their class at the highest noise alone."""
    objective = replace(config.objective, logit_mean=2.0)
    routing = TokenRoutingConfig(mode="bypass", share=0.25, num_shallow_units=1)
    config = replace(config, objective=objective, routing=routing, max_steps=300, checkpoint_every=300)
    config = replace(config, ema_decay=0.98)
    task = config.model.build(skipdit.training.loop.open_items(config.data), config.objective)
    model = load_model(train(config, tmp_path / "run", device="cpu"))
    pixels, labels = (torch.stack([torch.as_tensor(item[place]) for item in task.items]) for place in (0, 1))
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    losses = {}
    for name, each in (("fresh", task.model.eval()), ("trained", model)):
        with torch.no_grad():
            losses[name] = training_loss(
                lambda noisy, times, each=each: each(noisy, times, labels).sample,
                objective, pixels, noise, torch.full((len(pixels),), 990.0),
            ).loss.mean()  # fmt: skip
    assert losses["trained"] < 0.1 * losses["fresh"]
