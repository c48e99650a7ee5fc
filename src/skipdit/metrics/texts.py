"""Measures how well pictures fit their texts: the cosine similarity of two encoders (CLIPScore, Hessel et al. 2021,
arXiv 2104.08718). Any pair of encoders will do; `load_clip` reads a CLIP model from a folder of the user's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from skipdit.files.untrusted import printable_path
from skipdit.interfaces import ModelOutput

# mean and standard deviation of the inputs of OpenAI's CLIP: preprocessor_config.json of openai/clip-vit-base-patch32
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class TextPictureEncoders:
    """Encoders of pictures and texts into one space."""

    name: str
    """name in reports"""
    pictures: Callable[[Tensor], Tensor]
    """takes pictures (n 3 h w) in [0, 1]; returns embeddings (n d)"""
    texts: Callable[[Sequence[str]], Tensor]
    """returns embeddings (n d)"""


def clip_scores(
    pictures: Float[Tensor, "items 3 height width"], texts: Sequence[str], encoders: TextPictureEncoders
) -> Float[Tensor, " items"]:
    """Return 100 times the cosine similarity of each picture and its text, at least 0, as torchmetrics and most papers
    do. Raises `ValueError` unless there is one text per picture."""
    if len(pictures) != len(texts):
        raise ValueError(f"each picture needs one text, got {len(texts)} texts for {len(pictures)} pictures")
    with torch.inference_mode():
        similarity = cosine_similarity(encoders.pictures(pictures).float(), encoders.texts(texts).float(), dim=-1)
    return (100 * similarity).clamp(min=0).cpu()


def load_clip(folder: Path, device: torch.device | None = None) -> TextPictureEncoders:
    """Return the encoders of a `CLIPModel` of transformers and its tokenizer. Raises `ValueError` if the folder holds
    none."""
    if not folder.is_dir():
        raise ValueError(f"{printable_path(folder)} is not a folder of a CLIP model")
    try:
        import transformers
    except ImportError as error:
        raise ValueError('the metric clip needs transformers: pip install ".[text]"') from error
    try:
        model: Any = transformers.CLIPModel.from_pretrained(folder, local_files_only=True)
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and its file readers raise errors of many classes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{printable_path(folder)} holds no CLIP model with its tokenizer: {reason}") from error
    model.to(device or "cpu").eval().requires_grad_(False)
    size = model.config.vision_config.image_size
    limit = model.config.text_config.max_position_embeddings

    def embedding(output: ModelOutput) -> Tensor:
        return output if isinstance(output, Tensor) else output.pooler_output

    def encode_pictures(pictures: Tensor) -> Tensor:
        shorter = min(pictures.shape[-2:])
        height, width = (round(side * size / shorter) for side in pictures.shape[-2:])
        resized = interpolate(pictures, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (height - size) // 2, (width - size) // 2
        cropped = resized[..., top : top + size, left : left + size].to(model.device)
        mean, std = (torch.tensor(values, device=model.device).view(3, 1, 1) for values in (MEAN, STD))
        return embedding(model.get_image_features(pixel_values=(cropped - mean) / std))

    def encode_texts(texts: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return embedding(model.get_text_features(**tokens.to(model.device)))

    return TextPictureEncoders(folder.resolve().name, encode_pictures, encode_texts)
