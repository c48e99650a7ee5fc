"""Sound, sound with video, proteins, and all of it at once."""

import diffusers
import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor

from families.table import Segment, Step, TinyTransformer

TRANSFORMER_BLOCKS = (Segment(blocks=("transformer_blocks",)),)
SMALL = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 6}


def ltx2(step: Step) -> dict:
    mask = step.ones("mask", step.batch, 5, dtype=torch.long)
    return {
        "hidden_states": step.latents(step.batch, 32, 4),
        "audio_hidden_states": step.latents(step.batch, 6, 4, seed=8),
        "encoder_hidden_states": step.fixed("text", step.batch, 5, 12),
        "audio_encoder_hidden_states": step.fixed("audio text", step.batch, 5, 12),
        "timestep": step.timestep(),
        "audio_timestep": step.timestep(),
        "sigma": step.timestep(),
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "audio_num_frames": 6,
        "fps": 25.0,
    }


def minimax_h3(step: Step) -> dict:
    """Rows of text, audio and video in one sequence, with a noise level for each of the last two."""

    def rows(first: int, last: int) -> Tensor:
        return step.keep(f"rows {first}", lambda: torch.arange(first, last))

    def places() -> Tensor:
        counts = torch.arange(26)
        return torch.stack([counts, counts % 4, counts % 2], dim=1).float()

    tags = step.keep("tags", lambda: torch.tensor([1] * 4 + [2] * 6 + [0] * 16))
    times = torch.where(tags == 2, 1 - step.sigma**2, 1 - step.sigma)  # 1 is clean
    distinct, indices = torch.unique(times, sorted=True, return_inverse=True)  # one at the first step, then two
    return {
        "hidden_states": step.latents(step.batch, 16, 4),
        "audio_hidden_states": step.latents(step.batch, 6, 3, seed=8),
        "encoder_hidden_states": step.fixed("text", step.batch, 4, 12),
        "timestep": distinct,
        "timestep_indices": indices,
        "token_tags": tags,
        "position_ids": step.keep("places", places),
        "text_indices": rows(0, 4),
        "audio_indices": rows(4, 10),
        "video_indices": rows(10, 26),
    }


def minimax_music(step: Step) -> dict:
    return {
        "hidden_states": step.latents(step.batch, 4, 16),
        "timestep": step.timestep(1.0, rising=True),
        "encoder_hidden_states": step.fixed("condition", step.batch, 16, 12),
    }


def ace_step(step: Step) -> dict:
    return {
        "hidden_states": step.latents(step.batch, 16, 4),
        "timestep": torch.full((step.batch,), step.sigma),
        "timestep_r": torch.full((step.batch,), step.sigma),
        "encoder_hidden_states": step.fixed("text", step.batch, 5, 16),
        "context_latents": step.fixed("context", step.batch, 16, 8),
    }


def longcat_audio(step: Step) -> dict:
    return {
        "hidden_states": step.latents(step.batch, 16, 4),
        "encoder_hidden_states": step.fixed("text", step.batch, 5, 12),
        "encoder_attention_mask": step.keep("mask", lambda: torch.arange(5) < torch.tensor([[5], [3]])),
        "timestep": step.timestep(1.0, rising=True),
        "attention_mask": step.ones("audio mask", step.batch, 16, dtype=torch.bool),
        "latent_cond": step.fixed("condition", step.batch, 16, 4),
    }


def stable_audio(step: Step) -> dict:
    def rotary() -> tuple[Tensor, Tensor]:
        return get_1d_rotary_pos_embed(4, 17, use_real=True, repeat_interleave_real=False)

    return {
        "hidden_states": step.latents(step.batch, 4, 16),
        "timestep": torch.tensor([step.sigma]),
        "encoder_hidden_states": step.fixed("text", step.batch, 5, 12),
        "global_hidden_states": step.fixed("length", step.batch, 1, 10),
        "rotary_embedding": step.keep("rotary", rotary),
    }


