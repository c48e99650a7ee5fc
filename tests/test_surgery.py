"""Long skips and caches on every transformer whose units skipdit knows: one contract, then what each part promises."""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, LatteTransformer3DModel, WanTransformer3DModel
from safetensors.torch import load_file
from tiny import TINY_FAMILIES, in_dtype, tiny_dit
from torch import Tensor, nn

from skipdit.cache.enable import CachedModel, cache_summary, disable_cache, enable_cache
from skipdit.models.long_skip import LongSkipConfig
from skipdit.models.surgery import RunsUnits, add_long_skips, long_skip_class, open_units, remove_long_skips

CONVERTED = [name for name, family in TINY_FAMILIES.items() if not family.ours and not family.native]
CASES = [
    (name, long_skips)
    for name, family in TINY_FAMILIES.items()
    for long_skips in ((False,) if family.native else (False, True))
]


def for_cases(cases: list[tuple[str, bool]]) -> pytest.MarkDecorator:
    ids = [name + "-long_skips" * long_skips for name, long_skips in cases]
    return pytest.mark.parametrize(("name", "long_skips"), cases, ids=ids)


every_model = for_cases(CASES)
compiled_models = for_cases([case for case in CASES if case[0] not in ("DiT", "Latte")] + [("Latte", True)])


def build(name: str, long_skips: bool, num_units: int = 6) -> nn.Module:
    """A tiny model of the family, its units open, with random long skips or without any of ours."""
    family = TINY_FAMILIES[name]
    model = family.build(num_units)
    if long_skips:
        add_long_skips(model, LongSkipConfig())
        for key, parameter in model.named_parameters():
            if "long_skip" in key:
                nn.init.normal_(parameter, std=0.1)
    elif not family.ours:
        open_units(model)
    return model


def spec_of(name: str, long_skips: bool) -> str:
    return "N2" if long_skips or TINY_FAMILIES[name].native else "delta:N2"


@torch.no_grad()
def run(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    return model(**arguments, return_dict=False)[0]


# ----------------------------------------------------------------------------------------------------------------------
# The contract


@every_model
def test_save_and_load_are_bit_equal(name: str, long_skips: bool, tmp_path: Path) -> None:
    family, model = TINY_FAMILIES[name], build(name, long_skips)
    expected = run(model, family.arguments())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == family.model_class.__name__
    if not long_skips or family.ours:
        loaded = family.model_class.from_pretrained(tmp_path)
    else:
        with pytest.raises(OSError, match="diffusion_pytorch_model"):
            family.model_class.from_pretrained(tmp_path)
        loaded = long_skip_class(family.model_class).from_pretrained(tmp_path)
        assert loaded.config.long_skip == asdict(LongSkipConfig())
        assert type(loaded) is type(model)
    assert torch.equal(run(loaded, family.arguments()), expected)
    assert not loaded.training


@pytest.mark.parametrize("name", CONVERTED)
def test_a_folder_without_long_skips_is_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    family = TINY_FAMILIES[name]
    family.build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"without long skips: load it with {name}\.from_pretrained"):
        long_skip_class(family.model_class).from_pretrained(tmp_path)


@every_model
def test_a_deep_copy_is_a_model_of_its_own(name: str, long_skips: bool) -> None:
    family, model = TINY_FAMILIES[name], build(name, long_skips)
    arguments = family.arguments()
    expected = run(model, arguments)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not torch.equal(run(model, arguments), expected)
    assert torch.equal(run(twin, arguments), expected)
    enable_cache(twin, spec_of(name, long_skips))
    assert not isinstance(model, CachedModel)
    assert torch.equal(run(twin, arguments), expected)


