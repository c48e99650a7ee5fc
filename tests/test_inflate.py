"""Video models that start from a picture model: what is copied, what it predicts, what does not fit."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from diffusers import LatteTransformer3DModel
from tiny import randomize
from torch import Tensor

from skipdit.diffusion import Objective, sample_timesteps, training_loss
from skipdit.models.dit import DiT
from skipdit.models.inflate import inflate_latte, inflate_text_latte, init_latte_t2v, outermost_blocks
from skipdit.models.latte import Latte
from skipdit.models.long_skip import LongSkipConfig
from skipdit.models.surgery import add_long_skips
from skipdit.options import Fusion

FLOW = Objective(process="flow", prediction_type="sample", min_sigma=0.3)
SIZES = {"sample_size": 8, "patch_size": 2, "in_channels": 3, "num_attention_heads": 2, "attention_head_dim": 16}
COLORS = torch.tensor([[-1.0, -1, 1], [-1, 1, -1], [1, -1, -1], [1, 1, -1]])


def tiny_picture(num_layers: int = 6, **options: Any) -> DiT:
    options = {"out_channels": 3, "num_classes": 4, "long_skip": LongSkipConfig()} | options
    return randomize(DiT(num_layers=num_layers, **(SIZES | options)))


def fresh_video(num_units: int = 4, **options: Any) -> Latte:
    options = {"out_channels": 3, "num_classes": 3, "num_frames": 3, "long_skip": LongSkipConfig()} | options
    return Latte(num_layers=2 * num_units, **(SIZES | options))


def shortened(picture: DiT, num_units: int) -> DiT:
    """The picture model of its outermost blocks alone."""
    config = {name: value for name, value in picture.config.items() if not name.startswith("_")}
    short = DiT(**(config | {"num_layers": num_units})).eval()
    first = (num_units + 1) // 2
    kept = [*range(first), *range(len(picture.blocks) - num_units + first, len(picture.blocks))]
    weights = {name: value for name, value in picture.state_dict().items() if not name.startswith("blocks.")}
    for target, source in enumerate(kept):
        block = picture.blocks[source].state_dict()
        weights |= {f"blocks.{target}.{name}": value for name, value in block.items()}
    short.load_state_dict(weights)
    return short


@torch.no_grad()
def predict(picture: DiT, frames: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
    """What the picture model predicts for each frame (b f c h w) by itself; labels (b f)."""
    rows = timesteps.repeat_interleave(frames.shape[1])
    return picture(frames.flatten(0, 1), rows, labels.flatten()).sample.unflatten(0, frames.shape[:2])


# ----------------------------------------------------------------------------------------------------------------------
# Class-to-video

ROWS = {0: 2, 2: 1}  # what the video model's classes 0 and 2 are in the picture model; it does not know 1


@pytest.mark.parametrize("num_units", [3, 4, 6])
@pytest.mark.parametrize("fusion", ["replace", "residual"])
def test_at_the_start_each_frame_is_what_the_picture_model_predicts(num_units: int, fusion: Fusion) -> None:
    long_skip = LongSkipConfig(fusion=fusion)
    picture = tiny_picture(6, long_skip=long_skip)
    video = fresh_video(num_units, long_skip=long_skip)
    inflate_latte(video, picture, ROWS)
    short = shortened(picture, num_units)
    assert video.long_skip_links.sources == short.long_skip_links.sources
    assert len(video.long_skip_links.sources) == num_units // 2

    frames, timesteps = torch.randn(2, 5, 3, 8, 8), torch.tensor([120.0, 810.0])
    ours, theirs = torch.tensor([[0, 2, 3], [2, 3, 0]]), torch.tensor([[2, 1, 4], [1, 4, 2]])
    expected = predict(short, frames, timesteps, theirs[:, [0, 0, 0, 1, 2]])
    pictures = {"num_images": 2, "image_class_labels": ours[:, 1:]}
    with torch.no_grad():
        output = video.eval()(frames, timesteps, ours[:, 0], **pictures).sample
        torch.testing.assert_close(output[:, 3:], expected[:, 3:], rtol=0, atol=1e-5)
        # the frames of a clip are told apart by a fixed embedding, which the picture model has not
        assert (output[:, :3] - expected[:, :3]).abs().mean() < 0.5 * expected.abs().mean()
        video.frame_embedding.zero_()
        timeless = video(frames, timesteps, ours[:, 0], **pictures).sample
    torch.testing.assert_close(timeless, expected, rtol=0, atol=1e-5)
    assert (expected[0] - expected[1]).abs().mean() > 0.1
    swapped = predict(short, frames, timesteps, theirs[:, [1, 1, 1, 2, 0]])
    assert (swapped - expected).abs().amax() > 1e-2  # the classes matter


def test_a_class_that_the_picture_model_does_not_know_stays_fresh() -> None:
    picture, video = tiny_picture(), fresh_video()
    before = video.class_embedder.weight.detach().clone()
    temporal = copy.deepcopy(video.blocks[1::2].state_dict())
    inflate_latte(video, picture, ROWS)
    after, theirs = video.class_embedder.weight, picture.class_embedder.weight
    assert torch.equal(after[1], before[1])
    for ours, row in ((0, 2), (2, 1), (3, 4)):
        assert torch.equal(after[ours], theirs[row])
    assert all(torch.equal(value, temporal[name]) for name, value in video.blocks[1::2].state_dict().items())


def test_blocks_are_taken_from_both_ends() -> None:
    picture = tiny_picture(6)
    blocks = list(picture.blocks)
    assert outermost_blocks(picture, 4) == [blocks[index] for index in (0, 1, 4, 5)]
    assert outermost_blocks(picture, 3) == [blocks[index] for index in (0, 1, 5)]
    assert outermost_blocks(picture, 6) == blocks
    with pytest.raises(ValueError, match="the image model has 6 blocks, but the video model needs 7"):
        outermost_blocks(picture, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_attention_heads": 4}, "num_attention_heads must be 2 as in the image model, got 4"),
        ({"attention_head_dim": 8}, "attention_head_dim must be 16 as in the image model, got 8"),
        ({"patch_size": 4}, "patch_size must be 2 as in the image model, got 4"),
        ({"in_channels": 4}, "in_channels must be 3 as in the image model, got 4"),
        ({"out_channels": 6}, "out_channels must be 3 as in the image model, got 6"),
        ({"mlp_ratio": 2.0}, "mlp_ratio must be 4.0 as in the image model, got 2.0"),
        ({"downscale_freq_shift": 1.0}, "downscale_freq_shift must be 0.0 as in the image model, got 1.0"),
        ({"long_skip": None}, r"unit 2 has no long skip, but its block .* a long skip \(replace, FP32LayerNorm\)"),
        ({"long_skip": LongSkipConfig(fusion="residual")}, r"unit 2 has a long skip \(residual, FP32LayerNorm\)"),
        ({"long_skip": LongSkipConfig(norm="rms_norm")}, r"unit 2 has a long skip \(replace, FP32RMSNorm\)"),
        ({"long_skip": LongSkipConfig(num_pairs=1)}, "unit 2 has no long skip"),
        ({"num_units": 7}, "has 6 blocks, but the video model needs 7"),
    ],
)
def test_sizes_that_differ_are_named_and_nothing_is_copied(options: dict[str, Any], message: str) -> None:
    video = fresh_video(**options)
    before = copy.deepcopy(video.state_dict())
    with pytest.raises(ValueError, match=message):
        inflate_latte(video, tiny_picture(), ROWS)
    assert all(torch.equal(value, before[name]) for name, value in video.state_dict().items())


# ----------------------------------------------------------------------------------------------------------------------
# Text-to-video


def fresh_text_video(num_units: int = 4, long_skip: LongSkipConfig | None = LongSkipConfig(), **sizes: Any) -> Any:  # noqa: B008
    width = SIZES["num_attention_heads"] * SIZES["attention_head_dim"]
    options = {
        "num_layers": num_units,
        "out_channels": 6,
        "cross_attention_dim": width,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "caption_channels": 12,
        "video_length": 3,
    }
    model = LatteTransformer3DModel(**(SIZES | options | sizes))
    init_latte_t2v(model)
    if long_skip is not None:
        add_long_skips(model, long_skip)
    return model


@pytest.fixture(scope="module")
def learned() -> DiT:
    """A picture model that has learned four plain colours well enough to be told from a fresh one."""
    torch.manual_seed(0)
    picture = DiT(num_layers=6, out_channels=3, num_classes=4, long_skip=LongSkipConfig(), **SIZES).train()
    optimizer = torch.optim.AdamW(picture.parameters(), lr=3e-3)
    for _ in range(120):
        labels = torch.randint(4, (16,))
        known = torch.where(torch.rand(16) < 0.3, 4, labels)
        pixels = COLORS[labels][:, :, None, None].expand(-1, -1, 8, 8)
        loss = training_loss(
            lambda noisy, time, known=known: picture(noisy, time, known).sample,
            FLOW,
            pixels,
            torch.randn_like(pixels),
            sample_timesteps(FLOW, 16),
        ).loss.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return picture.eval()


def text_loss(model: Any, num_frames: int) -> float:
    """Of colours as clips that stand still, at a text that says nothing in particular."""
    generator = torch.Generator().manual_seed(5)
    pixels = COLORS.repeat(4, 1)[:, None, :, None, None].expand(-1, num_frames, -1, 8, 8)
    noise = torch.randn(pixels.shape, generator=generator)
    text = torch.randn(16, 5, 12, generator=generator)

    def predict_clip(noisy: Tensor, timesteps: Tensor) -> Tensor:
        output = model(noisy.transpose(1, 2), timestep=timesteps, encoder_hidden_states=text).sample
        return output.transpose(1, 2).chunk(2, dim=2)[0]

    with torch.no_grad():
        return training_loss(predict_clip, FLOW, pixels, noise, timesteps_of(16)).loss.mean().item()


def picture_loss(model: DiT) -> float:
    """Of the same colours and noise, by a picture model that is told the null class."""
    generator = torch.Generator().manual_seed(5)
    pixels = COLORS.repeat(4, 1)[:, :, None, None].expand(-1, -1, 8, 8)
    noise = torch.randn(16, 1, 3, 8, 8, generator=generator)[:, 0]
    labels = torch.full((16,), model.null_class_label)
    with torch.no_grad():
        return (
            training_loss(lambda noisy, time: model(noisy, time, labels).sample, FLOW, pixels, noise, timesteps_of(16))
            .loss.mean()
            .item()
        )


def timesteps_of(count: int) -> Tensor:
    return torch.linspace(20.0, 980.0, count)


def test_text_video_starts_near_the_picture_model(learned: DiT) -> None:
    video = fresh_text_video(6).eval()
    fresh = text_loss(video, 1)
    inflate_text_latte(video, learned)
    goal, started = picture_loss(learned), text_loss(video, 1)
    assert goal < 0.4 * fresh
    assert abs(started - goal) < 0.25 * abs(fresh - goal)
    # and so do clips of three frames, which differ by a fixed embedding of time
    assert text_loss(video, 3) < 0.6 * fresh


def test_the_weights_of_text_video_are_those_of_the_picture_model(learned: DiT) -> None:
    video = fresh_text_video(4)
    before = copy.deepcopy(video.state_dict())
    inflate_text_latte(video, learned)
    assert torch.equal(video.pos_embed.proj.weight, learned.patch_embed.proj.weight)
    assert torch.equal(video.pos_embed.proj.bias, learned.patch_embed.proj.bias)
    torch.testing.assert_close(video.pos_embed.pos_embed[0], learned.position_embedding, rtol=0, atol=1e-6)
    for target, source in enumerate((0, 1, 4, 5)):
        ours, theirs = video.transformer_blocks[target], learned.blocks[source]
        qkv = torch.cat([ours.attn1.to_q.weight, ours.attn1.to_k.weight, ours.attn1.to_v.weight])
        assert torch.equal(qkv, theirs.attn.qkv.weight)
        biases = torch.cat([ours.attn1.to_q.bias, ours.attn1.to_k.bias, ours.attn1.to_v.bias])
        assert torch.equal(biases, theirs.attn.qkv.bias)
        pairs = [(ours.attn1.to_out[0], theirs.attn.proj), (ours.ff.net[0].proj, theirs.mlp.fc1)]
        pairs += [(ours.ff.net[2], theirs.mlp.fc2)]
        if target >= 2:
            pairs += [(ours.long_skip.proj, theirs.long_skip.proj), (ours.long_skip.norm, theirs.long_skip.norm)]
        for linear, expected in pairs:
            assert torch.equal(linear.weight, expected.weight)
            assert torch.equal(linear.bias, expected.bias)
    assert all(getattr(block, "long_skip", None) is None for block in video.transformer_blocks[:2])
    untouched = ("temporal_transformer_blocks", "caption_projection")
    for name, value in video.state_dict().items():
        if name.startswith(untouched) or ".attn2." in name:
            assert torch.equal(value, before[name]), name


def test_the_start_is_exact_where_the_picture_model_does_not_hear_the_timestep(learned: DiT) -> None:
    """The tables hold the mean over timesteps of what blocks and output differ by; one frame: no embedding of time."""
    picture = copy.deepcopy(learned)
    with torch.no_grad():
        picture.timestep_embedder.linear_2.weight.zero_()
        picture.timestep_embedder.linear_2.bias.normal_()
    video = fresh_text_video(6).eval()
    inflate_text_latte(video, picture)
    frames, timesteps = torch.randn(2, 1, 3, 8, 8), torch.tensor([200.0, 800.0])
    with torch.no_grad():
        output = video(frames.transpose(1, 2), timestep=timesteps, encoder_hidden_states=torch.ones(2, 5, 12)).sample
        expected = picture(frames[:, 0], timesteps, torch.tensor([4, 4])).sample
    torch.testing.assert_close(output[:, :3, 0], expected, rtol=1e-4, atol=1e-4)
    assert not output[:, 3:].any()
    assert expected.std() > 0.1


def test_modulation_is_exact_where_a_block_adds_the_same_at_every_timestep(learned: DiT) -> None:
    """Blocks whose modulations differ by biases alone: then one shared function and a table of each block's own hold
    them all, and every block sees what it sees in the picture model."""
    picture = copy.deepcopy(learned)
    with torch.no_grad():
        for index, block in enumerate(picture.blocks):
            block.modulation.weight.copy_(picture.blocks[0].modulation.weight)
            block.modulation.bias.add_(0.05 * index)
    video = fresh_text_video(6).eval()
    inflate_text_latte(video, picture)
    captured: list[Tensor] = []
    for block in video.transformer_blocks:
        block.norm1.register_forward_hook(lambda module, args, output: captured.append(args[0]))
    frames, timesteps = torch.randn(2, 1, 3, 8, 8), torch.tensor([200.0, 800.0])
    theirs: list[Tensor] = []
    for block in picture.blocks:
        block.norm1.register_forward_hook(lambda module, args, output: theirs.append(args[0]))
    with torch.no_grad():
        video(frames.transpose(1, 2), timestep=timesteps, encoder_hidden_states=torch.zeros(2, 5, 12))
        picture(frames[:, 0], timesteps, torch.tensor([4, 4]))
    assert len(captured) == len(theirs) == 6
    for ours, expected in zip(captured, theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("video", "picture", "message"),
    [
        ({"num_attention_heads": 4}, {}, "num_attention_heads must be 2 as in the image model, got 4"),
        ({"patch_size": 4}, {}, "patch_size must be 2 as in the image model, got 4"),
        ({}, {"out_channels": 6}, "out_channels must be 6 as in the image model, got 3"),
        ({}, {"mlp_ratio": 2.0}, "mlp_ratio must be 2.0 as in the image model, got 4.0"),
        ({}, {"downscale_freq_shift": 1.0}, "downscale_freq_shift must be 1.0 as in the image model, got 0.0"),
        ({"num_units": 8}, {}, "has 6 blocks, but the video model needs 8"),
        ({"long_skip": None}, {}, "unit 2 has no long skip"),
        ({}, {"long_skip": None}, "unit 2 has a long skip .*, but its block in the image model has no long skip"),
    ],
)
def test_text_video_names_sizes_that_differ(video: dict[str, Any], picture: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inflate_text_latte(fresh_text_video(**video), tiny_picture(**picture))


def test_training_starts_from_the_bundled_pictures() -> None:
    """By the names of the classes; what `inflate="emoji"` in the recipes does, at the depth of two pairs."""
    from skipdit.data.clips import ClipConfig, open_clips
    from skipdit.recipes import RECIPES
    from skipdit.tasks.class_to_image import load_pictures_pipeline

    config = RECIPES["emoji-clips"]()
    items = open_clips(ClipConfig(num_frames=1, num_pictures=1))
    model: Any = dataclasses.replace(config.model, num_layers=4).build(items, config.objective).model
    pictures = load_pictures_pipeline("emoji")
    known = [name for name in items.label_names if name in pictures.labels]
    assert len(known) > 50
    for name in known:
        row = items.label_names.index(name)
        expected = pictures.transformer.class_embedder.weight[pictures.labels[name]]
        assert torch.equal(model.class_embedder.weight[row], expected), name
    with pytest.raises(FileNotFoundError, match="no pipeline at nowhere: give emoji or the folder"):
        dataclasses.replace(config.model, inflate="nowhere").build(items, config.objective)
