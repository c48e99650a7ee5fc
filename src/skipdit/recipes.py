"""Named training runs: a recipe returns the whole config, and its docstring holds command, machine and result."""

from collections.abc import Callable
from dataclasses import replace

from skipdit.data.config import ClipConfig, DataConfig, LatentConfig
from skipdit.models.pairing import LongSkipConfig
from skipdit.models.presets import LATTE_PRESETS, PRESETS, preset_sizes
from skipdit.options.objective import Objective
from skipdit.tasks.config import ModelConfig, TextToImageModelConfig, TextToVideoModelConfig, VideoModelConfig
from skipdit.training.config import TokenRoutingConfig, TrainConfig

# x-prediction in velocity space, with more weight on the noisy half: the bundled models in pixels learn well with it
PIXELS = Objective(
    process="flow",
    prediction_type="sample",
    timestep_sampling="logit_normal",
    logit_mean=0.8,
    logit_std=0.8,
    min_sigma=0.1,
)

# what the recipes in pixels have in common
IN_PIXELS = TrainConfig(
    objective=PIXELS,
    batch_size=32,
    learning_rate=8e-4,
    warmup_steps=200,
    weight_decay=0.01,
    ema_decay=0.999,
)

LATTE_XL = preset_sizes("Latte-XL/2", LATTE_PRESETS)

# what the recipes on latents have in common: AdamW at a constant rate, as in facebookresearch/DiT, train.py
ON_LATENTS = TrainConfig(
    objective=Objective(learned_variance=True),
    learning_rate=1e-4,
    rate_schedule="constant",
    warmup_steps=0,
    adam_betas=(0.9, 0.999),
    ema_decay=0.9999,
    log_every=100,
    checkpoint_every=5_000,
)


def emoji() -> TrainConfig:
    """The bundled class-to-image model: 64x64 emoji in pixels, 24 blocks of width 176, 64 tokens.

    `skipdit train emoji --out runs/emoji`

    Its tokens are routed past the deep units (`docs/training.md`); the bundled weights were trained without. With
    `--model.long-skip.num-pairs 2` the long skips cost least (`benchmarks/training_acceleration.md`):

    Two CPU cores with AVX512-BF16, torch 2.13.0: loss 0.19 at step 170, 0.09 at 1,500, 0.062 at 7,000 (single batches),
    about 55 pictures per second where nothing else ran. `benchmarks/emoji_training.jsonl` is the log; the first
    2,000 steps had max_steps 8000, and it was paused now and then, which its speed includes.
    """
    return replace(
        IN_PIXELS,
        data=DataConfig(source="emoji", image_size=64),
        model=ModelConfig(num_layers=24, num_attention_heads=4, attention_head_dim=44, patch_size=8),
        routing=TokenRoutingConfig(mode="bypass"),
        max_steps=7000,
        ema_decay=0.9995,
        release_dtype="bfloat16",
    )


def stability() -> TrainConfig:
    """The evidence pair's model with long skips: 32x32 emoji in 64 tokens, 12 blocks of width 128.

    `skipdit train stability --out runs/skip`; with a spectral cap
    `skipdit train stability --out runs/cap1 spectral:spectral-config --spectral.maximum 1`.
    """
    return replace(
        IN_PIXELS,
        data=DataConfig(source="emoji", image_size=32),
        model=ModelConfig(num_layers=12, num_attention_heads=4, attention_head_dim=32, patch_size=4),
        objective=replace(PIXELS, logit_mean=0.4, logit_std=1.0),
        max_steps=1600,
    )


def stability_plain() -> TrainConfig:
    """The evidence pair's model without long skips: all else as `stability`, 5.1% fewer parameters.

    `skipdit train stability-plain --out runs/plain`
    """
    config = stability()
    return replace(config, model=replace(config.model, long_skip=None))


