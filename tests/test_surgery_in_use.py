"""Models with long skips beside adapters, hooks and threads; declared families."""

import copy
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook
from diffusers.models.modeling_utils import ModelMixin
from test_surgery import build, fused, run
from tiny import TINY_FAMILIES
from torch import Tensor, nn

from skipdit.cache.enable import cache_summary, disable_cache, enable_cache
from skipdit.models.families import FAMILIES, Family, Segment, declare_family
from skipdit.models.long_skip import LongSkipConfig
from skipdit.models.surgery import add_long_skips, long_skip_class


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "LatteTransformer3DModel", "FluxTransformer2DModel"])
def test_lora_trains_only_its_own_weights_and_the_cache_still_runs(name: str) -> None:
    peft = pytest.importorskip("peft")
    family, model = TINY_FAMILIES[name], build(name, True)
    arguments = family.arguments()
    expected = run(model, arguments)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "long_skip.proj"]), model)
    assert torch.equal(run(model, arguments), expected)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {key for key, _ in model.named_parameters() if "lora_" in key}
    assert sum("long_skip" in key for key in trained) == 2 * 3
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**arguments, return_dict=False)[0].square().mean().backward()
    optimizer.step()
    changed = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    assert changed == {key for key in trained if "lora_B" in key}  # the gradient of A is zero while B is
    adapted = run(model, arguments)
    assert not torch.equal(adapted, expected)
    enable_cache(model, "N2")
    assert torch.equal(run(model, arguments), adapted)
    assert torch.equal(run(model, arguments), adapted)
    assert cache_summary(model).steps_reused == 1


class Part(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, temb: Tensor, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.linear(hidden_states + temb).tanh()


class TwoPartTransformer(ModelMixin, ConfigMixin):
    """A unit is a block of `first` and then one of `second`; what comes between is the model's own affair."""

    @register_to_config
    def __init__(self, width: int = 8, depth: int = 5) -> None:
        super().__init__()
        self.first = nn.ModuleList(Part(width) for _ in range(depth))
        self.second = nn.ModuleList(Part(width) for _ in range(depth))

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        temb = timestep.reshape(-1, 1, 1) / 1000
        for first, second in zip(self.first, self.second, strict=True):
            hidden_states = second(temb, hidden_states=first(temb, hidden_states).flip(1)).flip(1)
        return (hidden_states,)


@pytest.fixture
def two_part_family() -> Iterator[None]:
    declare_family(TwoPartTransformer, Family(block_lists=("first", "second"), hidden_size=("width",)))
    yield
    del FAMILIES["TwoPartTransformer"]


@pytest.mark.usefixtures("two_part_family")
def test_a_declared_family_is_one_of_them(tmp_path: Path) -> None:
    model = TwoPartTransformer().eval()
    arguments = {"hidden_states": torch.randn(2, 4, 8), "timestep": torch.tensor([500.0])}
    plain = copy.deepcopy(model)
    expected = run(model, arguments)
    add_long_skips(model, LongSkipConfig(fusion="residual"))
    assert torch.equal(run(model, arguments), expected)
    assert [block.long_skip is not None for block in model.first] == [False, False, False, True, True]
    for unit in (3, 4):
        nn.init.normal_(model.first[unit].long_skip.proj.weight)

    temb, hidden, outputs = torch.tensor(0.5), arguments["hidden_states"], []
    for unit in range(5):
        if unit >= 3:
            hidden = hidden + fused(model.first[unit].long_skip, hidden, outputs[4 - unit])
        hidden = plain.second[unit](temb, plain.first[unit](temb, hidden).flip(1)).flip(1)
        outputs.append(hidden)
    torch.testing.assert_close(run(model, arguments), hidden)

    model.save_pretrained(tmp_path)
    expected = run(model, arguments)
    assert torch.equal(run(long_skip_class(TwoPartTransformer).from_pretrained(tmp_path), arguments), expected)
    enable_cache(model, "N2")
    assert torch.equal(run(model, arguments), expected)
    assert torch.equal(run(model, arguments), expected)
    assert cache_summary(model).steps_reused == 1


def test_an_unknown_transformer_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"not know the units of TwoPartTransformer.*declare_family"):
        add_long_skips(TwoPartTransformer())
    with pytest.raises(ValueError, match=r"TwoPartTransformer has no long skips .*declare_family"):
        enable_cache(TwoPartTransformer(), "N2")
    with pytest.raises(ValueError, match="at least one ModuleList"):
        Segment(lists=())
    with pytest.raises(ValueError, match="one of the streams text, image, got 'hidden_states'"):
        Segment(streams=("text", "image"))
    with pytest.raises(ValueError, match=r"joins must be streams of the segment before \(hidden_states\)"):
        Family(segments=(Segment(), Segment(joins=("encoder_hidden_states",))))


