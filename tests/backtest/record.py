"""Whether the record has of a pair what it should have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qvl.releases import DEFECTS, Defect

if TYPE_CHECKING:
    from tests.backtest.pairs import Environment, Pair

Record = dict[str, dict[str, str]]


def key(environment: Environment, scenario: str) -> str:
    """Under what the record keeps a scenario in an environment."""
    return f"{environment.base}[{', '.join(environment.over)}] {scenario}"


def defect_of(pair: Pair) -> Defect:
    """The shipped entry of a pair's bug."""
    (found,) = (each for each in DEFECTS if each.thread == pair.thread and each.package == pair.package)
    return found


def outcome(pair: Pair, release: str, record: Record) -> dict[str, str]:
    """What came of one release; empty where it was not run."""
    return record.get(key(pair.environment(release), pair.scenario), {})


def flagged(pair: Pair, record: Record) -> bool:
    """Whether the named check flagged the bad release, in words that point at the cause.

    The release that fixes it is a note of every failure, out of the shipped defects: a test holds that to the pairs.
    """
    bad = outcome(pair, pair.bad, record)
    return bad.get("verdict") == "flagged" and bad["check"] == pair.check and pair.words in bad["says"]


def green(pair: Pair, record: Record) -> bool:
    """Whether the good release was green."""
    return outcome(pair, pair.good, record).get("verdict") == "green"


def as_it_should_be(pair: Pair, record: Record) -> bool:
    """Both."""
    return flagged(pair, record) and green(pair, record)
