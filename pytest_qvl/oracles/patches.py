"""Where each patch stands in the vision tower: its row and column, the order of windows, who attends to whom."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from pytest_qvl.oracles.bounds import SINGLE, Claim, underflow, unit

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

Grid = tuple[int, int, int]


class Patches(NamedTuple):
    """The patches of a batch, in the order in which the tower's blocks see them.

    Attributes:
        order: Number of each visual token (``merge**2`` patches) as the processor counts them.
        positions: Row and column of each patch in its image.
        relative: The same as shares of the way from the first row, or column, to the last.
        frames: Sizes of the groups within which full attention works: a frame of an image each.
        windows: Sizes of the groups within which window attention works; empty without windows.
    """

    order: list[int]
    positions: list[tuple[int, int]]
    relative: list[tuple[float, float]]
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
    made = Patches([], [], [], [], [])
    begun = 0
    for frames, height, width in grids:
        rows, columns = height // merge, width // merge
        tokens = [(row, column) for row in range(rows) for column in range(columns)]
        if window is not None:
            tokens.sort(key=lambda at: (at[0] // window, at[1] // window, at))
        for _ in range(frames):
            made.order.extend(begun + row * columns + column for row, column in tokens)
            places = [
                (merge * row + down, merge * column + right)
                for row, column in tokens
                for down in range(merge)
                for right in range(merge)
            ]
            made.positions.extend(places)
            made.relative.extend((row / max(height - 1, 1), column / max(width - 1, 1)) for row, column in places)
            made.frames.append(height * width)
            if window is not None:
                cut = groupby(tokens, key=lambda at: (at[0] // window, at[1] // window))
                made.windows.extend(merge**2 * len(list(inside)) for _place, inside in cut)
            begun += rows * columns
    return made


def with_learned_positions(
    embedded: torch.Tensor, table: torch.Tensor, relative: Sequence[tuple[float, float]]
) -> Claim:
    """Patches plus what a square table of learned positions has at their places, bilinearly (Qwen3-VL).

    Limit: a share in float32 is off by ``2 u`` of the side, at each of four corners; releases differ in whether the
    shares, the four products and their three sums are rounded to the dtype, at most five roundings of what they add up
    to; then the sum with the patch is. Below the smallest normal number these are absolute.

    Args:
        embedded: ``(patches, width)``.
        table: ``(side**2, width)``.
        relative: Place of each patch, 0 to 1 from the first row to the last, and from the first column.
    """
    import torch

    side = round(len(table) ** 0.5)
    places = torch.tensor(relative, dtype=torch.float64, device=table.device) * (side - 1)
    low = places.floor().long().clamp_max(side - 1)
    high, share = (low + 1).clamp_max(side - 1), (places - low).float()
    value = mass = corners = torch.zeros_like(embedded, dtype=torch.float32)
    for rows, down in ((low[:, 0], 1 - share[:, 0]), (high[:, 0], share[:, 0])):
        for columns, right in ((low[:, 1], 1 - share[:, 1]), (high[:, 1], share[:, 1])):
            corner = table[rows * side + columns].float()
            added = (down * right)[:, None] * corner
            value, mass, corners = value + added, mass + added.abs(), corners + corner.abs()
    total: torch.Tensor = embedded.float() + value
    u = unit(table.dtype)
    limit = (
        5 * u * mass + 4 * side * SINGLE * corners + unit(embedded.dtype) * (total.abs() + mass) + SINGLE * total.abs()
    )
    limit = limit + underflow(table.dtype) + underflow(embedded.dtype)
    return Claim(total, limit)
