"""Where each patch stands in the vision tower: its row and column, the order of windows, who attends to whom."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

Grid = tuple[int, int, int]


class Patches(NamedTuple):
    """The patches of a batch, in the order in which the tower's blocks see them.

    Attributes:
        order: Number of each visual token (``merge**2`` patches) as the processor counts them.
        positions: Row and column of each patch in its image.
        frames: Sizes of the groups within which full attention works: a frame of an image each.
        windows: Sizes of the groups within which window attention works; empty without windows.
    """

    order: list[int]
    positions: list[tuple[int, int]]
    frames: list[int]
    windows: list[int]


def patches(grids: Sequence[Grid], merge: int, window: int | None) -> Patches:
    """Lay out images as Qwen2.5-VL does (Bai et al. 2025, section 2.1.1); without windows, as the processor sends them.

    A frame is cut into windows of ``window`` by ``window`` visual tokens from the upper left, smaller ones at the right
    and lower edge; windows and the tokens inside them follow each other row by row.

    Args:
        grids: Per image frames, rows and columns in patches.
        merge: Patches per visual token along each side.
        window: Visual tokens per window along each side; None for a tower without windows.
    """
    made = Patches([], [], [], [])
    begun = 0
    for frames, height, width in grids:
        rows, columns = height // merge, width // merge
        tokens = [(row, column) for row in range(rows) for column in range(columns)]
        if window is not None:
            tokens.sort(key=lambda at: (at[0] // window, at[1] // window, at))
        for _ in range(frames):
            made.order.extend(begun + row * columns + column for row, column in tokens)
            made.positions.extend(
                (merge * row + down, merge * column + right)
                for row, column in tokens
                for down in range(merge)
                for right in range(merge)
            )
            made.frames.append(height * width)
            if window is not None:
                places = groupby(tokens, key=lambda at: (at[0] // window, at[1] // window))
                made.windows.extend(merge**2 * len(list(inside)) for _place, inside in places)
            begun += rows * columns
    return made
