"""What became of each promise, from what its checks said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_qvl.evidence import NOT_JUDGED
from pytest_qvl.promises import PROMISES, promise_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_qvl.evidence import Evidence
    from pytest_qvl.promises import Promise
    from pytest_qvl.report.report_data import CheckReason, Finding

STATES = ("kept", "partly judged", "BROKEN", "error", "not judged", "skipped", "not run")
MEASURED_ONLY = "measured only: neither --qvl-vram-limit nor --qvl-card was given"


@dataclass(frozen=True)
class PromiseState:
    """One line of the summary.

    Attributes:
        number: Place among the promises, from 1.
        title: What is promised.
        state: One of :data:`STATES`. *Kept* only if every check of the promise gave a verdict.
        detail: The figure nearest to its limit (of a broken promise: beyond it) and how much was left out, or
            why there is none.
        judged: Checks that gave a verdict.
        missing: Checks that gave none, although the run would have to have one.
    """

    number: int
    title: str
    state: str
    detail: str
    judged: tuple[str, ...]
    missing: tuple[str, ...]


def promise_states(
    evidence: Sequence[Evidence],
    errors: Sequence[CheckReason],
    not_judged: Sequence[CheckReason],
    skipped: Sequence[CheckReason],
) -> list[PromiseState]:
    """The state of every promise.

    Args:
        evidence: Verdicts of checks.
        errors: Check and first line, where a test failed without a verdict.
        not_judged: Check and reason, where a check could not decide.
        skipped: Check and reason, where a test was skipped.
    """
    return [
        _state_of(
            promise,
            [e for e in evidence if promise_number(e.check) == promise.number],
            *(
                [reason for reason in reasons if promise_number(reason[0]) == promise.number]
                for reasons in (errors, not_judged, skipped)
            ),
        )
        for promise in PROMISES
    ]


def _state_of(
    promise: Promise,
    found: list[Evidence],
    errors: list[CheckReason],
    not_judged: list[CheckReason],
    skipped: list[CheckReason],
) -> PromiseState:
    """The state of one promise, from what was said of its own checks."""
    judged = tuple(check for check in promise.checks if any(e.check == check for e in found))
    missing = tuple(c for c in promise.checks if c not in judged and c not in promise.on_request)
    if bad := [e for e in found if not e.ok]:
        state, detail = "BROKEN", _broken(bad)
    elif errors:
        state, detail = "error", ""
    elif found and promise.needs_limit and not _held_to_limit(found):
        state, detail = "not judged", MEASURED_ONLY
    elif found and missing:
        count = f"({len(judged)} of {len(judged) + len(missing)} checks)"
        state, detail = "partly judged", f"{count} {_worst(found)}".rstrip()
    elif found:
        state, detail = "kept", _worst(found)
    elif not_judged:
        state, detail = "not judged", ""
    else:
        detail = "; ".join(dict.fromkeys(reason for _, reason in skipped))
        state = "skipped" if detail else "not run"
    return PromiseState(promise.number, promise.title, state, detail, judged, missing)


def _worst(found: Sequence[Evidence]) -> str:
    """The figure nearest to its limit, and how much a check left out."""
    figures = [f for e in found for f in e.figures if f.relation]
    worst = str(max(figures, key=lambda f: f.utilisation)) if figures else ""
    left_out = dict.fromkeys(f"{e.check}: {f}" for e in found for f in e.figures if f.name.endswith(NOT_JUDGED))
    return "; ".join(filter(None, [worst, *left_out]))


def _broken(bad: Sequence[Evidence]) -> str:
    """A figure beyond its limit; where what broke is no figure, what was said of it."""
    figures = [f for e in bad for f in e.figures if not f.holds]
    return str(figures[0]) if figures else bad[0].problems[0]


def _held_to_limit(found: Sequence[Evidence]) -> bool:
    """Whether a card or the limit of a phase ("prefill: fit") was held; what stays resident is always judged."""
    limited = any(f.relation and ": " in f.name for e in found if e.check == "peak_vram" for f in e.figures)
    return limited or any(e.check == "forecast_fits_card" for e in found)


def checks_to_explain(finding: Finding) -> tuple[str, ...]:
    """The checks of broken verdicts that ``pytest-qvl explain`` knows, in the suite's tests and in a user's own."""
    broken = dict.fromkeys(evidence.check for evidence in finding.evidence if not evidence.ok)
    return tuple(check for check in broken if promise_number(check) is not None)
