"""What the guard found, and how it says so. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pytest_qvl.evidence import CheckFailed, Evidence, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

_NUMBER = re.compile(r"[0-9][0-9.,]*")
Weight = Literal["stop", "warn"]


@dataclass(frozen=True)
class Finding:
    """One broken promise of a training run.

    Attributes:
        evidence: What the check measured, with the problems.
        step: Optimizer steps that were complete when it was found.
        moment: Where in the run it was found, in words ("before the first step").
        rank: Number of the process that found it; 0 where there is one.
        weight: ``"warn"`` for what costs time and breaks nothing.
    """

    evidence: Evidence
    step: int
    moment: str
    rank: int = 0
    weight: Weight = "stop"

    @property
    def check(self) -> str:
        """Name of the check that found it."""
        return self.evidence.check

    @property
    def sentence(self) -> str:
        """What is wrong, first of all problems."""
        return printable(self.evidence.problems[0])

    @property
    def kind(self) -> tuple[str, str]:
        """What two findings of one cause share, which is the check and the sentence without its numbers."""
        return self.check, _NUMBER.sub("#", self.sentence)

    def __str__(self) -> str:
        return f"{self.check}, {self.moment}: {CheckFailed(replace(self.evidence, table=None))}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the record."""
        return {
            "check": self.check,
            "step": self.step,
            "moment": self.moment,
            "rank": self.rank,
            "weight": self.weight,
            "evidence": self.evidence.as_dict(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Finding:
        """Inverse of :meth:`as_dict`."""
        evidence = Evidence.from_dict(data["evidence"])
        return cls(evidence, data["step"], data["moment"], data["rank"], data["weight"])


class GuardError(RuntimeError):
    """The guard stopped a training run.

    Attributes:
        findings: Everything that was found, of all processes.
        record: The record's path; empty if none was written.
    """

    def __init__(self, findings: Sequence[Finding], record: str = "") -> None:
        self.findings, self.record = tuple(findings), record
        first, *more = self.findings
        where = f" in process {first.rank}" if first.rank else ""
        lines = [f"training stopped{where} by {first}", *(f"also {each}" for each in more)]
        if record:
            lines.append(f"record: {record}")
        lines.append('Guard(on_finding="warn") goes on with warnings.')
        super().__init__("\n".join(lines))

    @property
    def check(self) -> str:
        """Name of the check that found what comes first."""
        return self.findings[0].check

    @property
    def evidence(self) -> Evidence:
        """What that check measured."""
        return self.findings[0].evidence

    @property
    def step(self) -> int:
        """Optimizer steps that were complete."""
        return self.findings[0].step


class GuardWarning(UserWarning):
    """What the guard found where it does not stop, and what it cannot judge at all."""
