"""Tokens routed past the deep units of transformers of diffusers.

The oracle knows nothing of skipdit and gathers nothing: on a plain model all units see all tokens, but in the deep ones
attention is masked, so that no token looks at those that are not kept; before the next unit these get back what they
were. So whatever is by token in a model (rotary embeddings, masks, levels of noise) is that of the right tokens.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import EXPECTED_WARNINGS, TINY, TinyTransformer
from families.reference import arguments_of
from torch import Tensor, nn

from skipdit.models.families import BY_TOKEN, FAMILIES, Family
from skipdit.models.forward_plan import ForwardPlan
from skipdit.models.long_skip import LongSkipConfig
from skipdit.models.routing import TokenRoute, kept_tokens
from skipdit.models.surgery import add_long_skips, open_units

pytestmark = [pytest.mark.filterwarnings(warning) for warning in EXPECTED_WARNINGS]

NUM_SHALLOW = 2
# where attention joins text and images: the texts' keys come before the images'
TEXT_FIRST = {
    *("AuraFlowTransformer2DModel", "BriaFiboTransformer2DModel", "BriaTransformer2DModel"),
    *("ChromaTransformer2DModel", "CogVideoXTransformer3DModel", "CogView3PlusTransformer2DModel"),
    *("CogView4Transformer2DModel", "EasyAnimateTransformer3DModel", "Flux2Transformer2DModel"),
    *("FluxTransformer2DModel", "LongCatImageTransformer2DModel", "OvisImageTransformer2DModel"),
    *("PRXTransformer2DModel", "QwenImageTransformer2DModel"),
}


@dataclass
class Masked:
    """A plain model whose deep units attend to kept tokens only. kept: (batch, kept)."""

    tiny: TinyTransformer
    model: nn.Module
    family: Family
    kept: Tensor
    num_tokens: int
    text_first: bool
    in_deep_units: bool = False
    num_masked: int = 0
    entered: list[Tensor] = field(default_factory=list)

    def stream_of(self, unit: int) -> str:
        return self.family.segments[self.tiny.segment_of(self.model, unit)].fused_stream

    def is_kept(self, num_rows: int) -> Tensor:
        mask = torch.zeros(len(self.kept), self.num_tokens, dtype=torch.bool).scatter(1, self.kept, True)
        return mask.repeat_interleave(num_rows // len(mask), dim=0)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any,
               **kwargs: Any) -> Tensor:  # fmt: skip
        num_texts = key.shape[-2] - self.num_tokens
        if self.in_deep_units and num_texts >= 0:
            self.num_masked += 1
            images, texts = self.is_kept(len(key)), torch.ones(len(key), num_texts, dtype=torch.bool)
            seen = torch.cat([texts, images] if self.text_first else [images, texts], dim=1)[:, None, None]
            bias = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf)
            attn_mask = bias if attn_mask is None else bias + attn_mask
        return SDPA(query, key, value, attn_mask, *args, **kwargs)

    def begin(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
        self.in_deep_units = True
        self.entered.append(arguments_of(block, args, kwargs).arguments[name].clone())

    def end(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> tuple[Any, Any]:
        self.in_deep_units = False
        call = arguments_of(block, args, kwargs)
        stream, before = call.arguments[name], self.entered[0]
        num_texts = stream.shape[1] - self.num_tokens
        texts_first = self.text_first and num_texts > 0
        images = stream[:, num_texts:] if texts_first else stream[:, : self.num_tokens]
        texts = stream[:, :num_texts] if texts_first else stream[:, self.num_tokens :]
        images = torch.where(self.is_kept(len(stream)).unsqueeze(-1), images, before)
        call.arguments[name] = torch.cat([texts, images] if texts_first else [images, texts], dim=1)
        return call.args[1:], call.kwargs

    def outputs(self, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        units = self.tiny.units(self.model)
        start, stop = NUM_SHALLOW, len(units) - NUM_SHALLOW
        begins, ends = self.stream_of(start), self.stream_of(stop)
        hooks = [
            units[start][0].register_forward_pre_hook(lambda *call: self.begin(*call, begins), with_kwargs=True),
            units[stop][0].register_forward_pre_hook(lambda *call: self.end(*call, ends), with_kwargs=True),
        ]
        with attention(self.attend), torch.no_grad():
            outputs = self.tiny.outputs(self.model(**inputs))
        for hook in hooks:
            hook.remove()
        return outputs


SDPA = F.scaled_dot_product_attention


@contextlib.contextmanager
def attention(attend: Any) -> Iterator[None]:
    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = SDPA


def count_tokens(tiny: TinyTransformer, model: nn.Module, family: Family, inputs: dict[str, Any]) -> int:
    counts = []
    block = tiny.units(model)[NUM_SHALLOW][0]
    name = family.segments[tiny.segment_of(model, NUM_SHALLOW)].fused_stream
    hook = block.register_forward_pre_hook(
        lambda *call: counts.append(arguments_of(*call).arguments[name].shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return counts[0]


def draw(num_samples: int, num_tokens: int) -> Tensor:
    order = torch.rand(num_samples, num_tokens, generator=torch.Generator().manual_seed(3)).argsort(dim=1)
    return order[:, : num_tokens // 4].sort(dim=1).values


def check(name: str, inputs: dict[str, Any], **config: Any) -> None:
    tiny, family = TINY[name], FAMILIES[name]
    model = tiny.build(**config)
    num_tokens = count_tokens(tiny, model, family, inputs)
    kept = draw(1 if family.shares_tokens else tiny.batch, num_tokens)
    masked = Masked(tiny, model, family, kept, num_tokens, name in TEXT_FIRST)
    expected = masked.outputs(inputs)
    num_units = len(tiny.units(model))
    assert masked.num_masked >= num_units - 2 * NUM_SHALLOW
    with torch.no_grad():
        dense = tiny.outputs(model(**inputs))
    assert not any(torch.allclose(one, other, atol=1e-3) for one, other in zip(dense, expected, strict=True))

    open_units(model)
    links = model.long_skip_links
    plan = ForwardPlan.of(links, route=TokenRoute(start=NUM_SHALLOW, stop=num_units - NUM_SHALLOW))
    with torch.no_grad():
        routed = tiny.outputs(model(**inputs, plan=plan, stored=kept_tokens(kept)).output)
        everything = torch.arange(num_tokens).expand(len(kept), -1)
        whole = tiny.outputs(model(**inputs, plan=plan, stored=kept_tokens(everything)).output)
        again = tiny.outputs(model(**inputs))
    for one, other in zip(routed, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6 * float(other.abs().max()))
    assert all(torch.equal(one, other) for one, other in zip(whole, dense, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(again, dense, strict=True))


@pytest.mark.parametrize("name", BY_TOKEN)
def test_deep_units_see_the_kept_tokens_and_all_that_belongs_to_them(name: str) -> None:
    """Also: where all are kept, outputs are those of a forward that routes none, to the bit."""
    check(name, TINY[name].inputs(1, 4))


def test_levels_of_noise_by_token_are_those_of_the_kept_tokens() -> None:
    """Wan 2.2 and LTX-Video take a timestep for each token."""
    generator = torch.Generator().manual_seed(0)
    inputs = TINY["WanTransformer3DModel"].inputs(1, 4) | {"timestep": 1000 * torch.rand(2, 32, generator=generator)}
    check("WanTransformer3DModel", inputs)
    inputs = TINY["LTXVideoTransformer3DModel"].inputs(1, 4)
    check("LTXVideoTransformer3DModel", inputs | {"timestep": 1000 * torch.rand(2, 32, generator=generator)})


def test_rotary_embeddings_of_cogvideox_are_those_of_the_kept_tokens() -> None:
    angles = torch.rand(32, 4, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, dim=1)
    inputs = TINY["CogVideoXTransformer3DModel"].inputs(1, 4) | {"image_rotary_emb": (angles.cos(), angles.sin())}
    check("CogVideoXTransformer3DModel", inputs, use_rotary_positional_embeddings=True)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in BY_TOKEN and name in TINY])
def test_other_models_refuse_by_name(name: str) -> None:
    model = TINY[name].build()
    open_units(model)
    plan = ForwardPlan.of(model.long_skip_links, route=TokenRoute(start=1, stop=3))
    with pytest.raises(ValueError, match=rf"the tokens of \w*{name} cannot be routed.*by_token"):
        model(**TINY[name].inputs(1, 4), plan=plan, stored=kept_tokens(draw(1, 8)))


def test_samples_keep_the_same_tokens_where_they_share_embeddings() -> None:
    tiny = TINY["HunyuanDiT2DModel"]
    model = tiny.build()
    open_units(model)
    assert model.shares_tokens
    plan = ForwardPlan.of(model.long_skip_links, route=TokenRoute(start=1, stop=5))
    with pytest.raises(ValueError, match=r"keep the same tokens in all of them by .* \(1, kept\), got \(2, 4\)"):
        model(**tiny.inputs(1, 4), plan=plan, stored=kept_tokens(draw(2, 16)))


def test_tokens_leave_before_text_joins_them() -> None:
    tiny = TINY["Flux2Transformer2DModel"]
    model = tiny.build()
    open_units(model)
    start = model.long_skip_links.segment_starts[0]
    plan = ForwardPlan.of(model.long_skip_links, route=TokenRoute(start=start, stop=start + 2))
    with pytest.raises(ValueError, match=f"must leave before unit {start}, where text joins them, got unit {start}"):
        model(**tiny.inputs(1, 4), plan=plan, stored=kept_tokens(draw(1, 16)))


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "Flux2Transformer2DModel", "LatteTransformer3DModel"])
@pytest.mark.parametrize("leaves_out", [False, True])
@pytest.mark.parametrize("fill_token", [False, True])
def test_long_skips_and_gradient_checkpointing(name: str, leaves_out: bool, fill_token: bool) -> None:
    """Skips pair within a segment, so they cross from all tokens to the kept ones, and back. Where all tokens are kept
    that changes nothing, a unit that runs again in the backward pass sees what it saw, and every weight is reached."""
    tiny = TINY[name]
    model = tiny.build()
    add_long_skips(model, LongSkipConfig(fill_token=fill_token))
    num_units = model.long_skip_links.num_units
    route = TokenRoute(start=2, stop=num_units - 2, fill=fill_token, leaves_out=leaves_out)
    plan = ForwardPlan.of(model.long_skip_links, route=route)
    inputs = tiny.inputs(1, 4)
    if not leaves_out and not fill_token:
        with torch.no_grad():
            dense, whole = model(**inputs), model(
                **inputs, plan=plan, stored=kept_tokens(torch.arange(16).expand(1, -1))
            ).output  # fmt: skip
        assert all(map(torch.equal, tiny.outputs(dense), tiny.outputs(whole)))

    stored = None if leaves_out else kept_tokens(draw(1, 16))
    gradients = []
    for checkpointing in (False, True):
        (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
        model.zero_grad()
        output = model(**inputs, plan=plan, stored=stored).output
        sum(each.square().mean() for each in tiny.outputs(output)).backward()
        gradients.append({key: weight.grad for key, weight in model.named_parameters()})
    deep = [id(weight) for unit in range(2, num_units - 2) for block in model.units()[unit]
            for weight in block.parameters()]  # fmt: skip
    dense = tiny.build()
    sum(each.square().mean() for each in tiny.outputs(dense(**inputs))).backward()
    unreached = {key for key, weight in dense.named_parameters() if weight.grad is None}
    for key, weight in model.named_parameters():
        left_out = key in unreached or (leaves_out and id(weight) in deep)
        for found in gradients:
            assert (found[key] is None) == left_out, key
        if not left_out:
            assert torch.equal(gradients[0][key], gradients[1][key]), key
            assert "fill_token" not in key or gradients[0][key].abs().max() > 0
