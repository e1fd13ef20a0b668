"""Which scaling an attention's scores had, from what it returned; in words only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qvl.checks.support.layers.tally import error_over_limit

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from pytest_qvl.oracles.bounds import Claim

# Powers of two around the right scaling in which another is looked for, and by how much it has to fit better.
OCTAVES, BETTER = 3.0, 0.2
COARSE_STEPS, FINE_STEPS = 13, 16
# A scaling that is off by less is told in other words.
NEAR = 2e-3


def other_scaling(got: torch.Tensor, claim: Claim, attend: Callable[[float], Claim], scaling: float) -> str:
    """That a result is attention with another scaling, if one fits.

    Args:
        got: What attention returned.
        claim: What it had to.
        attend: Attention with a scaling.
        scaling: The right one.
    """

    def away(octave: float) -> float:
        return float((got.float() - attend(scaling * 2**octave).value).norm())

    step = 2 * OCTAVES / (COARSE_STEPS - 1)
    nearest = min((step * number - OCTAVES for number in range(COARSE_STEPS)), key=away)
    low, high = nearest - step, nearest + step
    for _ in range(FINE_STEPS):
        first, second = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, second) if away(first) < away(second) else (first, high)
    octave = (low + high) / 2
    times = 2**octave
    # Scores that are nearly alike hide a scaling behind the rounding of results, but not from their limits.
    fits = away(octave) <= BETTER * float((got.float() - claim.value).norm()) or (
        error_over_limit(got, attend(scaling * times)) <= 1
    )
    if abs(times - 1) < NEAR or not fits:
        return ""
    return f"scales its scores by {scaling * times:.4g}, {times:.3g} times 1 / sqrt(head width)"
