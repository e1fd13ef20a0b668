"""Scaled dot-product attention (Vaswani et al. 2017) with grouped heads, and who may look at whom."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from pytest_qvl.oracles.bounds import FUNCTION, SINGLE, Claim, summed, underflow, unit

if TYPE_CHECKING:
    import torch

ELEMENTS = 2**22
"""Scores that are held at a time: 16 MiB of float32."""


def causal(attended: torch.Tensor, queries: int, window: int | None = None) -> torch.Tensor:
    """Which key each query may look at, ``(rows, queries, keys)`` bool: itself and those before it that are no padding.

    Args:
        attended: ``(rows, keys)`` bool; the last `queries` keys are the queries' own.
        queries: Number of queries.
        window: How many keys back a query sees, itself included; None for all.
    """
    import torch

    keys = attended.shape[1]
    own = torch.arange(keys - queries, keys, device=attended.device)[:, None]
    each = torch.arange(keys, device=attended.device)[None]
    seen = (each <= own) if window is None else (each <= own) & (own - each < window)
    return seen[None] & attended[:, None].bool()


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    scaling: float,
    *,
    eager: bool,
    inexact: float = 0.0,
    apart: float = 0.0,
) -> Claim:
    """``softmax(scaling * q k') v``, ``(heads, queries, width)``.

    Limit, as running error analysis: a score is off by ``d = 2 s |q||k|`` of its sum and the oracle's, four float32
    roundings, and in eager attention two to the dtype (product, scaling). Its exponential is off by ``exp(d) - 1`` and
    the function's own last places; the normalised weights so by ``sum of p e (v - o)``; then by the rounding of each
    weight to the dtype, ``u sum of p |v|``, the sum over keys, and the rounding of the result.

    Args:
        query: ``(heads, queries, width)``, rotated, in the dtype of the kernel.
        key: ``(key heads, keys, width)``; each serves ``heads / key heads`` neighbouring query heads.
        value: The same shape.
        allowed: ``(queries, keys)`` bool, or so for each head; None for all. A query that may look at nothing gets 0.
        scaling: Of the scores.
        eager: Whether scores are rounded to the dtype on their way (fused kernels keep them in float32).
        inexact: Relative error that queries and keys may have together, for kernels whose rotation is not known
            bitwise.
        apart: The same relative to ``|q||k|``, for those whose norms are not known bitwise either.
    """
    import torch

    heads = max(1, ELEMENTS // max(1, query.shape[1] * key.shape[1]))
    queries = max(1, ELEMENTS // max(1, key.shape[1]))
    shared = query.shape[0] // key.shape[0]
    u = unit(query.dtype)
    shape = *query.shape[:2], value.shape[2]
    whole = Claim(*(torch.empty(shape, dtype=torch.float32, device=query.device) for _ in range(2)))
    for start, first in product(range(0, query.shape[0], heads), range(0, query.shape[1], queries)):
        mine, some = slice(start, start + heads), slice(first, first + queries)
        ours = torch.arange(query.shape[0], device=key.device)[mine] // shared
        q, k, v = query[mine, some].float(), key[ours].float(), value[ours].float()
        scores = q @ k.mT * scaling
        size = torch.linalg.vector_norm(q, dim=-1)[..., None] * torch.linalg.vector_norm(k, dim=-1)[:, None]
        error = 2 * summed(q.shape[-1]) * abs(scaling) * size + ((2 * u if eager else 0) + 4 * SINGLE) * scores.abs()
        if apart:
            error = error + apart * abs(scaling) * size
        if inexact:
            error = error + inexact * abs(scaling) * (q.abs() @ k.abs().mT)
        if allowed is not None:
            looked = allowed[some] if allowed.dim() == 2 else allowed[mine, some]
            scores = scores.masked_fill(~looked, -torch.inf)
        weights = scores.softmax(dim=-1).nan_to_num(0.0)
        off = weights * (error.clamp_max(50).expm1() + 4 * FUNCTION * SINGLE)
        made, mass = weights @ v, weights @ v.abs()
        limit = off @ v.abs() + off.sum(dim=-1, keepdim=True) * made.abs()
        limit = limit + (u + 2 * summed(k.shape[1]) + 4 * SINGLE) * mass + u * made.abs()
        whole.value[mine, some], whole.limit[mine, some] = made, limit + 2 * underflow(query.dtype)
    return whole
