"""Names and counts, short enough for a sentence."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SHOWN = 3


def some(names: Sequence[str], joint: str = ", ") -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return joint.join(names[:SHOWN]) + more


def listed(names: Sequence[str]) -> str:
    """All of a few names: ``"q_proj, k_proj and v_proj"``."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def tally(values: Iterable[object]) -> str:
    """Each value with how often it comes, the most frequent first: ``"vision (20), merger (2)"``."""
    return ", ".join(f"{value} ({count})" for value, count in Counter(values).most_common())
