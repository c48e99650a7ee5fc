"""Draw labeled grids of pictures with Pillow."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import cast

from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN = 6
MOST_PER_PIXEL = 4  # characters measured per pixel of width: a text may have any number of characters without width


def to_frames(pixels: Float[Tensor, "*batch 3 height width"]) -> UInt8[Tensor, "*batch height width 3"]:
    """Convert pixels in [0, 1] to uint8, channels last."""
    return (pixels.detach().cpu().float().clamp(0, 1) * 255).round().byte().movedim(-3, -1).contiguous()


def to_pictures(pixels: Float[Tensor, "batch 3 height width"]) -> list[Image.Image]:
    """Convert pixels in [0, 1] to 8-bit pictures."""
    return [Image.fromarray(picture) for picture in to_frames(pixels).numpy()]


def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Return Pillow's default font at a size in pixels."""
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size=size))


def labelled_grid(
    pictures: Sequence[Image.Image], captions: Sequence[str], *, num_columns: int | None = None, scale: int = 2
) -> Image.Image:
    """Draw pictures in rows, by default in a square, each enlarged `scale` times with its caption below.

    `ValueError` if there are no pictures, or not one caption per picture.
    """
    if not pictures or len(captions) != len(pictures):
        raise ValueError(
            f"a grid needs at least one picture and one caption per picture, got {len(pictures)} and {len(captions)}"
        )
    num_columns = num_columns or max(1, round(len(pictures) ** 0.5))
    num_rows = -(-len(pictures) // num_columns)
    width, height = (side * scale for side in pictures[0].size)
    font = load_font(max(9, min(14, width // 11)))
    line = sum(font.getmetrics()) + 2
    cell_width, cell_height = width + MARGIN, height + line + MARGIN
    grid = Image.new("RGB", (num_columns * cell_width + MARGIN, num_rows * cell_height + MARGIN), "white")
    draw = ImageDraw.Draw(grid)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = MARGIN + index % num_columns * cell_width
        top = MARGIN + index // num_columns * cell_height
        grid.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
        draw.text((left + width / 2, top + height), _fit(caption, font, width), fill="black", font=font, anchor="ma")
    return grid


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return the text in one line, cut with an ellipsis if it is wider than the cell or has too many characters."""
    text = " ".join(text.split())
    if len(text) <= MOST_PER_PIXEL * width and font.getlength(text) <= width:
        return text
    lengths = range(1, min(len(text), MOST_PER_PIXEL * width) + 1)
    return text[: bisect_right(lengths, width, key=lambda length: font.getlength(text[:length] + "…"))] + "…"
