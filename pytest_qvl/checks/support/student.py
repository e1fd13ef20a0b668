"""How many estimated standard deviations an error may have that was measured with few degrees of freedom."""

from __future__ import annotations

import math
from functools import cache

NORMAL = 1000
"""Degrees of freedom that are told apart; with more of them the quantile falls by less than a hundredth."""


@cache
def deviations(normal: float, freedom: int) -> float:
    """What a normal error exceeds as rarely in units of its estimated deviation as ``normal`` in units of its true one.

    The quantile of Student's t (Biometrika 6, 1908), found by bisection: 5 true deviations are 5.1 estimated ones with
    300 degrees of freedom, 8.3 with 15 and 157 with 3.

    Args:
        normal: Deviations of the normal distribution, above 0.
        freedom: Degrees of freedom of the estimated variance, at least 1.
    """
    outside = math.erfc(normal / math.sqrt(2))
    freedom = min(freedom, NORMAL)
    low, high = normal, 2 * normal
    while _outside(high, freedom) > outside:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _outside(middle, freedom) > outside else (low, middle)
    return high


def _outside(t: float, freedom: int) -> float:
    """Probability that Student's t is further from 0 than ``t``: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan2(t, math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term, total = (cosine, cosine if freedom > 1 else 0.0) if odd else (1.0, 1.0)
    for number in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (number - 1) / number
        total += term
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(0.0, 1 - inside)
