"""Operations one behind another of which only the last result is seen: what that has to be, to within all roundings.

Limits that are added up, each times the sizes of the weights behind it, take every error for as large as it may be and
all for of one sign. Over thousands of terms twice that is more than the result itself, and nothing is judged. Errors
are independent (:mod:`pytest_qvl.oracles.bounds`), so what they make of the result is found by trying.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pytest_qvl.oracles.bounds import TAIL, Claim

if TYPE_CHECKING:
    import torch

    Operation = Callable[[torch.Tensor], Claim]

# With as many degrees of freedom, Student's t is beyond TAIL once in 2e12.
RUNS = 64


def chained(first: Claim, behind: Sequence[Operation]) -> Claim:
    """What operations give one behind another.

    Limit: that of the last operation; of those before it, :data:`~.bounds.TAIL` standard deviations of what comes out,
    over :data:`RUNS` runs in which each result is off by up to its own limit, every element evenly and by itself.

    Args:
        first: What goes into the first of `behind`.
        behind: One or more, each on the result of the one before, in float32.
    """
    import torch

    *inner, last = behind
    value = first.value
    for operation in inner:
        value = operation(value).value
    exact = last(value)
    limit, squares = exact.limit, torch.zeros_like(exact.value)
    generator = torch.Generator(squares.device).manual_seed(0)
    for _ in range(RUNS):
        moved = _moved(first, generator)
        for operation in inner:
            moved = _moved(operation(moved), generator)
        found = last(moved)
        squares += (found.value - exact.value).square_()
        limit = torch.maximum(limit, found.limit)
    return Claim(exact.value, TAIL * (squares / RUNS).sqrt_() + limit)


def _moved(claim: Claim, generator: torch.Generator) -> torch.Tensor:
    """A result within its limit, by chance."""
    import torch

    value = claim.value
    moves = torch.rand(value.shape, generator=generator, device=value.device, dtype=value.dtype)
    return value + claim.limit * (2 * moves - 1)
