"""One defect of a batch: where it is, what is there, what should be, and what usually makes it so."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING

from pytest_qvl.checks.support.wording import some

if TYPE_CHECKING:
    from pytest_qvl.evidence import Evidence, Judge

# Every kind of finding, the most telling first: a batch that breaks at the top often looks wrong further down too.
KINDS = (
    "ids-dtype",
    "ids-without-embedding",
    "shapes-apart",
    "template-twice",
    "images-not-expanded",
    "images-expanded-twice",
    "image-truncated",
    "images-without-pixels",
    "pixels-without-images",
    "placeholders-apart",
    "pixels-missing",
    "grid-dtype",
    "grids-apart",
    "patch-size",
    "pixels-dtype",
    "pixels-not-finite",
    "pixels-not-rescaled",
    "pixels-not-normalised",
    "pixels-blank",
    "video-time",
    "row-of-another-sample",
    "images-missing",
    "images-repeated",
    "images-exchanged",
    "image-turned",
    "colours-exchanged",
    "patches-misplaced",
    "types-missing",
    "types-apart",
    "padding-attended",
    "text-not-attended",
    "packed-not-separated",
    "packed-apart",
    "positions-apart",
    "labels-shifted",
    "labels-changed",
    "whole-row-learned",
    "images-learned",
    "padding-learned",
    "prompt-learned",
    "nothing-learned",
    "answer-truncated",
    "end-not-learned",
    "another-answer",
)
DATA, UNJUDGED = "findings", "not judged"


@dataclass(frozen=True)
class BatchFinding:
    """One defect of a batch.

    Attributes:
        kind: One of :data:`KINDS`.
        row: Row of ``input_ids``; None where it concerns the batch as a whole.
        token: Place in the row, padding counted; None where it concerns the row as a whole.
        found: What is there.
        expected: What should be there.
        cause: What usually makes it so, and what to do about it.
    """

    kind: str
    row: int | None
    token: int | None
    found: str
    expected: str
    cause: str

    @property
    def place(self) -> str:
        """``row 2, token 17``, ``row 2``, or ``batch``."""
        if self.row is None:
            return "batch"
        return f"row {self.row}" if self.token is None else f"row {self.row}, token {self.token}"

    def __str__(self) -> str:
        return f"{self.kind}: {self.place}: {self.found}, expected {self.expected}: {self.cause}"


@dataclass
class Findings:
    """All that was found out about a batch.

    Attributes:
        found: The defects.
        judged: What was judged and how often, by name ("rows", "images").
        unjudged: What could not be judged, each with its reason.
        notes: What is worth knowing and is no defect.
    """

    found: list[BatchFinding] = field(default_factory=list)
    judged: Counter[str] = field(default_factory=Counter)
    unjudged: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, kind: str, row: int | None, token: int | None, *, found: str, expected: str, cause: str) -> None:
        """Record one defect."""
        assert kind in KINDS, kind
        self.found.append(BatchFinding(kind, row, token, found, expected, cause))

    def has(self, *kinds: str) -> bool:
        """Whether there is a finding of one of these kinds."""
        return any(finding.kind in kinds for finding in self.found)

    def hand_over(self, judge: Judge) -> None:
        """Enter all of it as figures, problems, notes and data of the evidence."""
        for what, count in self.judged.items():
            judge.report(what, count)
        ordered = sorted(self.found, key=lambda finding: KINDS.index(finding.kind))
        judge.data[DATA] = [json.dumps(asdict(finding), ensure_ascii=False) for finding in ordered]
        for kind, group in groupby(ordered, key=attrgetter("kind")):
            found = list(group)
            judge.equal(kind, len(found), 0, else_say=_sentence(found))
        judge.report("not judged", len(self.unjudged))
        judge.data[UNJUDGED] = [json.dumps(each, ensure_ascii=False) for each in self.unjudged.items()]
        for what, why in self.unjudged.items():
            judge.note(f"not judged: {what}, because {why}")
        for note in self.notes:
            judge.note(note)


def findings_of(evidence: Evidence) -> tuple[BatchFinding, ...]:
    """The findings that evidence of :func:`pytest_qvl.checks.batch` carries, the most telling first."""
    return tuple(BatchFinding(**json.loads(str(each))) for each in evidence.data.get(DATA, ()))


def unjudged_of(evidence: Evidence) -> dict[str, str]:
    """What evidence of :func:`pytest_qvl.checks.batch` could not judge, each with its reason."""
    return dict(json.loads(str(each)) for each in evidence.data.get(UNJUDGED, ()))


def _sentence(found: list[BatchFinding]) -> str:
    first, *others = found
    elsewhere = some(list(dict.fromkeys(finding.place for finding in others)), "; ")
    return f"{first}{f'; also {elsewhere}' if elsewhere else ''}"
