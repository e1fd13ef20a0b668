"""Products, norms, activations and residual sums: what one layer makes of its input, and the limit of its rounding."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pytest_qvl.oracles.bounds import FUNCTION, SINGLE, TAIL, Claim, summed, underflow, unit

if TYPE_CHECKING:
    import torch


ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu")


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    result: torch.dtype | None = None,
    products_rounded_to: float = 0.0,
) -> Claim:
    """``x W' + b``, rounded to `dtype` once after the sum and once after the bias, then cast to `result`.

    Limit: ``2 s |x||w|`` for the judged sum and the oracle's own (``s`` of :func:`~.bounds.summed`, norms over the
    terms), ``u |x W'| + u |x W' + b|`` for the two roundings, that of the cast, and, where a kernel rounds each
    product, ``TAIL / sqrt(3) * products_rounded_to * sqrt(sum of (x w)**2)`` for those.

    Args:
        x: ``(rows, in)`` as the kernel is given it, any float dtype.
        weight: ``(out, in)`` as the kernel multiplies it.
        bias: ``(out,)`` or None.
        dtype: In which it is computed.
        result: Of what is returned, where that is another.
        products_rounded_to: Unit roundoff to which a kernel rounds each product before it adds it up; 0 for none.
    """
    import torch

    x, weight = x.float(), weight.float()
    product = x @ weight.T
    lengths = torch.linalg.vector_norm(x, dim=-1)[:, None] * torch.linalg.vector_norm(weight, dim=-1)
    limit = 2 * summed(x.shape[-1]) * lengths + unit(dtype) * product.abs() + underflow(dtype)
    if products_rounded_to:
        limit = limit + TAIL / math.sqrt(3) * products_rounded_to * (x.square() @ weight.square().T).sqrt()
    if bias is not None:
        product = product + bias.float()
        limit = limit + unit(dtype) * product.abs()
    if result not in (None, dtype):
        limit = limit + unit(result) * product.abs() + underflow(result)
    return Claim(product, limit)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype, *, rounded_once: bool = False
) -> Claim:
    """``w * round(x / sqrt(mean(x**2) + eps))`` (Zhang and Sennrich 2019).

    Limit: relative, one rounding to the dtype of `x` before the gain and one to `dtype` after it, each an absolute one
    below the smallest normal number; the mean of n squares is off by ``min(n, TAIL sqrt(n / 3)) u`` in float32, its
    root by half of that, with the oracle's own as much again, and four operations more.

    Args:
        x: ``(..., width)``.
        weight: ``(width,)``, the gain.
        eps: Added to the mean.
        dtype: Of the result.
        rounded_once: Whether the gain is applied in float32, so that nothing is rounded before it.
    """
    import torch

    single = x.float()
    normed = single / (single.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    value = weight.float() * normed
    before = torch.float32 if rounded_once else x.dtype
    relative = unit(before) + unit(dtype) + summed(x.shape[-1]) + 8 * SINGLE
    return Claim(value, relative * value.abs() + underflow(dtype) + underflow(before) * weight.float().abs())


def rms_norm_behind(before: Claim, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> Claim:
    """:func:`rms_norm` of an input that is known to its own limit only, in interval arithmetic.

    The root lies between those of the smallest and the largest squares that the limits leave room for, and so does each
    element over it.
    """
    import torch

    at, sizes = rms_norm(before.value, weight, eps, dtype), before.value.abs()
    low, high = (sizes - before.limit).clamp_min(0.0), sizes + before.limit
    least, most = ((each.square().mean(dim=-1, keepdim=True) + eps).sqrt() for each in (low, high))
    own = sizes / (sizes.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    lowest = torch.where(sizes > before.limit, low / most, (sizes - before.limit) / least)
    spread = torch.maximum(high / least - own, own - lowest) * weight.float().abs()
    relative = 2 * unit(dtype) + summed(sizes.shape[-1]) + 8 * SINGLE
    return Claim(
        at.value, spread + relative * (at.value.abs() + spread) + underflow(dtype) * (1 + weight.float().abs())
    )


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, dtype: torch.dtype
) -> Claim:
    """``(x - mean) / sqrt(variance + eps) * w + b`` (Ba et al. 2016), in float32, rounded to `dtype` once.

    Limit: that rounding; of the mean, ``s sqrt(n) norm(x)`` of the sum over n, which is ``s norm(x) / sqrt(n)``;
    of the variance, that of n squares, relative, which a one-pass variance takes of ``mean(x**2)``.
    """
    import torch

    single, terms = x.float(), x.shape[-1]
    mean = single.mean(dim=-1, keepdim=True)
    centred = single - mean
    scale = (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    gained = centred * scale * weight.float()
    value = gained if bias is None else gained + bias.float()
    size = single.square().mean(dim=-1, keepdim=True).sqrt()
    cancelled = 1 + (size * scale).square()
    inner = 2 * (summed(terms) + 4 * SINGLE) * (size * scale * weight.float().abs() + cancelled * gained.abs())
    limit = inner + unit(dtype) * value.abs() + 2 * SINGLE * value.abs()
    return Claim(value, torch.add(limit, underflow(dtype)))


def activation(name: str, x: torch.Tensor, dtype: torch.dtype | None = None) -> Claim:
    """One of :data:`ACTIVATIONS` of x (``gelu`` is the exact one), rounded once to `dtype`, that of x if not given.

    All are x times a gate between 0 and 1 (Hendrycks and Gimpel 2016); a kernel's function is off by
    :data:`~.bounds.FUNCTION` last places of the gate's largest value, 1, twice with the oracle's own.

    Raises:
        KeyError: Another name.
    """
    import torch

    single, dtype = x.float(), dtype or x.dtype
    tanh_of = math.sqrt(2 / math.pi) * (single + 0.044715 * single**3)
    gates = {
        "silu": lambda: torch.sigmoid(single),
        "gelu": lambda: 0.5 * (1 + torch.erf(single / math.sqrt(2))),
        "gelu_pytorch_tanh": lambda: 0.5 * (1 + torch.tanh(tanh_of)),
        "quick_gelu": lambda: torch.sigmoid(1.702 * single),
    }
    value = single * gates[name]()
    # quick_gelu is written in that dtype: its argument, the gate and the product are rounded; a gate's slope is
    # 1 / 4 at most.
    steps = 2 if name == "quick_gelu" else 1
    slope = 2 * 1.702 / 4 * single.square() * unit(dtype) if steps > 1 else 0.0
    limit = steps * unit(dtype) * value.abs() + 2 * FUNCTION * SINGLE * single.abs() + slope
    return Claim(value, limit + underflow(dtype))


def gated(name: str, gate: torch.Tensor, up: torch.Tensor) -> Claim:
    """``act(gate) * up`` (Shazeer 2020), each factor and the product rounded to the dtype of `gate`."""
    acted = activation(name, gate)
    factor = up.float()
    value = acted.value * factor
    limit = acted.limit * factor.abs() + unit(gate.dtype) * (value.abs() + acted.limit * factor.abs())
    return Claim(value, limit + underflow(gate.dtype))


def added(one: torch.Tensor, other: torch.Tensor) -> Claim:
    """``one + other``, rounded once to the wider of their dtypes."""
    import torch

    value = one.float() + other.float()
    dtype = torch.promote_types(one.dtype, other.dtype)
    return Claim(value, (unit(dtype) + SINGLE) * value.abs() + underflow(dtype))