def emoji_clips() -> TrainConfig:
    """The bundled class-to-video model: 8 frames of 64x64 pixels, 8 spatial/temporal pairs of width 176.

    It is inflated from the bundled class-to-image model, and trained on clips with 2 single pictures beside each.

    `skipdit train emoji-clips --out runs/emoji-clips`

    One CPU core (AVX2, float32) that other work shared, torch 2.13.0: mean loss 0.087 over the first 100 steps, 0.072
    over the last 100, 1 to 2 clips per second. `benchmarks/emoji_clips_training.jsonl` is the log; steps 1 to 250 had
    max_steps 900 and steps 251 to 300 had 520.
    """
    return replace(
        IN_PIXELS,
        data=ClipConfig(num_frames=8, frame_interval=2, num_pictures=2),
        model=VideoModelConfig(
            num_layers=16, num_attention_heads=4, attention_head_dim=44, patch_size=8, inflate="emoji"
        ),
        max_steps=700,
        batch_size=4,
        learning_rate=5e-4,
        warmup_steps=50,
        ema_decay=0.995,
        num_samples=6,
        release_dtype="bfloat16",
    )


def emoji_text() -> TrainConfig:
    """The bundled text-to-image model: a HunyuanDiT of 10 blocks of width 176 on 64x64 emoji and their names.

    `skipdit train emoji-text --out runs/emoji-text` (needs `pip install "skipdit[text]"`)

    Tokens are routed as in `emoji`, and the bundled weights were trained without:

    One CPU core (AVX2, float32) that other work shared, torch 2.13.0: mean loss 0.72 over the first 100 steps, 0.107
    around step 900, 0.090 over the last 100, 4 to 18 pictures per second. `benchmarks/emoji_text_training.jsonl` is the
    log; max_steps was 2500, 1100, 1900 and 1700 in turn, from steps 1, 401, 501 and 1301.
    """
    return replace(
        IN_PIXELS,
        data=DataConfig(source="emoji", image_size=64),
        model=TextToImageModelConfig(num_layers=10, num_attention_heads=4, attention_head_dim=44, patch_size=8),
        routing=TokenRoutingConfig(mode="bypass"),
        max_steps=1700,
        learning_rate=1e-3,
        release_dtype="bfloat16",
    )


def emoji_text_clips() -> TrainConfig:
    """The bundled text-to-video model: diffusers' Latte, 6 pairs of width 176 with long skips.

    It is inflated from the bundled class-to-image model, and trained on 8 frames of 64x64 pixels and their names.

    `skipdit train emoji-text-clips --out runs/emoji-text-clips` (needs `pip install "skipdit[text]"`)

    One CPU core (AVX2, float32) that other work shared, torch 2.13.0: mean loss 0.102 over the first 100 steps, 0.070
    over the last 100, about 2 clips per second. `benchmarks/emoji_text_clips_training.jsonl` is the log; up to step 250
    max_steps was 900.
    """
    return replace(
        IN_PIXELS,
        data=ClipConfig(num_frames=8, frame_interval=2),
        model=TextToVideoModelConfig(
            num_layers=6, num_attention_heads=4, attention_head_dim=44, patch_size=8, inflate="emoji"
        ),
        max_steps=750,
        batch_size=4,
        learning_rate=5e-4,
        warmup_steps=50,
        ema_decay=0.995,
        num_samples=6,
        release_dtype="bfloat16",
    )


def convert_plain() -> TrainConfig:
    """The model to convert: a plain DiT on 32x32 emoji in 16 tokens, 12 blocks of width 128.

    `skipdit train convert-plain --out runs/convert-plain`

    One core (AMD EPYC, AVX2, float32), torch 2.13.0: loss 0.157, seven minutes. This and the losses below are those of
    `benchmarks/conversion_cpu.md`, which `skipdit bench conversion` makes: the averaged weights on the same 512
    pictures of the training data.
    """
    return replace(
        IN_PIXELS,
        data=DataConfig(source="emoji", image_size=32),
        model=ModelConfig(num_layers=12, num_attention_heads=4, attention_head_dim=32, patch_size=8, long_skip=None),
        max_steps=1500,
    )


def convert_stage_one() -> TrainConfig:
    """Stage one of the conversion: new long skips with the paper's fusion, and only they are trained.

    `skipdit train convert-stage-one --out runs/convert-stage-one` (after `convert-plain`, or with `--start-from`)

    Loss 1.474 with fresh long skips, 0.188 after 500 steps. In the log, a rate of 1e-3 ends 0.008 higher.
    """
    plain = convert_plain()
    return replace(
        plain,
        model=ModelConfig(long_skip=LongSkipConfig(fusion="replace")),  # the sizes are those of the start
        start_from="runs/convert-plain/pipeline",
        stage="long-skips-only",
        max_steps=500,
        learning_rate=3e-3,
        warmup_steps=50,
    )


