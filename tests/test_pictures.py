"""Grids."""

import numpy as np
import pytest
from PIL import Image

from skipdit.pictures import labelled_grid


def test_every_picture_stands_in_its_cell_unchanged() -> None:
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]
    pictures = [Image.new("RGB", (16, 12), color) for color in colors]
    grid = np.asarray(
        labelled_grid(pictures, ["a", "b", "c", "d", "a very long caption indeed"], num_columns=3, scale=2)
    )
    for color in colors:
        rows, columns = np.where((grid == color).all(axis=2))
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1, len(rows)) == (24, 32, 24 * 32)
    first = np.argwhere((grid == colors[3]).all(axis=2))[0]
    assert first[0] > 24  # the fourth begins the second row
    assert (grid.sum(axis=2) < 300).any()  # captions are drawn


@pytest.mark.timeout(30)
@pytest.mark.parametrize("letter", ["x", "\u0301"])  # the second has no width
def test_a_long_caption_is_cut_at_once(letter: str) -> None:
    picture = Image.new("RGB", (64, 64))
    cut, longer = (labelled_grid([picture], [letter * length]) for length in (1000, 2**16))
    assert cut.tobytes() == longer.tobytes()
    assert labelled_grid([picture], ["one\ntwo"]).tobytes() == labelled_grid([picture], ["one two"]).tobytes()


def test_a_grid_needs_a_caption_a_picture() -> None:
    with pytest.raises(ValueError, match="got 1 and 0"):
        labelled_grid([Image.new("RGB", (8, 8))], [])