def stable_audio3(step: Step) -> dict:
    return {
        "hidden_states": step.latents(step.batch, 4, 16),
        "timestep": step.timestep(1.0),
        "encoder_hidden_states": step.fixed("text", step.batch, 5, 12),
        "global_hidden_states": step.fixed("length", step.batch, 10),
        "encoder_attention_mask": step.keep("mask", lambda: torch.arange(5) < torch.tensor([[5], [3]])),
        "local_add_cond": step.fixed("local", step.batch, 5, 16),
    }


def cosmos3(step: Step) -> dict:
    """One sequence without a batch: text, one video, one sound."""

    def places() -> Tensor:
        return torch.arange(16).expand(3, 16)

    def rows(first: int, last: int) -> Tensor:
        return step.keep(f"rows {first}", lambda: torch.arange(first, last))

    return {
        "input_ids": step.keep("words", lambda: torch.arange(4) + 1),
        "text_indexes": rows(0, 4),
        "position_ids": step.keep("places", places),
        "und_len": 4,
        "sequence_length": 16,
        "vision_tokens": [step.latents(1, 4, 2, 4, 4)],
        "vision_token_shapes": [(2, 2, 2)],
        "vision_sequence_indexes": rows(4, 12),
        "vision_mse_loss_indexes": rows(4, 12),
        "vision_timesteps": torch.full((8,), 1000 * step.sigma),
        "vision_noisy_frame_indexes": step.keep("noisy", lambda: [torch.arange(2)]),
        "sound_tokens": [step.latents(3, 4, seed=8)],
        "sound_token_shapes": [(4, 1, 1)],
        "sound_sequence_indexes": rows(12, 16),
        "sound_mse_loss_indexes": rows(12, 16),
        "sound_timesteps": torch.full((4,), 1000 * step.sigma),
        "sound_noisy_frame_indexes": step.keep("noisy sound", lambda: [torch.arange(4)]),
    }


def proteina(step: Step) -> dict:
    """Two kinds of latents, two times that rise."""
    return {
        "bb_ca": step.latents(step.batch, 12, 3),
        "local_latents": step.latents(step.batch, 12, 4, seed=8),
        "bb_ca_time": step.timestep(1.0, rising=True),
        "local_latents_time": step.timestep(1.0, rising=True),
        "padding_mask": step.ones("mask", step.batch, 12, dtype=torch.bool),
        "token_type": step.keep("types", lambda: torch.zeros(step.batch, 12, dtype=torch.long)),
        "conditioning": {
            "is_in_context_conditioning": step.keep("context", lambda: torch.zeros(step.batch, 12)),
            "supports_local_latent": step.ones("local", step.batch, 12),
        },
    }