@every_model
def test_gradient_checkpointing_gives_equal_gradients_even_of_two_forwards_at_once(name: str, long_skips: bool) -> None:
    family, model = TINY_FAMILIES[name], build(name, long_skips)
    if not model._supports_gradient_checkpointing:
        assert family.native  # diffusers has none for HunyuanDiT
        return
    twin = copy.deepcopy(model)
    twin.enable_gradient_checkpointing()
    ran: list[int] = []
    for each in (model, twin):
        block = each.blocks[0] if hasattr(each, "blocks") else each.transformer_blocks[0]
        block.register_forward_pre_hook(lambda *_: ran.append(1))
        first = each(**family.arguments(300, seed=1), return_dict=False)[0].square().mean()
        second = each(**family.arguments(700, seed=2), return_dict=False)[0].square().mean()
        (first + second).backward()
    assert len(ran) == 2 + 4
    for (key, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if parameter.grad is None:
            assert other.grad is None
        else:
            assert torch.equal(parameter.grad, other.grad), key
            assert "long_skip" not in key or parameter.grad.abs().max() > 0


@compiled_models
def test_compiled_each_kind_of_step_is_one_whole_graph(name: str, long_skips: bool) -> None:
    """Without long skips: the plain forward through open units. With them: full and reused steps of a cache. (Of our
    own models, test_cache and test_latte tell the rest.)"""
    torch._dynamo.reset()
    graphs = []

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    family = TINY_FAMILIES[name]
    cached = long_skips or family.native
    model = build(name, long_skips, num_units=4 if family.native else 2 + long_skips)
    if cached:
        enable_cache(model, "N2")
    steps = [family.arguments(timestep, seed=timestep) for timestep in (800, 600, 400, 200)]
    expected = [run(model, arguments) for arguments in steps]
    if cached:
        model._reset_stateful_cache()
    model.compile(fullgraph=True, backend=counting)
    for number, (arguments, out) in enumerate(zip(steps, expected, strict=True)):
        assert torch.equal(run(model, arguments), out)
        assert len(graphs) == (min(number + 1, 2) if cached else 1)
    assert not cached or cache_summary(model).steps_reused == 2
    torch._dynamo.reset()


@every_model
def test_bfloat16_runs_with_and_without_a_cache(name: str, long_skips: bool) -> None:
    family, model = TINY_FAMILIES[name], build(name, long_skips)
    arguments = family.arguments()
    exact = run(model, arguments)
    nn.Module.to(model, torch.bfloat16)
    half = run(model, in_dtype(arguments, torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).norm() / exact.norm() < 0.1
    enable_cache(model, spec_of(name, long_skips))
    given = in_dtype(arguments, torch.bfloat16)
    assert torch.equal(run(model, given), half)
    reused = run(model, given)
    assert cache_summary(model).steps_reused == 1
    assert reused.dtype == torch.bfloat16
    if long_skips or family.native:
        assert torch.equal(reused, half)


@every_model
def test_a_cache_holds_what_it_says_and_goes_without_a_trace(name: str, long_skips: bool) -> None:
    family = TINY_FAMILIES[name]
    model = build(name, long_skips) if long_skips else family.build()
    steps = [family.arguments(timestep, seed=timestep) for timestep in (800, 600, 400, 200)]
    expected = [run(model, arguments) for arguments in steps]
    blocks = [module for module in model.modules() if "Block" in type(module).__name__]
    classes, names = [type(module) for module in (model, *blocks)], list(model.state_dict())
    attributes = [set(vars(module)) for module in (model, *blocks)]

    enable_cache(model, spec_of(name, long_skips).replace("N2", "N1"))
    assert all(torch.equal(run(model, arguments), out) for arguments, out in zip(steps, expected, strict=True))
    assert cache_summary(model).steps_reused == 0

    enable_cache(model, spec_of(name, long_skips))
    given = steps[0]
    assert torch.equal(run(model, given), expected[0])
    # the very same tensors again are the next step of the same run
    reused = run(model, given)
    if long_skips or family.native:
        assert torch.equal(reused, expected[0])
    else:
        torch.testing.assert_close(reused, expected[0], atol=1e-5, rtol=0)  # a + (b - a) is b but for rounding
    assert (cache_summary(model).steps_full, cache_summary(model).steps_reused) == (1, 1)
    model._reset_stateful_cache()
    cached = [run(model, arguments) for arguments in steps]
    assert [torch.equal(a, b) for a, b in zip(cached, expected, strict=True)] == [True, False, True, False]
    summary = cache_summary(model)
    assert (summary.steps_full, summary.steps_reused, summary.num_units) == (2, 2, len(model.units()))

    disable_cache(model)
    assert [type(module) for module in (model, *blocks)] == classes
    assert [set(vars(module)) for module in (model, *blocks)] == attributes
    assert list(model.state_dict()) == names
    assert all(torch.equal(run(model, arguments), out) for arguments, out in zip(steps, expected, strict=True))


@every_model
def test_on_a_reuse_step_only_the_outermost_units_run(name: str, long_skips: bool) -> None:
    family, model = TINY_FAMILIES[name], build(name, long_skips)
    ran: list[int] = []
    for unit, entry in enumerate(model.unit_entries()):
        attention = next(module for key, module in entry.named_children() if "attn" in key)
        attention.register_forward_pre_hook(lambda *_, unit=unit: ran.append(unit))
    enable_cache(model, spec_of(name, long_skips) + "-k2")
    run(model, family.arguments(800))
    last = len(model.units()) - 1
    assert ran == [*range(last + 1)]
    run(model, family.arguments(700))
    assert ran[last + 1 :] == [0, 1, last - 1, last]


# ----------------------------------------------------------------------------------------------------------------------
# Long skips, given and taken


@pytest.mark.parametrize("name", [name for name, family in TINY_FAMILIES.items() if not family.native])
@pytest.mark.parametrize("num_units", [6, 7])
def test_a_residual_model_starts_exactly_where_it_was(name: str, num_units: int) -> None:
    family = TINY_FAMILIES[name]
    model = family.build(num_units)
    arguments = family.arguments()
    expected, keys = run(model, arguments), list(model.state_dict())
    add_long_skips(model, LongSkipConfig(fusion="residual"))
    assert torch.equal(run(model, arguments), expected)
    added = [key for key in model.state_dict() if key not in keys]
    assert [key for key in model.state_dict() if key in keys] == keys
    assert len(added) == 4 * (num_units // 2)
    assert all(".long_skip." in key for key in added)
    nn.init.normal_(model.unit_entries()[num_units - 1].long_skip.proj.weight, std=0.1)
    assert not torch.equal(run(model, arguments), expected)


@pytest.mark.parametrize("name", [name for name, family in TINY_FAMILIES.items() if not family.native])
def test_taken_long_skips_leave_nothing_behind(name: str) -> None:
    family = TINY_FAMILIES[name]
    model = family.build()
    arguments = family.arguments()
    expected, config, keys = run(model, arguments), dict(model.config), list(model.state_dict())
    add_long_skips(model, LongSkipConfig(num_pairs=2, norm="rms_norm"))
    assert model.config.long_skip == asdict(LongSkipConfig(num_pairs=2, norm="rms_norm"))
    assert not torch.equal(run(model, arguments), expected)
    remove_long_skips(model)
    assert type(model) is family.model_class
    assert (dict(model.config), list(model.state_dict())) == (config, keys)
    assert torch.equal(run(model, arguments), expected)
    if not family.ours:
        assert not any(isinstance(module, RunsUnits) or hasattr(module, "_info") for module in model.modules())


def fused(long_skip: nn.Module, hidden: Tensor, skip: Tensor) -> Tensor:
    """`proj(norm([hidden, skip]))`, by hand."""
    both = torch.cat([hidden, skip], dim=-1)
    normed = F.layer_norm(both, both.shape[-1:], long_skip.norm.weight, long_skip.norm.bias, 1e-6)
    return F.linear(normed, long_skip.proj.weight, long_skip.proj.bias)


def last_hidden_states(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    seen: list[Tensor] = []
    handle = model.norm_out.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    run(model, arguments)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("num_units", [6, 7])
@torch.no_grad()
def test_a_converted_dit_equals_a_stack_written_by_hand(num_units: int) -> None:
    family = TINY_FAMILIES["DiTTransformer2DModel"]
    plain, linked = family.build(num_units), family.build(num_units)
    add_long_skips(linked, LongSkipConfig())
    arguments = family.arguments()
    hidden, stack = plain.pos_embed(arguments["hidden_states"]), []
    for unit, block in enumerate(plain.transformer_blocks):
        if unit >= num_units - num_units // 2:
            hidden = fused(linked.transformer_blocks[unit].long_skip, hidden, stack.pop())
        hidden = block(hidden, timestep=arguments["timestep"], class_labels=arguments["class_labels"])
        if unit < num_units // 2:
            stack.append(hidden)
    assert not stack
    assert torch.equal(last_hidden_states(linked, arguments), hidden)


@pytest.mark.parametrize("num_units", [6, 7])
@torch.no_grad()
def test_a_converted_latte_links_pairs_of_a_spatial_and_a_temporal_block(num_units: int) -> None:
    family = TINY_FAMILIES["LatteTransformer3DModel"]
    plain, linked = family.build(num_units), family.build(num_units)
    add_long_skips(linked, LongSkipConfig())
    arguments = family.arguments()
    batch, _, frames = arguments["hidden_states"].shape[:3]
    hidden = plain.pos_embed(arguments["hidden_states"].permute(0, 2, 1, 3, 4).flatten(0, 1))
    tokens, width = hidden.shape[1:]
    time, _ = plain.adaln_single(
        arguments["timestep"], added_cond_kwargs={"resolution": None, "aspect_ratio": None}, batch_size=batch
    )
    text = plain.caption_projection(arguments["encoder_hidden_states"]).repeat_interleave(frames, dim=0)
    stack = []
    for unit in range(num_units):
        if unit >= num_units - num_units // 2:
            hidden = fused(linked.transformer_blocks[unit].long_skip, hidden, stack.pop())
        hidden = plain.transformer_blocks[unit](
            hidden, encoder_hidden_states=text, timestep=time.repeat_interleave(frames, dim=0)
        )
        hidden = hidden.reshape(batch, frames, tokens, width).transpose(1, 2).reshape(-1, frames, width)
        if unit == 0:
            hidden = hidden + plain.temp_pos_embed
        hidden = plain.temporal_transformer_blocks[unit](hidden, timestep=time.repeat_interleave(tokens, dim=0))
        hidden = hidden.reshape(batch, tokens, frames, width).transpose(1, 2).reshape(-1, tokens, width)
        if unit < num_units // 2:
            stack.append(hidden)
    assert torch.equal(last_hidden_states(linked, arguments), (hidden))
    assert not any("temporal" in key for key in linked.state_dict() if "long_skip" in key)


def test_what_cannot_be_added_or_taken_is_refused() -> None:
    model = build("PixArtTransformer2DModel", True)
    with pytest.raises(ValueError, match=r"already has long skips: call skipdit\.remove_long_skips"):
        add_long_skips(model)
    with pytest.raises(ValueError, match="has long skips of its own"):
        add_long_skips(build("HunyuanDiT2DModel", False))
    with pytest.raises(ValueError, match="are part of it and cannot be removed"):
        remove_long_skips(build("HunyuanDiT2DModel", False))
    for plain in (TINY_FAMILIES["PixArtTransformer2DModel"].build(), build("DiT", False), build("Latte", False)):
        with pytest.raises(ValueError, match="has no long skips that skipdit added"):
            remove_long_skips(plain)
    with pytest.raises(ValueError, match=r"not know the units of Linear.*declare_family"):
        add_long_skips(nn.Linear(2, 2))


@pytest.mark.parametrize("num_pairs", [0, 4])
def test_a_model_that_gets_no_long_skips_stays_what_it_was(num_pairs: int) -> None:
    model = TINY_FAMILIES["DiTTransformer2DModel"].build()
    with pytest.raises(ValueError, match=rf"num_pairs.*{num_pairs}"):
        add_long_skips(model, LongSkipConfig(num_pairs=num_pairs))
    with pytest.raises(ValueError, match="no long skips"):
        enable_cache(model, "N2")
    assert type(model) is DiTTransformer2DModel
    assert "long_skip" not in model.config


def test_under_a_cache_long_skips_are_neither_given_nor_taken() -> None:
    family = TINY_FAMILIES["DiTTransformer2DModel"]
    plain, linked = family.build(), build("DiTTransformer2DModel", True)
    enable_cache(plain, "delta:N2")
    enable_cache(linked, "N2")
    for change, model in ((add_long_skips, plain), (remove_long_skips, linked)):
        with pytest.raises(ValueError, match=r"call skipdit\.disable_cache"):
            change(model)
        run(model, family.arguments())
        disable_cache(model)
        change(model)
    assert type(plain) is long_skip_class(DiTTransformer2DModel)
    assert type(linked) is DiTTransformer2DModel


def test_under_a_cache_a_model_of_ours_keeps_its_long_skips() -> None:
    model = tiny_dit()
    enable_cache(model, "N2")
    with pytest.raises(ValueError, match=r"call skipdit\.disable_cache"):
        remove_long_skips(model)
    assert model.long_skip_links.sources


def test_a_cached_model_saves_and_its_class_loads(tmp_path: Path) -> None:
    family, model = TINY_FAMILIES["DiTTransformer2DModel"], build("DiTTransformer2DModel", True)
    expected = run(model, family.arguments())
    enable_cache(model, "N2")
    model.save_pretrained(tmp_path, max_shard_size="10kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(run(loaded, family.arguments()), expected)


@pytest.mark.parametrize(
    ("lengths", "config"), [((4, 6), LongSkipConfig(num_pairs=5)), ((1, 1), LongSkipConfig())], ids=["more", "none"]
)
def test_pairs_are_counted_within_a_segment_before_anything_changes(
    lengths: tuple[int, int], config: LongSkipConfig
) -> None:
    """10 units have 5 pairs, but segments of 4 and 6 at most 3: the model was left open."""
    model = TINY_FAMILIES["FluxTransformer2DModel"].build(lengths[0], num_single_layers=lengths[1])
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="num_pairs"):
        add_long_skips(model, config)
    assert [type(module) for module in model.modules()] == classes


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = build("DiTTransformer2DModel", True)
    del model.transformer_blocks[5].long_skip.proj.bias
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"transformer_blocks\.5\.long_skip\.proj\.bias"):
        long_skip_class(DiTTransformer2DModel).from_pretrained(tmp_path)
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="long_skip"):
        long_skip_class(DiTTransformer2DModel).from_pretrained(tmp_path)


def test_in_half_precision_wan_keeps_in_float32_what_diffusers_keeps(tmp_path: Path) -> None:
    family = TINY_FAMILIES["WanTransformer3DModel"]
    family.build().save_pretrained(tmp_path / "plain")
    model = WanTransformer3DModel.from_pretrained(tmp_path / "plain", torch_dtype=torch.bfloat16)
    dtypes = {key: parameter.dtype for key, parameter in model.named_parameters()}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    add_long_skips(model, LongSkipConfig())
    assert {parameter.dtype for key, parameter in model.named_parameters() if "long_skip" in key} == {torch.bfloat16}
    arguments = in_dtype(family.arguments(), torch.bfloat16)
    expected = run(model, arguments)
    assert expected.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "linked")
    loaded = long_skip_class(WanTransformer3DModel).from_pretrained(tmp_path / "linked", dtype=torch.bfloat16)
    assert {key: p.dtype for key, p in loaded.named_parameters() if "long_skip" not in key} == dtypes
    assert torch.equal(run(loaded, arguments), expected)


# ----------------------------------------------------------------------------------------------------------------------
# The authors' model


def authors_latte(weights: dict[str, Tensor], config: dict[str, Any], long_skips: bool) -> LatteTransformer3DModel:
    model = LatteTransformer3DModel(**config).eval()
    if long_skips:
        add_long_skips(model, LongSkipConfig())
    state = {}
    for key, tensor in weights.items():
        if key.startswith("skip_"):  # skip_norms.{j}.*, skip_linears.{j}.linear.*
            place, number, *_, last = key.split(".")
            part = "norm" if place == "skip_norms" else "proj"
            key = f"transformer_blocks.{14 + int(number)}.long_skip.{part}.{last}"
            if not long_skips:
                continue
        if not key.endswith("y_embedding"):
            state[key] = tensor
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(
    ("case", "spec"),
    [("vanilla", None), ("skip", None), ("cached_N2_700_50", "N2-700-50"), ("cached_N3_700_50", "N3-700-50")],
)
def test_parity_with_the_authors_text_to_video_model(case: str, spec: str | None, shared: Path) -> None:
    cases = load_file(shared / "parity" / "latte_t2v_skip_cases.safetensors")
    config = json.loads((shared / "parity" / "latte_t2v_skip.json").read_text())["config"]
    weights = load_file(shared / "parity" / "latte_t2v_skip.safetensors")
    model = authors_latte(weights, config, long_skips=case != "vanilla")
    if spec is not None:
        enable_cache(model, spec)
    for latents, timestep, expected in zip(cases["x"], cases["t"], cases[case], strict=True):
        arguments = {"timestep": timestep.expand(2), "encoder_hidden_states": cases["encoder_hidden_states"]}
        torch.testing.assert_close(run(model, {"hidden_states": latents} | arguments), expected, atol=1e-4, rtol=0)
    if spec is not None:
        assert cache_summary(model).steps_reused >= 4
