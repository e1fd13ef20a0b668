"""The resolution of what is computed, and what a last place in every module does to it: no limit lies below either."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch
    from torch import nn


def step(dtype: torch.dtype, magnitude: float) -> float:
    """Distance from a number of this magnitude to the next larger one of `dtype`.

    Two numbers of at most this magnitude that are rounded to `dtype` after all else was equal differ by one step
    or not at all; below the smallest normal number the distance no longer shrinks.
    """
    import torch

    limits = torch.finfo(dtype)
    return math.ldexp(limits.eps, math.frexp(max(magnitude, limits.tiny))[1] - 1)


def coarsest(dtypes: Iterable[torch.dtype | None]) -> torch.dtype:
    """The dtype with the largest unit roundoff; None counts for nothing."""
    import torch

    return max((dtype for dtype in dtypes if dtype is not None), key=lambda dtype: torch.finfo(dtype).eps)


def rounded_sums(dtype: torch.dtype, terms: int) -> float:
    """How many times more than its result's own rounding a product of `terms` terms is rounded.

    Once in 16 bits, whose sums are kept in float32; ``sqrt(terms / 6)`` in float32, where each partial sum is rounded.
    Derived in docs/limits.md#last-place-noise.
    """
    import torch

    return max(1.0, math.sqrt(terms / 6)) if dtype == torch.float32 else 1.0


def a_last_place_off(values: torch.Tensor, eps: float = 0.0) -> torch.Tensor:
    """Each of the values times ``1 + eps`` or ``1 - eps``; signs from torch's random state.

    Args:
        values: Of any floating-point dtype.
        eps: How far, where that is more than a step of their own dtype.
    """
    import torch

    # In place: logits of a batch are as large as layers, and each of these steps would be a copy of them.
    signs = torch.randint(0, 2, values.shape, device=values.device, dtype=values.dtype).mul_(2).sub_(1)
    return values * signs.mul_(max(eps, torch.finfo(values.dtype).eps)).add_(1)


@contextmanager
def last_place_noise(modules: Iterable[nn.Module], eps: float = 0.0) -> Iterator[None]:
    """Move every output of `modules` by one unit in the last place inside the block.

    Up or down, by ``x * (1 ± eps)``, with that of the output's own dtype where it is more than `eps`; signs come from
    torch's random state. Monte Carlo arithmetic (Parker 1997): how rounding grows or dies out on its way through a
    model is measured, not assumed (docs/limits.md#last-place-noise).
    """
    import torch

    def after(_module: Any, _args: Any, output: Any) -> Any:
        floats = isinstance(output, torch.Tensor) and output.is_floating_point()
        return a_last_place_off(output, eps) if floats else output

    handles = [module.register_forward_hook(after) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
