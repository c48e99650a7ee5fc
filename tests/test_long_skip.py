"""Pairing, fusion, flow."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import inputs, tiny_dit

from skipdit.cache.site import DeepFeatures
from skipdit.models.forward_plan import PLAIN, ForwardPlan, ForwardState, Units
from skipdit.models.long_skip import LongSkip, LongSkipConfig, LongSkipLinks, pair_units


@given(num_units=st.integers(1, 60), middle_pair=st.booleans())
def test_pairing_is_a_bijection_of_the_halves(num_units: int, middle_pair: bool) -> None:
    sources = pair_units(num_units, LongSkipConfig(middle_pair=middle_pair))
    assert len(set(sources.values())) == len(sources)
    assert all(source + target == num_units - 1 and source < target for target, source in sources.items())
    left_out = num_units % 2 == 0 and not middle_pair
    assert len(sources) == num_units // 2 - left_out
    if sources:
        assert min(sources.values()) == 0


@given(num_units=st.integers(2, 40), data=st.data())
def test_the_outermost_pairs_are_linked_first(num_units: int, data: st.DataObject) -> None:
    num_pairs = data.draw(st.integers(0, num_units // 2))
    assert pair_units(num_units, LongSkipConfig(num_pairs=num_pairs)) == {
        num_units - 1 - source: source for source in range(num_pairs)
    }


def test_more_pairs_than_the_depth_has_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 3 for 7 units, got 4"):
        pair_units(7, LongSkipConfig(num_pairs=4))
    with pytest.raises(ValueError, match="at most 3 for 8 units, got 4"):
        pair_units(8, LongSkipConfig(num_pairs=4, middle_pair=False))


@pytest.mark.parametrize(
    "options",
    [{"num_pairs": -1}, {"norm": "batch_norm"}, {"fusion": "sum"}, {"init": "ones"}],
    ids=lambda o: next(iter(o)),
)
def test_a_bad_option_is_named(options: dict) -> None:
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        LongSkipConfig(**options)


def test_fusion_is_norm_over_both_then_projection() -> None:
    skip = LongSkip(8, LongSkipConfig())
    torch.nn.init.normal_(skip.norm.weight)
    torch.nn.init.normal_(skip.norm.bias)
    hidden, other = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    both = torch.cat([hidden, other], dim=-1).double()
    normed = (both - both.mean(-1, keepdim=True)) / (both.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    normed = normed * skip.norm.weight.double() + skip.norm.bias.double()
    expected = normed @ skip.proj.weight.double().T + skip.proj.bias.double()
    torch.testing.assert_close(skip(hidden, other), expected.float(), atol=1e-5, rtol=0)


def test_rms_norm_is_computed_in_float32() -> None:
    skip = LongSkip(64, LongSkipConfig(norm="rms_norm")).to(torch.bfloat16)
    hidden = (300 * torch.randn(1, 2, 128)).to(torch.bfloat16)
    exact = hidden.float() / (hidden.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(skip.norm(hidden), exact.to(torch.bfloat16))
    assert skip.norm(hidden).dtype == torch.bfloat16


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_half_precision_norm_equals_float32_norm(norm: str) -> None:
    skip = LongSkip(16, LongSkipConfig(norm=norm))
    inputs = torch.randn(2, 4, 32).to(torch.bfloat16)
    exact = skip.norm(inputs.float()).to(torch.bfloat16)
    assert torch.equal(skip.to(torch.bfloat16).norm(inputs), exact)


def test_initialisations() -> None:
    torch.manual_seed(0)
    default, xavier, zero = (LongSkip(1152, LongSkipConfig(init=init)).proj for init in ("default", "xavier", "zero"))
    assert default.weight.abs().max().item() == pytest.approx(
        2304**-0.5, rel=1e-3
    )  # as released, reference section 1.0
    assert default.bias.abs().max() > 0
    assert xavier.weight.abs().max().item() == pytest.approx((6 / 3456) ** 0.5, rel=1e-3)
    assert xavier.bias.abs().max() == 0
    assert zero.weight.abs().max() == 0
    assert LongSkip(8, LongSkipConfig(fusion="residual")).proj.weight.abs().max() == 0


def test_a_residual_model_starts_exactly_where_it_was() -> None:
    plain = tiny_dit(long_skip=None)
    linked = tiny_dit(long_skip=LongSkipConfig(fusion="residual"))
    missing, unexpected = linked.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all("long_skip" in name for name in missing)
    for block in linked.blocks:
        if block.long_skip is not None:
            block.long_skip.reset_parameters()
    latents, labels = inputs()
    timestep = torch.tensor(300)
    assert torch.equal(plain(latents, timestep, labels).sample, linked(latents, timestep, labels).sample)


@pytest.mark.parametrize("num_layers", [3, 6, 7])
@pytest.mark.parametrize("config", [LongSkipConfig(), LongSkipConfig(num_pairs=1), LongSkipConfig(middle_pair=False)])
def test_forward_equals_a_stack_written_by_hand(num_layers: int, config: LongSkipConfig) -> None:
    model = tiny_dit(num_layers, config)
    seen: list[torch.Tensor] = []
    handles = [
        model.patch_embed.register_forward_hook(lambda _, __, out: seen.append(out)),
        model.timestep_embedder.register_forward_hook(lambda _, __, out: seen.append(out)),
    ]
    latents, labels = inputs()
    output = model(latents, torch.tensor([10.0, 900.0]), labels).sample
    for handle in handles:
        handle.remove()
    hidden = seen[0] + model.position_embedding
    conditioning = seen[1] + model.class_embedder(labels)
    stack = []
    for unit, block in enumerate(model.blocks):
        source = num_layers - 1 - unit
        skip = None
        if block.long_skip is not None:
            popped, skip = stack.pop()
            assert popped == source
        hidden = block(hidden, conditioning, skip)
        if source < num_layers and model.blocks[source].long_skip is not None:
            stack.append((unit, hidden))
    assert not stack
    patches = model.final_layer(hidden, conditioning).reshape(2, 4, 4, 2, 2, 8)
    assert torch.equal(output, torch.einsum("nhwpqc->nchpwq", patches).reshape(2, 8, 8, 8))


@pytest.mark.parametrize("num_layers", [5, 8])
def test_a_reuse_step_after_a_full_step_on_the_same_input_is_bit_equal(num_layers: int) -> None:
    model = tiny_dit(num_layers)
    latents, labels = inputs()
    timestep = torch.tensor(500)
    plain = model(latents, timestep, labels)
    for num_shallow_units in range(1, model.long_skip_links.max_num_shallow_units + 1):
        (deep,) = DeepFeatures(num_shallow_units).regions(model)
        store, reuse = (ForwardPlan.of(model.long_skip_links, **{verb: (deep,)}) for verb in ("store", "reuse"))
        full, stored = model(latents, timestep, labels, plan=store)
        calls = []
        handles = [block.register_forward_hook(lambda *_, calls=calls: calls.append(1)) for block in model.blocks]
        reused, _ = model(latents, timestep, labels, plan=reuse, stored=stored)
        for handle in handles:
            handle.remove()
        assert len(calls) == 2 * num_shallow_units < num_layers
        assert torch.equal(full.sample, plain.sample)
        assert torch.equal(reused.sample, plain.sample)


def test_shallow_units_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="between 1 and 2 for 6 units with 3 linked pairs, got 3"):
        DeepFeatures(3).regions(tiny_dit(6))
    with pytest.raises(ValueError, match="between 1 and 1 for 6 units with 1 linked pairs, got 2"):
        DeepFeatures(2).regions(tiny_dit(6, LongSkipConfig(num_pairs=1)))
    with pytest.raises(ValueError, match="no long skips"):
        DeepFeatures().regions(tiny_dit(6, None))


def test_steps_that_do_not_add_up_are_refused() -> None:
    links, units = LongSkipLinks(6, {5: 0}), Units(start=1, stop=5)
    with pytest.raises(ValueError, match="pass stored="):
        ForwardState(links, ForwardPlan.of(links, reuse=(units,)), None)
    with pytest.raises(ValueError, match="the plan reuses nothing"):
        ForwardState(links, PLAIN, {})
    with pytest.raises(ValueError, match="the model has only 6 units"):
        ForwardPlan.of(links, store=(Units(start=1, stop=7),))
    with pytest.raises(ValueError, match="at least one unit in the range, got 2 to 2"):
        Units(start=2, stop=2)
    with pytest.raises(ValueError, match="needs the skip of unit 0, which was left out"):
        ForwardState(links, ForwardPlan.of(links, reuse=(Units(start=0, stop=2, skips=False),)), {}).skip(5)


def test_gradient_checkpointing_gives_equal_gradients_even_of_two_forwards_at_once() -> None:
    model = tiny_dit()
    twin = copy.deepcopy(model)
    twin.enable_gradient_checkpointing()
    latents, labels = inputs()
    for each in (model, twin):
        first = each(latents, torch.tensor(10), labels).sample.square().mean()
        second = each(latents.flip(0), torch.tensor(700), labels).sample.square().mean()
        (first + second).backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name


def test_a_deep_copy_runs_its_own_weights() -> None:
    model = tiny_dit()
    twin = copy.deepcopy(model)
    latents, labels = inputs()
    before = twin(latents, torch.tensor(3), labels).sample
    torch.nn.init.zeros_(model.blocks[5].long_skip.proj.weight)
    assert torch.equal(twin(latents, torch.tensor(3), labels).sample, before)
    assert not torch.equal(model(latents, torch.tensor(3), labels).sample, before)


def test_a_forward_state_has_no_default_that_the_compiler_cannot_name() -> None:
    """Up to torch 2.11 a default that is an object breaks the graph of every compiled model at its first line."""
    arguments = [field for field in dataclasses.fields(ForwardState) if field.init]
    assert [field.name for field in arguments] == ["links", "plan", "reused"]
    assert all(field.default is dataclasses.MISSING for field in arguments)
