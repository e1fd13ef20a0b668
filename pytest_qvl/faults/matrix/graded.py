"""Graded defects: the smallest dose of each that is caught, on a model of any size."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.case import damaged
from pytest_qvl.faults.matrix.panel import UNDECIDED, judge
from pytest_qvl.faults.requirements import unmet

if TYPE_CHECKING:
    from pytest_qvl.faults.case import Case
    from pytest_qvl.faults.requirements import Requirement

Dose = Callable[["Case"], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Graded:
    """One defect in growing doses, each held against the checks that could see it.

    Attributes:
        defect: What is wrong.
        checks: Which could see it: one of the part first, then one of the whole.
        doses: Label and damage of each, the smallest first. A damage may put another model in the case's place.
        requires: What the model must have for it, by name in :data:`pytest_qvl.faults.requirements.REQUIREMENTS`.
    """

    defect: str
    checks: tuple[str, ...]
    doses: tuple[tuple[str, Dose], ...]
    requires: tuple[Requirement, ...] = ()


@dataclass(frozen=True)
class Smallest:
    """The smallest dose of a defect that one check catches.

    Attributes:
        defect: What is wrong.
        check: Which check judged.
        caught: The dose; empty if it catches none of them.
        missed: Smaller doses, or all.
        undecided: Why the check cannot judge this model, or empty.
    """

    defect: str
    check: str
    caught: str
    missed: tuple[str, ...]
    undecided: str = ""


def smallest_doses(case: Case, graded: Graded) -> list[Smallest]:
    """Try the doses of a graded defect on each of its checks, the smallest first, up to the first that is caught."""
    found = []
    lacking = unmet(graded.requires, "", case)
    for check in graded.checks:
        missed: list[str] = []
        caught, undecided = "", lacking
        for label, dose in () if lacking else graded.doses:
            with damaged(case, dose) as made:
                verdict = judge(made, check)
            if verdict.outcome == UNDECIDED:
                undecided = verdict.message
                break
            if verdict.noticed:
                caught = label
                break
            missed.append(label)
        found.append(Smallest(graded.defect, check, caught, tuple(missed), undecided))
    return found
