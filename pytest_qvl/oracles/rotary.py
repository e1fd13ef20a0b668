"""RoFormer's rotation (Su et al. 2021): by time, height and width in the backbone, by row and column in the tower."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pytest_qvl.oracles.bounds import SINGLE, Claim, unit

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


def axis_of_each_frequency(sections: Sequence[int], *, interleaved: bool) -> list[int]:
    """Which axis (0 time, 1 height, 2 width) each of the ``head_dim / 2`` frequencies turns by.

    Qwen2-VL and Qwen2.5-VL give each axis a run of frequencies, the highest to time (Wang et al. 2024, section 2.1);
    Qwen3-VL deals them out in turn, ``t h w t h w …``, until an axis has its
    share or none are left, and the rest to time.
    """
    if not interleaved:
        return [axis for axis, count in enumerate(sections) for _ in range(count)]
    axes = [0] * sum(sections)
    for axis in (1, 2):
        for place in range(axis, min(3 * sections[axis], len(axes)), 3):
            axes[place] = axis
    return axes


def frequencies(theta: float, count: int) -> torch.Tensor:
    """``theta ** (-i / count)`` for i from 0 to ``count - 1``, float64."""
    import torch

    return float(theta) ** (-torch.arange(count, dtype=torch.float64) / count)


def turned(angles: torch.Tensor, theta: float, dtype: torch.dtype) -> tuple[Claim, Claim]:
    """Cosines and sines of angles, each of ``head_dim / 2`` twice, rounded to `dtype` once.

    Limit: a frequency in float32 is off by ``(ln(theta) + 9) u``, relatively: from the rounded exponent, the power
    (four last places, 8 u: CUDA's ``powf`` is the coarsest) and its reciprocal; an angle by one rounding more, and its
    cosine by no more than the angle; then by four last places of the function itself.

    Args:
        angles: ``(..., head_dim / 2)`` float64.
        theta: Base of the frequencies.
        dtype: Of the cosines and sines.
    """
    import torch

    angles = torch.cat((angles, angles), dim=-1)
    inner = (math.log(theta) + 10) * SINGLE * angles.abs().float() + 4 * SINGLE
    cosines, sines = angles.cos().float(), angles.sin().float()
    return (
        Claim(cosines, inner + unit(dtype) * cosines.abs()),
        Claim(sines, inner + unit(dtype) * sines.abs()),
    )


def text_angles(positions: torch.Tensor, theta: float, axes: Sequence[int]) -> torch.Tensor:
    """Angles of every token, ``(rows, length, head_dim / 2)`` float64.

    Args:
        positions: ``(3, rows, length)``: time, height, width.
        theta: Base of the frequencies.
        axes: Of :func:`axis_of_each_frequency`.
    """
    import torch

    by_axis = positions.double()[torch.tensor(axes, device=positions.device)].movedim(0, -1)
    return by_axis * frequencies(theta, len(axes)).to(positions.device)


def vision_angles(positions: torch.Tensor, head_dim: int, theta: float = 10_000.0) -> torch.Tensor:
    """Angles of every patch, ``(patches, head_dim / 2)`` float64: half of them by its row, half by its column.

    Args:
        positions: ``(patches, 2)``: row, column.
        head_dim: Width of a head.
        theta: Base of the frequencies.
    """
    steps = frequencies(theta, head_dim // 4).to(positions.device)
    return (positions.double()[..., None] * steps).flatten(-2)


def rotated_in_part(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """:func:`rotated`, of as much of the width as there are angles for; the rest stays as it is (Qwen3.5)."""
    import torch

    width = cosines.shape[-1]
    return torch.cat((rotated(x[..., :width], cosines, sines), x[..., width:]), dim=-1)


def rotated(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """``x * cos + rotate_half(x) * sin`` in the dtype that the three have together, each operation rounded to it."""
    import torch

    first, second = x.chunk(2, dim=-1)
    made: torch.Tensor = x * cosines + torch.cat((-second, first), dim=-1) * sines
    return made
