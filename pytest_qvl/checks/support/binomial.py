"""How much of a difference chance alone explains, exactly; its use is derived in docs/limits.md#accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

FALSE_ALARM = 1e-4


def tail(successes: int, trials: int, rate: float) -> float:
    """Probability of at least `successes` in `trials` independent trials, each with probability `rate`.

    Exact for the `rate` that the float stands for, and rounded once, for any number of trials.
    """
    return next((chance for count, chance in _tails(trials, rate) if count == max(successes, 0)), 0.0)


def largest_by_chance(trials: int, rate: float, level: float) -> int:
    """The largest number of successes that chance exceeds with probability `level` at most."""
    return next((max(count - 1, 0) for count, chance in _tails(trials, rate) if chance <= level), trials)


def smallest_by_chance(trials: int, rate: float, level: float) -> int:
    """The smallest number of successes that chance stays below with probability `level` at most."""
    return trials - largest_by_chance(trials, 1 - rate, level)


def _tails(trials: int, rate: float) -> Iterator[tuple[int, float]]:
    """Each number of successes from 0 to `trials`, and the probability of as many or more.

    In whole numbers: binomial coefficients exceed a float from 1,030 trials on, and powers of a rate go below it.
    """
    successes, outcomes = rate.as_integer_ratio()
    failures, all_outcomes = outcomes - successes, outcomes**trials
    exactly, at_least = failures**trials, all_outcomes
    for count in range(trials + 1):
        yield count, at_least / all_outcomes
        at_least -= exactly
        if failures:
            # C(n, k + 1) = C(n, k) * (n - k) / (k + 1), so this is a whole number again.
            exactly = exactly * (trials - count) * successes // ((count + 1) * failures)
