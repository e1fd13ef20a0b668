"""What storing does to a weight: half a step of its dtype, NF4 as bitsandbytes packs it; and what that leaves of ΔW.

Let W be what was stored, D what storing ``W + ΔW`` changes (``Q(W + ΔW) - Q(W)``). Two numbers say what is left of ΔW:

- *kept* = ``<D, ΔW> / norm(ΔW)**2``: the share of ΔW along its own direction. 1 is all of it; 0 none.
- *error* = ``norm(D - ΔW) / norm(ΔW)``: what is added besides, or missing. Without any change it is 1. Rounding to
  the nearest number never makes it larger than 1 for a W that has that dtype already (W itself is one of the numbers);
  NF4 does, since it moves weights by a whole step or not at all.

``1 - error**2`` is how much nearer to the adapted weights the merged ones are than the base is; at 1/2 as much of
ΔW's energy is lost as is kept.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from pytest_qvl.oracles.nf4 import CODE_BOOK

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

BLOCK = 64
TAIL = 2.0  # standard errors that are printed: 95 %


@cache
def nf4_table() -> tuple[torch.Tensor, torch.Tensor]:
    """NF4's numbers and the borders half way between them, float32."""
    import torch

    book = torch.tensor(CODE_BOOK, dtype=torch.float32)
    return book, (book[1:] + book[:-1]) / 2


def through_nf4(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values as bitsandbytes packs and unpacks them: NF4, blocks of 64 along the rows, no double quantization; float32.

    Double quantization changes a block's scale by less than 0.5 %, and with it both Q(W) and Q(W + ΔW).

    Args:
        values: ``(rows, columns)`` float32, whole blocks from their first value on; the last block may be shorter.
        dtype: That they are unpacked to.
    """
    import torch

    book, borders = nf4_table()
    flat = values.flatten()
    spare = -flat.numel() % BLOCK
    blocks = (torch.nn.functional.pad(flat, (0, spare)) if spare else flat).view(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    codes = torch.bucketize((blocks / largest.masked_fill(largest == 0, 1.0)).flatten(), borders, out_int32=True)
    made = book.index_select(0, codes).view(-1, BLOCK).mul_(largest).flatten()
    unpacked: torch.Tensor = made[: flat.numel()].to(dtype).float().view_as(values)
    return unpacked


def half_step(values: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Half a step of the dtype that each value is stored in (float32): the largest error of rounding to it.

    The step belongs to the value's exponent, which is read from its bits.

    Args:
        values: In bfloat16, float16 or float32.
        out: Where to write it, of the same shape in float32.
    """
    import torch

    info = torch.finfo(values.dtype)
    bits = {2: torch.int16, 4: torch.int32}[values.itemsize]
    exponents = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}[values.dtype]
    masked = (values.view(bits) & exponents).view(values.dtype)
    powers = masked.float() if out is None else out.copy_(masked)
    return powers.clamp_(min=info.tiny).mul_(info.eps / 2)


class Loss(NamedTuple):
    """What storing leaves of ΔW.

    Attributes:
        kept: Share of ΔW along its own direction.
        kept_error: By how much sampling may have it wrong, :data:`TAIL` standard errors; 0 if all rows were looked at.
        error: What is added besides or missing, relative to ΔW.
        error_error: By how much sampling may have it wrong.
        changed: Share of the weights that have another value afterwards.
    """

    kept: float
    kept_error: float
    error: float
    error_error: float
    changed: float


class Sums(NamedTuple):
    """Sums over each part of a sample, one number a part, float64.

    Attributes:
        weight: Of squares of W.
        update: Of squares of ΔW.
        along: For each way to store, of ``D * ΔW``.
        apart: Of squares of ``D - ΔW``.
        changed: For each way to store, the share of the weights that have another value.
    """

    weight: torch.Tensor
    update: torch.Tensor
    along: tuple[torch.Tensor, ...]
    apart: tuple[torch.Tensor, ...]
    changed: tuple[torch.Tensor, ...]


def sums(weight: torch.Tensor, update: torch.Tensor, changes: Sequence[torch.Tensor]) -> Sums:
    """Sums over parts of W, ΔW and one D for each way to store: all ``(parts, values)`` float32."""
    return Sums(
        weight.square().sum(1).double(),
        update.square().sum(1).double(),
        tuple((change * update).sum(1).double() for change in changes),
        tuple((change - update).square().sum(1).double() for change in changes),
        tuple(change.count_nonzero(1).double() / change.shape[1] for change in changes),
    )


class Estimate(NamedTuple):
    """A ratio of two sums over a sample, and :data:`TAIL` standard errors of it."""

    value: float
    error: float


def ratio(tops: torch.Tensor, bottoms: torch.Tensor, whole: bool) -> Estimate:
    """``sum(tops) / sum(bottoms)`` over all parts of a weight, from a systematic sample of them.

    The sample's parts are in an order in which neighbours are alike, so the variance of their mean is estimated from
    differences of neighbours (Wolter, *Introduction to Variance Estimation*, section 8.2, estimator v2), here of what
    is left of the tops: ``z = t - R b``, ``var = sum((z[k] - z[k-1])**2) / (2 n (n - 1)) / mean(b)**2``.

    Args:
        tops: One for each part, divided by the probability with which it was drawn; ``(n,)`` float64.
        bottoms: Likewise.
        whole: Whether these are all parts there are.
    """
    count, bottom = len(tops), float(bottoms.sum())
    if not bottom:
        return Estimate(math.nan, math.nan)
    value = float(tops.sum()) / bottom
    if whole:
        return Estimate(value, 0.0)
    rest = tops - value * bottoms
    variance = float(rest.diff().square().sum()) / (2 * count * max(1, count - 1))
    return Estimate(value, TAIL * math.sqrt(variance) / (bottom / count))