TABLE = {
    # video and audio tokens, of different number and width
    "LTX2VideoTransformer3DModel": TinyTransformer(
        model_class=diffusers.LTX2VideoTransformer3DModel,
        config=SMALL
        | {"out_channels": 4, "cross_attention_dim": 16, "audio_in_channels": 4, "audio_out_channels": 4}
        | {"audio_num_attention_heads": 2, "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8}
        | {"caption_channels": 12, "rope_double_precision": False},
        segments=(Segment(blocks=("transformer_blocks",), streams=("hidden_states", "audio_hidden_states")),),
        arguments=ltx2,
    ),
    "MiniMaxH3Transformer3DModel": TinyTransformer(
        model_class=diffusers.MiniMaxH3Transformer3DModel,
        config=SMALL
        | {"attention_head_dim": 16, "hidden_size": 24, "num_refiner_layers": 2, "ffn_dim": 32, "in_channels": 1}
        | {"audio_in_channels": 3, "text_dim": 12, "freq_dim": 8, "time_embed_hidden_dim": 24, "time_embed_dim": 16}
        | {"rope_freq_dim": 2},
        segments=TRANSFORMER_BLOCKS,
        arguments=minimax_h3,
        others=("token_refiner.refiner_blocks",),
    ),
    "MiniMaxMusic3Transformer1DModel": TinyTransformer(
        model_class=diffusers.MiniMaxMusic3Transformer1DModel,
        config=SMALL | {"condition_dim": 12, "ff_inner_dim": 32, "rotary_dim": 4, "fourier_embedding_dim": 8},
        segments=TRANSFORMER_BLOCKS,
        arguments=minimax_music,
    ),
    "AceStepTransformer1DModel": TinyTransformer(
        model_class=diffusers.AceStepTransformer1DModel,
        config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2}
        | {"num_key_value_heads": 1, "head_dim": 8, "in_channels": 12, "audio_acoustic_hidden_dim": 4}
        | {"patch_size": 2, "sliding_window": 4},
        segments=(Segment(blocks=("layers",)),),
        arguments=ace_step,
    ),
    # the model adds what entered the first block to what leaves the last
    "LongCatAudioDiTTransformer": TinyTransformer(
        model_class=diffusers.LongCatAudioDiTTransformer,
        config={"dit_dim": 16, "dit_depth": 6, "dit_heads": 2, "dit_text_dim": 12, "latent_dim": 4, "ff_mult": 2.0},
        segments=(Segment(blocks=("blocks",)),),
        arguments=longcat_audio,
    ),
    "StableAudioDiTModel": TinyTransformer(
        model_class=diffusers.StableAudioDiTModel,
        config=SMALL
        | {"out_channels": 4, "sample_size": 16, "num_key_value_attention_heads": 1, "cross_attention_dim": 8}
        | {"time_proj_dim": 8, "global_states_input_dim": 10, "cross_attention_input_dim": 12},
        segments=TRANSFORMER_BLOCKS,
        arguments=stable_audio,
    ),
    "StableAudio3DiTModel": TinyTransformer(
        model_class=diffusers.StableAudio3DiTModel,
        config={"io_channels": 4, "embed_dim": 16, "depth": 6, "num_heads": 2, "cond_token_dim": 12}
        | {"global_cond_dim": 10, "local_add_cond_dim": 5, "timestep_features_dim": 16, "ff_mult": 2}
        | {"num_memory_tokens": 3},
        segments=TRANSFORMER_BLOCKS,
        arguments=stable_audio3,
    ),
    # tokens first, no batch
    "Cosmos3OmniTransformer": TinyTransformer(
        model_class=diffusers.Cosmos3OmniTransformer,
        config={"head_dim": 12, "hidden_size": 24, "intermediate_size": 32, "latent_channel": 4, "dtype": "float32"}
        | {"latent_patch_size": 2, "num_attention_heads": 2, "num_hidden_layers": 6, "num_key_value_heads": 1}
        | {"patch_latent_dim": 16, "rope_axes_dim": [2, 2, 2], "vocab_size": 32, "sound_gen": True, "sound_dim": 3},
        segments=(Segment(blocks=("layers",), streams=("und_seq", "gen_seq")),),
        arguments=cosmos3,
        batch=1,
    ),
    # pairs of tokens are updated behind every second block, from its output
    "RFD4ProteinaTransformer": TinyTransformer(
        model_class=diffusers.RFD4ProteinaTransformer,
        config={"nlayers": 6, "token_dim": 16, "nheads": 2, "dim_cond": 16, "pair_repr_dim": 8, "latent_dim": 4}
        | {"token_type_emb_dim": 4, "cath_emb_dim": 4, "t_emb_dim": 8, "seq_sep_dim": 4, "xt_pair_dist_dim": 6}
        | {"tri_mult_c": 8, "num_sequence_classes": 5, "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type")}
        | {"feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents")}
        | {"feats_pair_repr": ("xt_bb_ca_pair_dists",), "feats_pair_cond": ("time_emb_bb_ca",)},
        segments=(Segment(blocks=("transformer_layers",), streams=("values",)),),
        arguments=proteina,
    ),
}
