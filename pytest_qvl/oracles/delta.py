"""The gated delta rule (Yang et al. 2024, arXiv:2412.06464, equation 10), its short convolution and its gates.

A head keeps a matrix S from keys to values. Each token lets it fade, corrects what it holds for the token's key by a
share, and reads it with the token's query::

    S = exp(g) S;   S = S + beta k (v - S^T k)^T;   o = S^T q
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

# Tokens that flash-linear-attention's kernels, and Transformers' own code, take at a time.
KERNEL_CHUNK = 64
# In the root of a key's or query's length (FLA's l2norm, which Transformers follows).
LENGTH_EPS = 1e-6


class Tokens(NamedTuple):
    """What a head is given for each token.

    Attributes:
        query: ``(rows, length, heads, key width)``, of length one over the root of its width.
        key: Ditto, of length one.
        value: ``(rows, length, heads, value width)``.
        decay: ``(rows, length, heads)``, the logarithm of what is left of S.
        share: Ditto, from 0 to 1.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    decay: torch.Tensor
    share: torch.Tensor


def convolved(x: torch.Tensor, tail: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Each channel's sum of its last values, the newest times the last weight; ``(rows, length, channels)`` float64.

    Args:
        x: ``(rows, length, channels)``.
        tail: ``(rows, taps - 1, channels)``: what came before; zeros at the start.
        weight: ``(channels, taps)``.
    """
    import torch

    joined = torch.cat((tail, x), dim=1).double()
    length, taps = x.shape[1], weight.shape[-1]
    total = torch.zeros_like(joined[:, :length])
    for tap in range(taps):
        total = total + joined[:, tap : tap + length] * weight[:, tap].double()
    return total


def of_unit_length(x: torch.Tensor) -> torch.Tensor:
    """``x / sqrt(sum(x**2) + eps)`` along the last axis."""
    return x / (x.square().sum(dim=-1, keepdim=True) + LENGTH_EPS).sqrt()


def decays(a: torch.Tensor, rate: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``-exp(A_log) softplus(a + dt_bias)``; float64.

    Args:
        a: ``(rows, length, heads)``.
        rate: ``A_log``, ``(heads,)``.
        bias: ``dt_bias``, ditto.
    """
    import torch

    return -rate.double().exp() * torch.nn.functional.softplus(a.double() + bias.double())


def recurrent(tokens: Tokens, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is read, ``(rows, length, heads, value width)``, and S after the last token; token by token.

    Args:
        tokens: All in the dtype that is computed in.
        state: ``(rows, heads, key width, value width)``: S before the first.
    """
    import torch

    read = []
    for at in range(tokens.query.shape[1]):
        query, key, value = (each[:, at] for each in tokens[:3])
        state = state * tokens.decay[:, at].exp()[..., None, None]
        missing = value - (state * key[..., None]).sum(dim=-2)
        state = state + key[..., None] * (tokens.share[:, at, :, None] * missing)[..., None, :]
        read.append((state * query[..., None]).sum(dim=-2))
    return torch.stack(read, dim=1), state


def held(tokens: Tokens, before: torch.Tensor) -> torch.Tensor:
    """How much of the values a state holds after each token, ``(rows, length, heads, value width)``.

    Their sizes, each times its share and what is left of it, corrections left aside: in no direction does S have more
    than a few times that, and errors are shares of it.

    Args:
        tokens: All in the dtype that is computed in.
        before: The same before the first token, ``(rows, heads, value width)``.
    """
    import torch

    amounts = []
    for at in range(tokens.value.shape[1]):
        written = tokens.share[:, at, :, None] * tokens.value[:, at].abs()
        before = before * tokens.decay[:, at].exp()[..., None] + written
        amounts.append(before)
    return torch.stack(amounts, dim=1)


def chunked(tokens: Tokens, state: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, `size` tokens at a time by matrix products (section 3.3 of the paper); equal but for rounding."""
    import torch

    read = []
    for query, key, value, decay, share in _chunks(tokens, size):
        total, left, overlap = _products(key, decay, share)
        right = torch.cat((share[..., None] * value, (share * total.exp())[..., None] * key), dim=-1)
        solved = torch.linalg.solve_triangular(overlap, right, upper=False, unitriangular=True)
        written = solved[..., : value.shape[-1]] - solved[..., value.shape[-1] :] @ state
        out = (query * total.exp()[..., None]) @ state + ((query @ key.mT) * left) @ written
        read.append(out.transpose(1, 2))
        state = state * total[..., -1].exp()[..., None, None]
        state = state + (key * (total[..., -1:] - total).exp()[..., None]).mT @ written
    return torch.cat(read, dim=1), state


def chunked_by_kernel(
    tokens: Tokens, state: torch.Tensor, rounded: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as flash-linear-attention's kernels compute it: :data:`KERNEL_CHUNK` tokens at a time, rounding between.

    Read from release 0.6 (``fla.ops.gated_delta_rule``, ``fla.ops.common.chunk_delta_h`` and ``chunk_o``): everything
    that a matrix product takes is rounded to the dtype of the keys, and the state itself is kept in float32.

    Args:
        tokens: Queries and keys not rounded yet.
        state: S before the first.
        rounded: Rounds to the dtype of the keys, or moves numbers as that may.
    """
    import torch

    read = []
    tokens = tokens._replace(query=rounded(tokens.query), key=rounded(tokens.key))
    for query, key, value, decay, share in _chunks(tokens, KERNEL_CHUNK):
        total, left, overlap = _products(key, decay, share)
        one = torch.eye(overlap.shape[-1], dtype=overlap.dtype, device=overlap.device).expand_as(overlap)
        inverse = rounded(torch.linalg.solve_triangular(overlap, one, upper=False, unitriangular=True))
        values = rounded(inverse @ rounded(share[..., None] * value))
        keys = rounded(inverse @ rounded((share * total.exp())[..., None] * key))
        before = rounded(state)
        written = values - keys @ before
        out = (query @ before) * total.exp()[..., None] + rounded((query @ key.mT) * left) @ rounded(written)
        read.append(out.transpose(1, 2))
        state = state * total[..., -1].exp()[..., None, None]
        state = state + key.mT @ rounded(written * (total[..., -1:] - total).exp()[..., None])
    return torch.cat(read, dim=1), state


def _chunks(tokens: Tokens, size: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Query, key, value, decay and share of so many tokens at a time, heads in front of tokens."""
    for start in range(0, tokens.query.shape[1], size):
        yield tuple(each[:, start : start + size].transpose(1, 2) for each in tokens)


def _products(
    key: torch.Tensor, decay: torch.Tensor, share: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of logarithms, what is left at token i of what token j wrote, and how far j's key is in i's; lower ones."""
    total = decay.cumsum(dim=-1)
    left = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    return total, left, (share[..., None] * (key @ key.mT) * left).tril(-1)


def silu(x: torch.Tensor) -> torch.Tensor:
    """``x sigmoid(x)``."""
    import torch

    return x * torch.sigmoid(x)


def scaled(query: torch.Tensor) -> torch.Tensor:
    """A query of unit length, divided by the root of its width."""
    return query / math.sqrt(query.shape[-1])
