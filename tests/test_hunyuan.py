"""HunyuanDiT, which has long skips by itself: a cache must hand every deep block the skip of its own pair, and
ControlNet adds to the skips."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, HunyuanDiT2DControlNetModel, HunyuanDiTControlNetPipeline
from tiny import SMALL, TINY_FAMILIES, flops_of, randomize
from torch import Tensor, nn

from skipdit.cache.enable import cache_summary, disable_cache, enable_cache

HUNYUAN = TINY_FAMILIES["HunyuanDiT2DModel"]


@torch.no_grad()
def run(model: nn.Module, arguments: dict[str, Any], **more: Any) -> Tensor:
    return model(**arguments, **more, return_dict=False)[0]


class Record:
    """Of the last call: the skip that each block was given, and what each block put out."""

    def __init__(self, model: nn.Module) -> None:
        self.skips: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.attended: list[int] = []
        for unit, block in enumerate(model.blocks):
            block.register_forward_pre_hook(
                lambda _, __, given, unit=unit: self.skips.__setitem__(unit, given.get("skip")), with_kwargs=True
            )
            block.register_forward_hook(lambda *given, unit=unit: self.outputs.__setitem__(unit, given[2]))
            block.attn1.register_forward_pre_hook(lambda *_, unit=unit: self.attended.append(unit))


def flops_of_blocks(model: nn.Module, arguments: dict[str, Any]) -> list[int]:
    """FLOPs of each block, called by itself with what the model gives it."""
    given: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    handles = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs, unit=unit: given.__setitem__(unit, (args, kwargs)), with_kwargs=True
        )
        for unit, block in enumerate(model.blocks)
    ]
    run(model, arguments)
    for handle in handles:
        handle.remove()
    return [flops_of(lambda: block(*given[unit][0], **given[unit][1])) for unit, block in enumerate(model.blocks)]  # noqa: B023


@pytest.mark.parametrize("num_layers", [8, 10])
def test_a_cached_call_right_after_a_full_call_is_bit_equal_for_every_k(num_layers: int) -> None:
    model = HUNYUAN.build(num_layers)
    arguments = HUNYUAN.arguments()
    expected = run(model, arguments)
    full = flops_of(lambda: run(model, arguments))
    blocks = flops_of_blocks(model, arguments)
    outputs: list[Tensor] = []
    for k in range(1, num_layers // 2):
        enable_cache(model, f"N2-k{k}")
        assert torch.equal(run(model, arguments), expected)
        reuse = flops_of(lambda: outputs.append(run(model, arguments)))
        assert torch.equal(outputs.pop(), expected)
        assert (cache_summary(model).steps_full, cache_summary(model).steps_reused) == (1, 1)
        assert cache_summary(model).compute_ratio == pytest.approx(2 * full / (full + reuse))
        assert reuse == full - sum(blocks[k : num_layers - k])
        disable_cache(model)
    assert type(model) is HUNYUAN.model_class


@pytest.mark.parametrize("num_layers", [8, 10])
def test_more_shallow_blocks_than_pairs_are_refused(num_layers: int) -> None:
    model, pairs = HUNYUAN.build(num_layers), num_layers // 2 - 1
    for k in (0, pairs + 1):
        message = f"between 1 and {pairs} for {num_layers} units with {pairs} linked pairs, got {k}"
        with pytest.raises(ValueError, match=message):
            enable_cache(model, f"N2-k{k}")
    assert type(model) is HUNYUAN.model_class


def reuse_step(num_layers: int, k: int) -> tuple[Record, Record]:
    """What the blocks saw in a full step, and in the reused step after it."""
    records = []
    for last in (800, 700):
        model = HUNYUAN.build(num_layers)
        enable_cache(model, f"N2-k{k}")
        record = Record(model)
        for timestep in range(800, last - 1, -100):
            record.attended.clear()
            run(model, HUNYUAN.arguments(timestep, seed=timestep))
        records.append(record)
    return records[0], records[1]


def check_skips(num_layers: int, k: int) -> None:
    full, reused = reuse_step(num_layers, k)
    assert full.attended == list(range(num_layers))
    assert reused.attended == [*range(k), *range(num_layers - k, num_layers)]
    for record, first_deep in ((full, num_layers // 2 + 1), (reused, num_layers - k)):
        for unit in range(first_deep, num_layers):
            assert record.skips[unit] is record.outputs[num_layers - 1 - unit], unit
    for unit in range(k):
        assert not torch.equal(reused.outputs[unit], full.outputs[unit])  # fresh


@pytest.mark.parametrize(("num_layers", "k"), [(8, 1), (8, 2), (8, 3), (10, 1), (10, 4)])
def test_on_a_reused_step_every_deep_block_gets_the_fresh_skip_of_its_own_pair(num_layers: int, k: int) -> None:
    check_skips(num_layers, k)


@pytest.mark.parametrize("front", [2, 3])
def test_with_two_or_three_blocks_in_front_the_last_block_still_gets_the_skip_of_the_first(front: int) -> None:
    """cache-dit 1.5.3, F2B1 and F3B1: skips are a stack, and block 7 got the one of block 1 or 2 (peers, section 0)."""
    _, reused = reuse_step(8, front)
    assert reused.skips[7] is reused.outputs[0]


@pytest.mark.parametrize("back", [2, 3])
def test_with_two_or_three_blocks_at_the_back_none_is_without_a_skip(back: int) -> None:
    """cache-dit 1.5.3, F1B2 and F1B3: pop from an empty list (peers, section 0)."""
    _, reused = reuse_step(8, back)
    assert all(reused.skips[unit] is not None for unit in range(8 - back, 8))
    check_skips(8, back)


# ----------------------------------------------------------------------------------------------------------------------
# ControlNet, whose residuals the forward adds to the skips: one a pair, the last to the innermost


def residuals(seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 16, 32, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("k", [1, 2])
def test_control_of_a_reused_step_reaches_the_blocks_that_run(k: int) -> None:
    """And there is never a number of controls that does not match: blocks that do not run use theirs up."""

    def last_step(controls: list[Tensor]) -> Tensor:
        model = HUNYUAN.build(8)
        enable_cache(model, f"N2-k{k}")
        run(model, HUNYUAN.arguments(800), controlnet_block_samples=residuals())
        out = run(model, HUNYUAN.arguments(700, seed=8), controlnet_block_samples=controls)
        assert cache_summary(model).steps_reused == 1
        assert controls == []
        return out

    expected = last_step(residuals())
    for pair in range(3):
        controls = residuals()
        controls[pair] = controls[pair] + 1
        assert torch.equal(last_step(controls), expected) == (pair >= k)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_with_control_a_cached_call_right_after_a_full_call_is_bit_equal(k: int) -> None:
    model, arguments = HUNYUAN.build(8), HUNYUAN.arguments()
    expected = run(model, arguments, controlnet_block_samples=residuals())
    assert not torch.equal(run(model, arguments), expected)
    enable_cache(model, f"N2-k{k}")
    for _ in range(2):
        assert torch.equal(run(model, arguments, controlnet_block_samples=residuals()), expected)
    assert cache_summary(model).steps_reused == 1


def test_on_the_controlnet_pipeline_of_diffusers() -> None:
    pytest.importorskip("transformers")  # which its pipeline imports
    transformer = HUNYUAN.build(8)
    sizes = {key: value for key, value in HUNYUAN.config.items() if key not in SMALL}
    controlnet = HunyuanDiT2DControlNetModel(
        transformer_num_layers=8, **(SMALL | sizes | {"attention_head_dim": HUNYUAN.config["attention_head_dim"]})
    )
    vae = AutoencoderKL(block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4)  # fmt: skip
    pipeline = HunyuanDiTControlNetPipeline(
        vae.eval(), None, None, transformer, DDIMScheduler(), None, None, randomize(controlnet),
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    embeds = {
        prefix + "prompt_embeds" + suffix: torch.randn(1, *shape)
        for prefix in ("", "negative_")
        for suffix, shape in (("", (4, 16)), ("_2", (6, 24)))
    }
    masks = {
        prefix + "prompt_attention_mask" + suffix: torch.ones(1, length)
        for prefix in ("", "negative_")
        for suffix, length in (("", 4), ("_2", 6))
    }

    def sample(picture: Tensor) -> Tensor:
        torch.manual_seed(0)  # the pipeline draws a sample of the control picture's latents
        return pipeline(control_image=picture, height=64, width=64, use_resolution_binning=False, num_inference_steps=6,
                        guidance_scale=3.0, generator=torch.Generator().manual_seed(0), output_type="latent",
                        original_size=(64, 64), **embeds, **masks).images  # fmt: skip

    pictures = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64)
    expected = sample(pictures[0])
    enable_cache(pipeline, "N1")
    assert torch.equal(sample(pictures[0]), expected)
    for k in (1, 2):
        enable_cache(pipeline, f"N2-k{k}")
        cached = [sample(picture) for picture in pictures]
        assert (cache_summary(pipeline).steps_full, cache_summary(pipeline).steps_reused) == (3, 3)
        assert cache_summary(pipeline).bytes_held == 0
        assert not torch.equal(cached[0], expected)
        assert not torch.equal(cached[0], cached[1])