def convert_stage_two() -> TrainConfig:
    """Stage two of the conversion: the model of stage one, all of it trained, at half the rate of the plain model.

    `skipdit train convert-stage-two --out runs/convert-stage-two` (after `convert-stage-one`, or with `--start-from`)

    Loss 0.159: not quite the 0.157 of the plain model it comes from. Cached with N2: 33.6 dB from its full run.
    """
    return replace(
        convert_stage_one(),
        start_from="runs/convert-stage-one/pipeline",
        stage="full",
        max_steps=800,
        learning_rate=4e-4,
    )


def convert_control() -> TrainConfig:
    """The control of the conversion: the plain model, trained on without long skips.

    It runs at the rate of stage two, for as many steps as both stages together.

    `skipdit train convert-control --out runs/convert-control` (after `convert-plain`, or with `--start-from`)

    Loss 0.142. Cached with delta:N2: 38.0 dB from its full run.
    """
    first, second = convert_stage_one(), convert_stage_two()
    return replace(
        second,
        model=ModelConfig(long_skip=None),
        start_from=first.start_from,
        max_steps=first.max_steps + second.max_steps,
    )


def dit_on_latents(size: str, max_steps: int) -> TrainConfig:
    """A DiT of this size, patches of 2, with long skips, on latents of ImageNet at 256 pixels, as Skip-DiT trains it:
    AdamW at a constant 1e-4, batches of 256, mirrored halves (facebookresearch/DiT, train.py)."""
    return replace(
        ON_LATENTS,
        data=LatentConfig(source="latents/imagenet-256", num_channels=4, sample_size=32, num_classes=1000),
        model=ModelConfig(**preset_sizes(f"DiT-{size}/2", PRESETS)),
        max_steps=max_steps,
        batch_size=256,
        gradient_clip=0.0,
        flip=True,
        sample_every=25_000,
        sample_guidance_scale=4.0,
    )


def dit_s() -> TrainConfig:
    """DiT-S/2 with long skips on latents of ImageNet.

    The DiT paper's comparison of sizes ends at 400,000 steps.

    `skipdit latents --source imagenet/train --vae sd-vae-ft-ema --flip --out latents/imagenet-256`, then
    `skipdit train dit-s --out runs/dit-s`. Not yet run.
    """
    return dit_on_latents("S", 400_000)


def dit_b() -> TrainConfig:
    """DiT-B/2 with long skips on latents of ImageNet, as `dit-s`.

    `skipdit train dit-b --out runs/dit-b`. Not yet run.
    """
    return dit_on_latents("B", 400_000)


def dit_l() -> TrainConfig:
    """DiT-L/2 with long skips on latents of ImageNet, as `dit-s`.

    `skipdit train dit-l --out runs/dit-l`. Not yet run.
    """
    return dit_on_latents("L", 400_000)


def dit_xl() -> TrainConfig:
    """DiT-XL/2 with long skips on latents of ImageNet, as `dit-s`.

    At 1.6 million steps the authors' curve passes below what DiT-XL/2 reaches after 7 million.

    `skipdit train dit-xl --out runs/dit-xl`. Not yet run.
    """
    return dit_on_latents("XL", 1_600_000)


def latte_on_latents(name: str, num_classes: int | None, max_steps: int, *, flip: bool) -> TrainConfig:
    """A Latte-XL/2 with long skips on latents of 16 frames of 256 pixels and 8 single pictures beside each clip (Latte,
    arXiv 2401.03048; Skip-DiT's train_with_img.py): AdamW at a constant 1e-4, gradient norms clipped at 0.1."""
    return replace(
        ON_LATENTS,
        data=LatentConfig(
            source=f"latents/{name}",
            num_channels=4,
            sample_size=32,
            num_frames=16,
            num_classes=num_classes,
            num_pictures=8,
        ),
        model=VideoModelConfig(**LATTE_XL, conditional=num_classes is not None),
        max_steps=max_steps,
        gradient_clip=0.1,
        flip=flip,
        gradient_checkpointing=True,
        sample_every=10_000,
        num_samples=4,
        sample_guidance_scale=7.0,
    )