def test_the_short_form_of_a_family_is_one_segment() -> None:
    """Families were declared in these words before there were segments."""
    streams, branches = ("encoder_hidden_states", "hidden_states"), {"mlp": ("ff",)}
    short = Family(block_lists=("layers",), streams=streams, branches=branches, timestep_scale=1000.0)
    whole = Family(segments=(Segment(lists=("layers",), streams=streams, branches=branches),), timestep_scale=1000.0)
    assert short == whole
    assert Family(streams=streams) == Family(segments=(Segment(streams=streams),))
    assert replace(short, hidden_size=("dim",)) == replace(whole, hidden_size=("dim",))
    with pytest.raises(
        ValueError, match=r"either segments or block_lists, .*: got segments and block_lists, branches$"
    ):
        Family(segments=(Segment(),), block_lists=("layers",), branches=branches)
    with pytest.raises(ValueError, match="at least one ModuleList"):
        Family(block_lists=())


@pytest.mark.parametrize("given", [
    {"block_lists": "layers"}, {"streams": "x"}, {"branches": {"mlp": "ff"}}, {"hidden_size": "dim"},
    {"changing": "target_timestep"},
])  # fmt: skip
def test_one_name_is_not_taken_for_its_letters(given: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"(lists|streams|mlp|hidden_size|changing) must be a tuple of names such as \('\w+',\)"
    ):
        Family(**given)


def test_hooks_come_after_skipdit_and_may_stay() -> None:
    """Offloading replaces the forward of an instance: accelerate's is led to the class that is there now."""
    family = TINY_FAMILIES["HunyuanDiT2DModel"]
    arguments = family.arguments()
    first, after, gone = family.build(), family.build(), family.build()
    expected = run(first, arguments)
    for module in (first, first.blocks[3], gone, gone.blocks[3]):
        add_hook_to_module(module, ModelHook())
    remove_hook_from_module(gone, recurse=True)
    for model in (first, after, gone):
        enable_cache(model, "N2")
        assert torch.equal(run(model, arguments), expected)
        assert torch.equal(run(model, arguments), expected)
        assert cache_summary(model).steps_reused == 1
        if model is after:
            add_hook_to_module(model, ModelHook())
        disable_cache(model)
        assert type(model) is family.model_class
        assert torch.equal(run(model, arguments), expected)

    hooked = family.build()
    HookRegistry.check_if_exists_or_initialize(hooked.blocks[3]).register_hook(DiffusersHook(), "test")
    with pytest.raises(ValueError, match="diffusers has hooked the forward of this HunyuanDiTBlock"):
        enable_cache(hooked, "N2")
    assert type(hooked) is family.model_class
    HookRegistry.check_if_exists_or_initialize(hooked.blocks[3]).remove_hook("test")
    enable_cache(hooked, "N2")
    assert torch.equal(run(hooked, arguments), expected)


def test_a_second_thread_in_the_same_model_is_refused() -> None:
    family, model = TINY_FAMILIES["DiTTransformer2DModel"], build("DiTTransformer2DModel", True)
    expected = run(model, family.arguments())
    errors: list[BaseException] = []

    def call() -> None:
        try:
            run(model, family.arguments())
        except RuntimeError as error:
            errors.append(error)

    def enter(*_: object) -> None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    handle = model.transformer_blocks[3].attn1.register_forward_pre_hook(enter)
    assert torch.equal(run(model, family.arguments()), expected)
    handle.remove()
    assert "give each thread its own copy.deepcopy of it" in str(errors[0])
    assert torch.equal(run(model, family.arguments()), expected)
    with pytest.raises(RuntimeError, match="belongs to unit 2 of a model and runs only inside its forward"):
        model.transformer_blocks[2](torch.zeros(1, 16, 16))


def test_a_forward_that_failed_leaves_the_model_usable() -> None:
    family, model = TINY_FAMILIES["SD3Transformer2DModel"], build("SD3Transformer2DModel", True)
    expected = run(model, family.arguments())
    with pytest.raises(RuntimeError, match="shape"):
        run(model, family.arguments() | {"encoder_hidden_states": torch.zeros(2, 5, 13)})
    assert torch.equal(run(model, family.arguments()), expected)


def test_a_window_is_of_timesteps_to_1000_whatever_the_model_takes() -> None:
    """Flux takes timesteps from 0 to 1, and 0.7 in float32 is a little less."""
    family, model = TINY_FAMILIES["FluxTransformer2DModel"], build("FluxTransformer2DModel", True)
    enable_cache(model, "N4-700-50")
    for timestep in (1000, 900, 800, 700, 600, 500, 400, 50, 49):
        run(model, family.arguments(timestep))
    assert (cache_summary(model).steps_full, cache_summary(model).steps_reused) == (6, 3)
