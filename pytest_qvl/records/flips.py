"""Answers of two runs, compared: exact tests of whether as many flips one way can be chance.

A flip that says nothing about the model, of a probe at the edge of its knowledge, goes either way with probability
one half. docs/ci.md says how often chance alone is taken for a change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qvl.checks.support.binomial import tail

if TYPE_CHECKING:
    from collections.abc import Mapping

LEVEL = 0.05  # of either test, two-sided: less than six flips, all one way, are never a change
RIGHT = ("right", "gained")


def sign_test(one_way: int, other_way: int) -> float:
    """Two-sided p-value of so many flips each way, exact: McNemar's test where the flips are of the same samples."""
    return min(1.0, 2 * tail(max(one_way, other_way), one_way + other_way, 0.5))


def flips(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[int, int, str]:
    """How many answers went from right to wrong and from wrong to right, and what was compared, in words.

    Paired where one run asked for half of the other's samples or more. On other samples each run's own flips against
    its own reference count: those that the new run lost and the old one gained speak for worse, the others for better.
    """
    same = old.keys() & new.keys()
    if 2 * len(same) >= min(len(old), len(new)):
        was, now = ({name: found[name] in RIGHT for name in same} for found in (old, new))
        lost = sum(was[name] and not now[name] for name in same)
        gained = sum(now[name] and not was[name] for name in same)
        return lost, gained, f"{lost} lost and {gained} gained of the same {len(same)} samples"
    before, after = ({kind: list(found.values()).count(kind) for kind in ("lost", "gained")} for found in (old, new))
    lost, gained = after["lost"] + before["gained"], after["gained"] + before["lost"]
    return lost, gained, f"flips: {lost} for worse and {gained} for better, each run against its own reference"


def right_answers(answers: Mapping[str, str]) -> str:
    """How many are right of how many, in words."""
    return f"{sum(state in RIGHT for state in answers.values())} of {len(answers)} right"
