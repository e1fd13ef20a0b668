"""How much of a difference chance alone explains, exactly; its use is derived in docs/limits.md#accuracy."""

from __future__ import annotations

import math

FALSE_ALARM = 1e-4


def tail(successes: int, trials: int, rate: float) -> float:
    """Probability of at least `successes` in `trials` independent trials, each with probability `rate`."""
    return math.fsum(
        math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(max(successes, 0), trials + 1)
    )


def largest_by_chance(trials: int, rate: float, level: float) -> int:
    """The largest number of successes that chance exceeds with probability `level` at most."""
    return next(k for k in range(trials + 1) if tail(k + 1, trials, rate) <= level)


def smallest_by_chance(trials: int, rate: float, level: float) -> int:
    """The smallest number of successes that chance stays below with probability `level` at most."""
    return trials - largest_by_chance(trials, 1 - rate, level)