def latte_ffs() -> TrainConfig:
    """Latte-XL/2 with long skips on FaceForensics, without classes.

    `skipdit latents --source faceforensics --vae sd-vae-ft-mse --num-frames 16 --frame-interval 3 --num-crops 8 --flip
    --out latents/ffs`, then `skipdit train latte-ffs --out runs/latte-ffs`. Not yet run.
    """
    return latte_on_latents("ffs", None, 1_000_000, flip=True)


def latte_sky() -> TrainConfig:
    """Latte-XL/2 with long skips on SkyTimelapse, folders of frames, without classes and never mirrored.

    `skipdit latents --source sky_train --vae sd-vae-ft-mse --num-frames 16 --frame-interval 3 --num-crops 8
    --out latents/sky`, then `skipdit train latte-sky --out runs/latte-sky`. Not yet run.
    """
    return latte_on_latents("sky", None, 1_000_000, flip=False)


def latte_taichi() -> TrainConfig:
    """Latte-XL/2 with long skips on Taichi-HD, folders of frames, without classes.

    `skipdit latents --source taichi/train --vae sd-vae-ft-mse --num-frames 16 --frame-interval 3 --num-crops 8 --flip
    --out latents/taichi`, then `skipdit train latte-taichi --out runs/latte-taichi`. Not yet run.
    """
    return latte_on_latents("taichi", None, 1_000_000, flip=True)


def latte_ucf101() -> TrainConfig:
    """Latte-XL/2 with long skips on the 101 classes of UCF101.

    `skipdit latents --source UCF-101 --vae sd-vae-ft-mse --num-frames 16 --frame-interval 3 --num-crops 8 --flip
    --on-broken skip --out latents/ucf101` (a clip spans 46 frames, and some videos have fewer), then
    `skipdit train latte-ucf101 --out runs/latte-ucf101`. Not yet run.
    """
    return latte_on_latents("ucf101", 101, 100_000, flip=True)


def latte_text() -> TrainConfig:
    """The model to convert to text-to-video with long skips: a plain Latte of diffusers, 28 pairs of width 1152.

    Its data are latents of 16 frames of 512 pixels, and captions.

    `skipdit latents --source videos --vae svd-vae --image-size 512 --num-frames 16 --frame-interval 3 --text
    --out latents/text`, then `skipdit train latte-text --out runs/latte-text` (needs `pip install "skipdit[text]"`).
    Captions are encoded by all-MiniLM-L6-v2; the authors' Latte uses T5-XXL. Not yet run.
    """
    return replace(
        ON_LATENTS,
        data=LatentConfig(source="latents/text", num_channels=4, sample_size=64, num_frames=16),
        model=TextToVideoModelConfig(**LATTE_XL, long_skip=None),
        objective=Objective(),
        max_steps=300_000,
        num_accumulation_steps=2,
        warmup_steps=200,
        gradient_checkpointing=True,
        sample_every=10_000,
        num_samples=4,
        sample_guidance_scale=7.5,
    )


def latte_text_stage_one() -> TrainConfig:
    """Stage one of text-to-video with long skips: new long skips in the plain model, and only they are trained.

    `skipdit train latte-text-stage-one --out runs/latte-text-stage-one` (after `latte-text`, or with `--start-from`).
    Not yet run.
    """
    return replace(
        latte_text(),
        model=TextToVideoModelConfig(**LATTE_XL),
        start_from="runs/latte-text/pipeline",
        stage="long-skips-only",
        max_steps=30_000,
    )


def latte_text_stage_two() -> TrainConfig:
    """Stage two of text-to-video with long skips: the model of stage one, all of it trained.

    `skipdit train latte-text-stage-two --out runs/latte-text-stage-two` (after `latte-text-stage-one`, or with
    `--start-from`). Not yet run.
    """
    first = latte_text_stage_one()
    return replace(first, start_from="runs/latte-text-stage-one/pipeline", stage="full", max_steps=300_000)


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__.replace("_", "-"): recipe
    for recipe in (
        *(convert_control, convert_plain, convert_stage_one, convert_stage_two),
        *(dit_b, dit_l, dit_s, dit_xl),
        *(emoji, emoji_clips, emoji_text, emoji_text_clips),
        *(latte_ffs, latte_sky, latte_taichi, latte_text, latte_text_stage_one, latte_text_stage_two, latte_ucf101),
        *(stability, stability_plain),
    )
}
