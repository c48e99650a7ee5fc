"""The class-to-video model: pairs of blocks, long skips over pairs, joint images, saving, the authors' outputs."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_latte
from torch import Tensor

from skipdit.cache.enable import cache_summary, enable_cache
from skipdit.cache.methods import CacheMethod
from skipdit.cache.schedule import IntervalSchedule
from skipdit.cache.site import DeepFeatures
from skipdit.models.forward_plan import ForwardPlan
from skipdit.models.latte import LATTE_PRESETS, Latte
from skipdit.models.long_skip import LongSkipConfig


def clips(batch: int = 2, frames: int = 3, size: int = 8, seed: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timestep, labels."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, frames, 4, size, size, generator=generator)
    return latents, torch.tensor(500), torch.randint(10, (batch,), generator=generator)


# ----------------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize("name", LATTE_PRESETS)
@pytest.mark.parametrize("long_skip", [None, LongSkipConfig()], ids=["plain", "long_skip"])
def test_every_preset_builds(name: str, long_skip: LongSkipConfig | None) -> None:
    with torch.device("meta"):
        model = Latte.from_preset(name, num_classes=101, long_skip=long_skip)
    num_layers, hidden_size, _, patch_size = LATTE_PRESETS[name]
    num_skips = sum("long_skip.proj.weight" in key for key in model.state_dict())
    assert num_skips == (0 if long_skip is None else num_layers // 4)
    assert len(model.blocks) == num_layers
    assert model.patch_embed.proj.weight.shape == (hidden_size, 4, patch_size, patch_size)
    assert model.class_embedder.weight.shape == (102, hidden_size)


def test_xl_2_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in Latte.from_preset("Latte-XL/2", long_skip=config).parameters())
            for config in (None, LongSkipConfig())
        ]
    # the DiT of that size less its embedding of 1001 classes, and half as many skips (D -> 2D^2 + 5D each)
    assert counts[0] == 675_129_632 - 294_912 - 1001 * 1152
    assert counts[1] - counts[0] == 7 * (2 * 1152**2 + 5 * 1152)


def test_an_unknown_preset_names_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match=r"Latte-S/2, .*Latte-XL/8, got 'DiT-S/2'"):
        Latte.from_preset("DiT-S/2")


@pytest.mark.parametrize("num_units", [1, 2, 3, 4, 5])
def test_every_even_depth_works(num_units: int) -> None:
    model = tiny_latte(num_units)
    latents, timestep, labels = clips()
    assert model.long_skip_links.sources == {num_units - 1 - unit: unit for unit in range(num_units // 2)}
    output = model(latents, timestep, labels)
    assert output.sample.shape == (2, 3, 8, 8, 8)
    for k in range(1, model.long_skip_links.max_num_shallow_units + 1):
        (deep,) = DeepFeatures(k).regions(model)
        store, reuse = (ForwardPlan.of(model.long_skip_links, **{verb: (deep,)}) for verb in ("store", "reuse"))
        full, stored = model(latents, timestep, labels, plan=store)
        reused, _ = model(latents, timestep, labels, plan=reuse, stored=stored)
        assert torch.equal(full.sample, output.sample)
        assert torch.equal(reused.sample, output.sample)
    assert model.long_skip_links.max_num_shallow_units == (num_units - 1) // 2


def test_bad_sizes_are_named() -> None:
    for num_layers in (0, 5):
        with pytest.raises(ValueError, match=f"num_layers must be even.*got {num_layers}"):
            Latte(num_layers=num_layers)
    with pytest.raises(ValueError, match="divisible by 4, got 18"):
        Latte(num_attention_heads=3, attention_head_dim=6)
    with pytest.raises(ValueError, match="sample_size must be divisible by patch_size 3, got 32"):
        Latte(patch_size=3)
    for name in ("patch_size", "num_frames"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            Latte(**{name: 0})
    with pytest.raises(ValueError, match="num_classes must be at least 1, got -1"):
        Latte(num_classes=-1)


def test_bad_inputs_are_named() -> None:
    model = tiny_latte()
    _, timestep, labels = clips()
    with pytest.raises(ValueError, match=r"divisible by patch_size 2, got \(9, 9\)"):
        model(clips(size=9)[0], timestep, labels)
    with pytest.raises(ValueError, match="1 to 3 frames, got 4"):
        model(clips(frames=4)[0], timestep, labels)
    with pytest.raises(ValueError, match="1 to 3 frames, got 0"):
        model(clips(frames=2)[0], timestep, labels, num_images=2, image_class_labels=torch.zeros(2, 2).long())
    with pytest.raises(ValueError, match="num_images must be at least 0, got -1"):
        model(clips(frames=2)[0], timestep, labels, num_images=-1)


def test_shorter_clips_and_other_sizes_work() -> None:
    model = tiny_latte()
    latents, timestep, labels = clips(frames=2, size=8)
    wide = torch.cat([latents, latents], dim=-1)
    assert model(wide, timestep, labels).sample.shape == (2, 2, 8, 8, 16)
    assert model(wide.transpose(-1, -2), timestep, labels).sample.shape == (2, 2, 8, 16, 8)


def test_every_patch_of_every_frame_comes_back_to_its_place() -> None:
    identity = Latte(sample_size=4, num_frames=3, patch_size=2, in_channels=1, out_channels=1, num_layers=2,
                     num_attention_heads=2, attention_head_dim=8)  # fmt: skip
    with torch.no_grad():
        identity.patch_embed.proj.weight.copy_(torch.eye(16, 4).reshape(16, 1, 2, 2))
        identity.final_layer.proj.weight.copy_(torch.eye(4, 16))
        identity.final_layer.norm = torch.nn.Identity()
        identity.position_embedding.zero_()
        clip = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 1, 4, 4)
        out = identity(clip, torch.tensor(0)).sample
        frames = identity.frame_embedding[:, :4].reshape(3, 2, 2).repeat(1, 2, 2)
    torch.testing.assert_close(out, clip + frames[None, :, None], atol=1e-5, rtol=0)


def test_order_in_time_matters() -> None:
    model = tiny_latte()
    latents, timestep, labels = clips()
    output = model(latents, timestep, labels).sample
    assert (model(latents.flip(1), timestep, labels).sample.flip(1) - output).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------------------------------
# Conditioning


def test_class_labels_are_given_where_the_model_knows_classes_and_only_there() -> None:
    latents, timestep, labels = clips()
    with pytest.raises(ValueError, match="this model takes one per clip"):
        tiny_latte()(latents, timestep)
    unconditional = tiny_latte(num_classes=None)
    with pytest.raises(ValueError, match="this model takes none"):
        unconditional(latents, timestep, labels)
    assert unconditional(latents, timestep).sample.shape == (2, 3, 8, 8, 8)
    assert not any("class_embedder" in key for key in unconditional.state_dict())
    for model in (unconditional, tiny_latte(null_class=False)):
        with pytest.raises(ValueError, match="no null class"):
            _ = model.null_class_label
    assert tiny_latte().null_class_label == 10


def test_each_clip_has_its_own_class_and_timestep() -> None:
    model = tiny_latte()
    latents, _, labels = clips(batch=3)
    timesteps = torch.tensor([10.0, 500.0, 900.0])
    together = model(latents, timesteps, labels).sample
    for number in range(3):
        one = slice(number, number + 1)
        alone = model(latents[one], timesteps[number], labels[one]).sample
        torch.testing.assert_close(together[one], alone, atol=1e-5, rtol=0)
    other = model(latents, timesteps, torch.stack([labels[0], labels[1] + 1, labels[2]]) % 10).sample
    assert [torch.equal(a, b) for a, b in zip(other, together, strict=True)] == [True, False, True]


def joint(num_images: int = 2) -> tuple[Tensor, dict[str, Any]]:
    latents = clips(frames=3 + num_images)[0]
    _, timestep, labels = clips()
    images = torch.tensor([[1, 2], [3, 4]])[:, :num_images]
    return latents, {
        "timestep": timestep,
        "class_labels": labels,
        "num_images": num_images,
        "image_class_labels": images,
    }


def test_single_pictures_pass_by_the_temporal_blocks() -> None:
    model = tiny_latte()
    latents, options = joint()
    output = model(latents, **options).sample
    alone = model(latents[:, :3], options["timestep"], options["class_labels"]).sample
    torch.testing.assert_close(output[:, :3], alone, atol=1e-5, rtol=0)

    for frame in range(5):
        changed = latents.clone()
        changed[0, frame] += 1
        moved = (model(changed, **options).sample != output).flatten(2).any(2)
        expected = [frame < 3] * 3 + [frame == 3, frame == 4]
        assert moved[0].tolist() == expected
        assert not moved[1].any()
    labels = options | {"image_class_labels": torch.tensor([[1, 2], [9, 4]])}
    moved = (model(latents, **labels).sample != output).flatten(2).any(2)
    assert moved.tolist() == [[False] * 5, [False] * 3 + [True, False]]


def test_a_picture_is_the_same_at_every_place_and_with_its_clip_or_without() -> None:
    model = tiny_latte()
    latents, options = joint()
    output = model(latents, **options).sample
    swapped = torch.cat([latents[:, :3], latents[:, 3:].flip(1)], dim=1)
    flipped = model(swapped, **(options | {"image_class_labels": options["image_class_labels"].flip(1)})).sample
    torch.testing.assert_close(flipped[:, 3:].flip(1), output[:, 3:], atol=1e-5, rtol=0)
    fewer = model(latents[:, :4], **(options | {"num_images": 1, "image_class_labels": torch.tensor([[1], [3]])}))
    torch.testing.assert_close(fewer.sample, output[:, :4], atol=1e-5, rtol=0)


def test_labels_of_single_pictures_are_one_each() -> None:
    latents, options = joint()
    for labels in (None, torch.tensor([[1], [2]]), torch.tensor([1, 2])):
        with pytest.raises(ValueError, match="class labels"):
            tiny_latte()(latents, **(options | {"image_class_labels": labels}))
    with pytest.raises(ValueError, match="class labels"):
        tiny_latte()(latents[:, :3], **(options | {"num_images": 0}))
    with pytest.raises(ValueError, match="class labels"):
        tiny_latte(num_classes=None)(latents, **(options | {"class_labels": None}))
    assert tiny_latte(num_classes=None)(latents, options["timestep"], num_images=2).sample.shape[1] == 5


# ----------------------------------------------------------------------------------------------------------------------
# Long skips


@pytest.mark.parametrize("num_pairs", [0, 1, 2])
@pytest.mark.parametrize("num_units", [4, 5])
@torch.no_grad()
def test_forward_equals_a_stack_written_by_hand(num_units: int, num_pairs: int) -> None:
    """Frames and then time; the output of a pair waits for its mirror image."""
    model = tiny_latte(num_units, [None, LongSkipConfig(num_pairs=1), LongSkipConfig()][num_pairs])
    latents, timestep, labels = clips()
    seen: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _, __, out: seen.append(out))
        for module in (model.patch_embed, model.timestep_embedder)
    ]
    output = model(latents, timestep, labels).sample
    for handle in handles:
        handle.remove()
    hidden = seen[0] + model.position_embedding
    conditioning = seen[1] + model.class_embedder(labels)
    stack = []
    for unit in range(num_units):
        spatial, temporal = model.blocks[2 * unit], model.blocks[2 * unit + 1]
        skip = stack.pop() if unit >= num_units - num_pairs else None
        assert (spatial.long_skip is None) == (skip is None)
        assert temporal.long_skip is None
        hidden = spatial(hidden, conditioning.repeat_interleave(3, dim=0), skip)
        hidden = hidden.reshape(2, 3, 16, 16).transpose(1, 2).reshape(32, 3, 16)
        if unit == 0:
            hidden = hidden + model.frame_embedding
        hidden = temporal(hidden, conditioning.repeat_interleave(16, dim=0))
        hidden = hidden.reshape(2, 16, 3, 16).transpose(1, 2).reshape(6, 16, 16)
        if unit < num_pairs:
            stack.append(hidden)
    assert not stack
    patches = model.final_layer(hidden, conditioning.repeat_interleave(3, dim=0)).reshape(2, 3, 4, 4, 2, 2, 8)
    expected = torch.einsum("bfhwpqc->bfchpwq", patches).reshape(2, 3, 8, 8, 8)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


def test_more_pairs_than_there_are_units_are_refused() -> None:
    with pytest.raises(ValueError, match="num_pairs must be at most 2 for 4 units, got 3"):
        tiny_latte(4, LongSkipConfig(num_pairs=3))
    with pytest.raises(ValueError, match="no long skips"):
        enable_cache(tiny_latte(long_skip=None), "N2")


@pytest.mark.parametrize("num_images", [0, 2])
def test_gradient_checkpointing_gives_equal_gradients_even_of_two_forwards_at_once(num_images: int) -> None:
    model = tiny_latte()
    twin = copy.deepcopy(model)
    twin.enable_gradient_checkpointing()
    ran: list[int] = []
    latents, options = joint()
    options = options if num_images else {key: options[key] for key in ("timestep", "class_labels")}
    for each in (model, twin):
        each.blocks[1].register_forward_pre_hook(lambda *_: ran.append(1))
        losses = (
            [each(clip, **options).sample.square().mean() for clip in (latents, latents.flip(0))]
            if (num_images)
            else [each(clip[:, :3], **options).sample.square().mean() for clip in (latents, latents.flip(0))]
        )
        sum(losses).backward()
    assert len(ran) == 2 + 4
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name


@pytest.mark.parametrize("long_skip", [None, LongSkipConfig()], ids=["plain", "long_skips"])
def test_compiled_it_is_one_whole_graph(long_skip: LongSkipConfig | None) -> None:
    torch._dynamo.reset()
    graphs = []

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    model = tiny_latte(2, long_skip)
    latents, options = joint()
    expected = model(latents, **options).sample
    model.compile(fullgraph=True, backend=counting)
    for _ in range(2):
        assert torch.equal(model(latents, **options).sample, expected)
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("long_skip", [None, LongSkipConfig(num_pairs=1, norm="rms_norm", fusion="residual")])
def test_save_and_load_are_bit_equal(long_skip: LongSkipConfig | None, tmp_path: Path) -> None:
    model = tiny_latte(4, long_skip)
    model.save_pretrained(tmp_path)
    loaded = Latte.from_pretrained(tmp_path)
    assert loaded.config.long_skip == (None if long_skip is None else long_skip.to_dict())
    assert torch.equal(loaded.frame_embedding, model.frame_embedding)
    assert torch.equal(model(*clips()).sample, loaded(*clips()).sample)


def test_a_fresh_model_predicts_zero() -> None:
    model = Latte.from_preset("Latte-S/8", num_frames=2, long_skip=LongSkipConfig())
    assert model(torch.randn(1, 2, 4, 32, 32), torch.tensor(5)).sample.abs().max() == 0  # adaLN-Zero


# ----------------------------------------------------------------------------------------------------------------------
# The authors' model

AUTHORS_KEYS = (
    ("x_embedder", "patch_embed"),
    ("t_embedder.mlp.0", "timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "timestep_embedder.linear_2"),
    ("y_embedder.embedding_table", "class_embedder"),
    ("adaLN_modulation.1", "modulation"),
    ("final_layer.linear", "final_layer.proj"),
)


def our_key(key: str) -> str:
    if key.startswith("skip_"):  # skip_norms.{j}.*, skip_linears.{j}.linear.*, of pair 7 + j
        place, number, *_, last = key.split(".")
        return f"blocks.{2 * (7 + int(number))}.long_skip.{'norm' if place == 'skip_norms' else 'proj'}.{last}"
    for theirs, ours in AUTHORS_KEYS:
        key = key.replace(theirs, ours)
    return key


def authors_model(shared: Path, long_skip: LongSkipConfig | None = LongSkipConfig()) -> Latte:  # noqa: B008
    sizes = json.loads((shared / "parity" / "latte_skip.json").read_text())["config"]
    weights = load_file(shared / "parity" / "latte_skip.safetensors")
    model = Latte(
        sample_size=sizes["input_size"],
        num_frames=sizes["num_frames"],
        patch_size=sizes["patch_size"],
        in_channels=sizes["in_channels"],
        num_layers=sizes["depth"],
        num_attention_heads=sizes["num_heads"],
        attention_head_dim=sizes["hidden_size"] // sizes["num_heads"],
        num_classes=sizes["num_classes"],
        long_skip=long_skip,
    )
    tables = {"position_embedding": weights.pop("pos_embed"), "frame_embedding": weights.pop("temp_embed")}
    for name, table in tables.items():
        torch.testing.assert_close(model.get_buffer(name), table[0], atol=1e-5, rtol=0)
    state = {our_key(key): tensor for key, tensor in weights.items()}
    model.load_state_dict({key: value for key, value in state.items() if long_skip or "long_skip" not in key})
    return model.eval()


# start 900, reset below 50: a step at 50 is not yet the reset
def authors_cache(interval: int, k: int) -> CacheMethod:
    schedule = IntervalSchedule(interval=interval, start_timestep=900, stop_timestep=49.99)
    return CacheMethod(schedule=schedule, site=DeepFeatures(k))


@pytest.mark.parametrize(
    ("case", "cache"),
    [
        ("skip", None),
        ("vanilla", None),
        ("cached_N2", authors_cache(2, 1)),
        ("cached_N3", authors_cache(3, 1)),
        ("cached_N2_k2", authors_cache(2, 2)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@torch.no_grad()
def test_parity_with_the_authors_model(case: str, cache: CacheMethod | None, shared: Path) -> None:
    cases = load_file(shared / "parity" / "latte_skip_cases.safetensors")
    model = authors_model(shared, None if case == "vanilla" else LongSkipConfig())
    if cache is not None:
        enable_cache(model, cache)
    for latents, timestep, expected in zip(cases["x"], cases["t"], cases[case], strict=True):
        torch.testing.assert_close(model(latents, timestep, cases["y"]).sample, expected, atol=1e-4, rtol=0)
    if cache is not None:
        assert cache_summary(model).steps_reused >= 4


@torch.no_grad()
def test_joint_parity_with_the_authors_model(shared: Path) -> None:
    cases = load_file(shared / "parity" / "latte_skip_cases.safetensors")
    output = authors_model(shared)(
        cases["joint_x"],
        cases["joint_t"],
        cases["joint_y"],
        num_images=cases["joint_y_image"].shape[1],
        image_class_labels=cases["joint_y_image"],
    )
    torch.testing.assert_close(output.sample, cases["joint_out"], atol=1e-4, rtol=0)
