"""What a LoRA adapter adds to its layer (Hu et al. 2021; rsLoRA: Kalajdzievski 2023; DoRA: Liu et al. 2024)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from pytest_qvl.oracles.bounds import SINGLE, Claim, subnormal, summed, unit

if TYPE_CHECKING:
    import torch


class Matrices(NamedTuple):
    """One adapter on one layer.

    Attributes:
        down: A, ``(rank, in)``.
        up: B, ``(out, rank)``.
        up_bias: Bias of B (``lora_bias``), or None.
        scaling: By which ``B(A(x))`` is multiplied.
        gain: DoRA's magnitude over the norm of ``W + scaling * B A``, ``(out,)`` float32, or None without DoRA.
        gain_error: How far, relatively, rounding may take the gain.
    """

    down: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor | None
    scaling: float
    gain: torch.Tensor | None = None
    gain_error: float = 0.0


def scaling_of(alpha: float, rank: int, *, rank_stabilised: bool) -> float:
    """``alpha / r``, or ``alpha / sqrt(r)`` (rsLoRA, which keeps the size of the update whatever the rank)."""
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def low_rank(x: torch.Tensor, adapter: Matrices) -> Claim:
    """``scaling * (B (A x) + b)``, computed in the dtype of A.

    Limit: A x is a sum of n products, rounded once; B of that one of r, rounded once, and once with the bias, and
    once by the scaling. Errors of the first go through ``|B|``, for each of its r numbers half the smallest of the
    dtype among them: in float16, whose numbers end at 6e-8, a small A is rounded by more than relative steps.

    Args:
        x: ``(rows, in)``, after dropout.
        adapter: Its matrices.
    """
    import torch

    u, least = unit(adapter.down.dtype), subnormal(adapter.down.dtype)
    x = x.to(adapter.down.dtype).float()
    down, up = adapter.down.float(), adapter.up.float()
    hidden = x @ down.T
    lengths = torch.linalg.vector_norm(x, dim=-1)[:, None] * torch.linalg.vector_norm(down, dim=-1)
    error = 2 * summed(x.shape[-1]) * lengths + u * hidden.abs() + least
    made = hidden @ up.T
    limit = error @ up.abs().T + 2 * summed(hidden.shape[-1]) * (hidden.abs() @ up.abs().T) + u * made.abs() + least
    if adapter.up_bias is not None:
        made = made + adapter.up_bias.float()
        limit = limit + u * made.abs() + least
    scale = abs(adapter.scaling)
    return Claim(made * adapter.scaling, (limit + 2 * u * made.abs()) * scale + least)


def adapted(
    x: torch.Tensor, base: torch.Tensor, bias: torch.Tensor | None, adapters: list[Matrices], dtype: torch.dtype
) -> Claim:
    """``base + sum of scaling * B (A x)``, and with DoRA ``gain * (W x + scaling * B (A x)) + b``.

    Limit: that of :func:`low_rank`; per adapter a rounding of what is added, and one of the sum, to `dtype` each.

    Args:
        x: ``(rows, in)``, what A is given.
        base: ``(rows, out)``, what the base layer returned for it, bias included.
        bias: The base layer's bias, or None.
        adapters: Those that are active, in any order.
        dtype: Of the result.
    """
    value = base.float()
    limit = SINGLE * value.abs()
    for adapter in adapters:
        addition, error = low_rank(x, adapter)
        if adapter.gain is not None:
            plain = base.float() if bias is None else base.float() - bias.float()
            u = unit(adapter.down.dtype)
            # The difference of two rounded numbers, each of which may have been rounded to the dtype of A.
            error = adapter.gain.abs() * error + (adapter.gain_error + 2 * u) * (
                (adapter.gain * plain).abs() + (adapter.gain * addition).abs()
            )
            error = error + (u + SINGLE) * ((adapter.gain - 1).abs() * (plain.abs() + base.float().abs()))
            addition = (adapter.gain - 1) * plain + adapter.gain * addition
        value = value + addition
        limit = limit + error + unit(dtype) * (addition.abs() + value.abs()) + 2 * subnormal(dtype)
    return Claim(value, limit)


def dora_gain(magnitude: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """``m / norm(W + scaling * B A)`` per output, float32."""
    made: torch.Tensor = magnitude.float() / norms
    return made
