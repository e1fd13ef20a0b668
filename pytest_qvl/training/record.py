"""The record of a guarded run: what was judged how often, what was found, and what could not be judged."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest_qvl
from pytest_qvl.outputs import write_json

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from pytest_qvl.evidence import Evidence
    from pytest_qvl.training.findings import Finding

SCHEMA = 1


@dataclass
class Record:
    """What becomes the JSON file.

    Attributes:
        path: Where it goes; None for nowhere.
        settings: The guard's, as plain data.
        run: What is known of the training, as plain data.
        state: ``"running"``, ``"finished"`` or ``"stopped"``.
        kept: How often each check held.
        last: The evidence of each check when it last held.
        findings: One of each kind.
        repeated: How often each check found again what it had found before.
        not_judged: Reasons by check, with how often each was met.
        seconds: What the guard itself took.
    """

    path: Path | None
    settings: dict[str, Any]
    run: dict[str, Any]
    state: str = "running"
    kept: Counter[str] = field(default_factory=Counter)
    last: dict[str, tuple[int, Evidence]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    repeated: Counter[str] = field(default_factory=Counter)
    not_judged: dict[str, Counter[str]] = field(default_factory=dict)
    seconds: float = 0.0
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def keep(self, evidence: Evidence, step: int) -> None:
        """Note that a check held."""
        self.kept[evidence.check] += 1
        self.last[evidence.check] = (step, evidence)

    def add(self, findings: Iterable[Finding]) -> None:
        """Note what was found."""
        known = {finding.kind for finding in self.findings}
        for finding in findings:
            if finding.kind in known:
                self.repeated[finding.check] += 1
            else:
                known.add(finding.kind)
                self.findings.append(finding)

    def skip(self, check: str, reason: str) -> bool:
        """Note what was not judged; whether that is said for the first time."""
        reasons = self.not_judged.setdefault(check, Counter())
        reasons[reason] += 1
        return reasons[reason] == 1

    def write(self, step: int) -> str:
        """Write the file as it stands; the reason why it could not be written, empty if it was."""
        return "" if self.path is None else write_json(self.path, self.as_dict(step))

    def as_dict(self, step: int) -> dict[str, Any]:
        """Plain data."""
        return {
            "schema": SCHEMA,
            "pytest_qvl": pytest_qvl.__version__,
            "started": self.started,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "state": self.state,
            "steps": step,
            "guard_seconds": round(self.seconds, 3),
            "settings": self.settings,
            "run": self.run,
            "findings": [finding.as_dict() for finding in self.findings],
            "repeated": dict(self.repeated),
            "judged": {
                check: {"times": times, "last_step": self.last[check][0], "last": self.last[check][1].as_dict()}
                for check, times in self.kept.items()
            },
            "not_judged": {check: dict(reasons) for check, reasons in self.not_judged.items()},
        }
