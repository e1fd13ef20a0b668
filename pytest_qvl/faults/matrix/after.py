"""What checks say of a fault that is in the reference too."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_qvl.faults.case import apply
from pytest_qvl.faults.common_mode import damaged_reference, reads_reference
from pytest_qvl.faults.matrix.panel import Verdict, all_checks, attempt, judge
from pytest_qvl.faults.matrix.results import After
from pytest_qvl.faults.sizes import sizes_of

if TYPE_CHECKING:
    from pytest_qvl.checks import Reference
    from pytest_qvl.faults.case import Case
    from pytest_qvl.faults.catalogue import Fault

SAID = 300


def judge_after(fault: Fault, case: Case, full: Case) -> After:
    """Record the reference with the fault in it, then let the checks that read it judge the damaged case.

    The named check first, and the others only if it does not name the cause.

    Args:
        fault: One of the catalogue.
        case: A healthy case.
        full: The same in full precision, see :func:`pytest_qvl.faults.common_mode.in_full_precision`.
    """
    found = After()
    readers = sorted(filter(reads_reference, all_checks(case.subject.device)), key=lambda name: name != fault.check)
    recorded = _recorded(fault, full)
    with apply(fault.name, case if isinstance(recorded, Verdict) else replace(case, reference=recorded)) as damaged:
        for check in readers:
            verdict = recorded if isinstance(recorded, Verdict) else judge(damaged, check)
            found.outcomes[check] = verdict.outcome
            if check == fault.check:
                found.named, found.said = names_cause(verdict, fault, case), shortened(verdict)
            if found.named:
                break
    return found


def _recorded(fault: Fault, full: Case) -> Reference | Verdict:
    """The reference, or what became of recording it: then no check gets one."""
    found: list[Reference] = []
    verdict = attempt(lambda: found.append(damaged_reference(fault.name, full)), full.subject)
    return found[0] if found else verdict


def names_cause(own: Verdict, fault: Fault, case: Case) -> bool:
    """Whether the named check noticed the fault, in words that point at its cause; `case` is the healthy one."""
    words = fault.words(sizes_of(case.model, case.subject.dtype))
    return own.noticed and all(one in own.message for one in words)


def shortened(own: Verdict) -> str:
    """The beginning of a message, on one line."""
    return " ".join(own.message.split())[:SAID]
