"""What a check measured, with the limit it was held to.

Standard library only: the plugin, the reports and the record read evidence without importing torch.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

from pytest_qvl.releases import known_defects

Relation = Literal["<=", ">=", "==", ""]
Value = float | int | str | bool
NOT_JUDGED = " not judged"
"""How the name of a figure ends that counts what a verdict leaves out ("layers not judged"): the summary shows it."""


@dataclass(frozen=True)
class Figure:
    """One number a check measured.

    Args:
        name: What was measured, in words ("NF4 language linears").
        value: The measured value.
        limit: What it is held to; ``None`` for a figure that is only reported.
        relation: How value and limit relate when all is well; ``""`` for a figure that is only reported.
        unit: Unit of value and limit ("nat", "GiB", "s"); empty for counts and ratios.
    """

    name: str
    value: Value
    limit: Value | None = None
    relation: Relation = ""
    unit: str = ""

    @property
    def holds(self) -> bool:
        """Whether the value is inside its limit; a NaN never is, a figure without a limit always is."""
        if not self.relation:
            return True
        if isinstance(self.value, float) and math.isnan(self.value):
            return False
        if self.relation == "==":
            return self.value == self.limit
        assert isinstance(self.value, int | float)
        assert isinstance(self.limit, int | float)
        return self.value <= self.limit if self.relation == "<=" else self.value >= self.limit

    @property
    def utilisation(self) -> float:
        """How near the value is to its limit, for choosing the worst figure: 1 is at the limit, above is broken."""
        if not self.relation:
            return -1.0
        if not self.holds:
            return math.inf
        if self.relation == "==" or not isinstance(self.value, int | float):
            return 0.0
        assert isinstance(self.limit, int | float)
        small, large = (self.value, self.limit) if self.relation == "<=" else (self.limit, self.value)
        return abs(small) / abs(large) if large else 0.0

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        shown = f"{self.name} {show(self.value)}{unit}"
        return f"{shown} ({self.relation} {show(self.limit)}{unit})" if self.relation else shown


# https://github.com/actions/runner, ``src/Runner.Common/ActionCommand.cs``: blanks before it are skipped.
_WORKFLOW_COMMAND = re.compile(r"^[^\S\n]*(?=::)|##(?=\[)", re.MULTILINE)


def printable(text: str) -> str:
    """Text from strangers (replies, file names) as it can go to a terminal: control characters as Python escapes them.

    So are marks that change the direction of text; line breaks and tabs stay. What GitHub would obey as a workflow
    command, a line that begins with ``::`` or ``##[`` anywhere, gets a backslash: pytest prints whole messages in CI.
    """
    text = _WORKFLOW_COMMAND.sub(r"\g<0>\\", text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else ascii(c)[1:-1] for c in text)


def show(value: Any) -> str:
    """A number short enough for one line: four significant digits, integers with thousands separators."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


@dataclass(frozen=True)
class Table:
    """A short table that explains a verdict."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Value | None, ...], ...]

    def __str__(self) -> str:
        cells = [self.columns, *(tuple("" if c is None else show(c) for c in row) for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


@dataclass(frozen=True)
class Evidence:
    """The result of one check.

    Args:
        check: Name of the check function ("quantization_census").
        promise: What the check proves, in a few words, as shown in the summary.
        figures: What was measured.
        problems: One sentence per defect: what broke, where, by how much, against what limit.
        notes: What a reader should know although it is no defect.
        table: Optional details.
        data: Numbers that reports compute with, by name, as lists of plain values; nobody reads them in the record.
    """

    check: str
    promise: str
    figures: tuple[Figure, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    table: Table | None = None
    data: Mapping[str, list[Value]] = field(default_factory=dict, hash=False)

    @property
    def ok(self) -> bool:
        """Whether the promise is kept."""
        return not self.problems

    @property
    def state(self) -> str:
        """``"kept"`` or ``"BROKEN"``, as every report says it."""
        return "kept" if self.ok else "BROKEN"

    @property
    def worst(self) -> Figure | None:
        """The figure nearest to (or beyond) its limit."""
        return max(self.figures, key=lambda f: f.utilisation, default=None)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the JSON record, without :attr:`data`."""
        return {
            "check": self.check,
            "promise": self.promise,
            "figures": [vars(f) for f in self.figures],
            "problems": list(self.problems),
            "notes": list(self.notes),
            "table": None if self.table is None else {"columns": self.table.columns, "rows": self.table.rows},
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Evidence:
        """Inverse of :meth:`as_dict`; takes ``data`` as well, where there is any."""
        table = data.get("table")
        return cls(
            check=data["check"],
            promise=data["promise"],
            figures=tuple(Figure(**f) for f in data["figures"]),
            problems=tuple(data["problems"]),
            notes=tuple(data["notes"]),
            table=table and Table(tuple(table["columns"]), tuple(tuple(r) for r in table["rows"])),
            data=data.get("data", {}),
        )


class CheckFailed(AssertionError):
    """A promise is broken; the first line says what, where, by how much and against what limit.

    Attributes:
        evidence: Everything the check measured.
    """

    def __init__(self, evidence: Evidence) -> None:
        first, *more = evidence.problems
        lines = [first, *(f"also: {p}" for p in more[:7])]
        if len(more) > 7:
            lines.append(f"also: {len(more) - 7} more problems of the same kind")
        lines += [f"note: {n}" for n in evidence.notes]
        if evidence.table:
            lines += ["", str(evidence.table)]
        super().__init__(printable("\n".join(lines)))
        self.evidence = evidence


class ModelCrashed(CheckFailed):
    """The model, its processor or the optimizer raised an exception under a check.

    ``__cause__`` is that exception; everyone who runs the same inputs meets it, with or without this package.
    """


class InputError(ValueError):
    """What a check was given is not what it takes, told in one sentence; nothing is said about the model."""


class InputTypeError(InputError, TypeError):
    """An argument is missing, or of another type than the check takes."""


class CannotJudge(RuntimeError):
    """The inputs cannot decide the question (a uniform picture for a routing check, no CUDA for a VRAM check).

    Not a pass: the suite reports it as a skip with this reason and counts it.
    """


@dataclass
class Judge:
    """Collects figures and problems while a check runs; :meth:`verdict` returns the evidence or raises.

    Args:
        check: Name of the check function.
        promise: What the check proves, in a few words.
    """

    check: str
    promise: str
    figures: list[Figure] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, list[Value]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        begun = _judges.get()
        if begun is not None:
            begun.append(self)

    def report(self, name: str, value: Value, unit: str = "") -> None:
        """Record a figure that has no limit."""
        self.figures.append(Figure(name, value, unit=unit))

    def equal(self, name: str, value: Value, expected: Value, *, else_say: str, unit: str = "") -> bool:
        """Hold ``value == expected``; otherwise ``else_say`` becomes a problem."""
        return self._hold(Figure(name, value, expected, "==", unit), else_say)

    def at_most(self, name: str, value: float, limit: float, *, else_say: str, unit: str = "") -> bool:
        """Hold ``value <= limit`` (a NaN fails)."""
        return self._hold(Figure(name, value, limit, "<=", unit), else_say)

    def at_least(self, name: str, value: float, limit: float, *, else_say: str, unit: str = "") -> bool:
        """Hold ``value >= limit`` (a NaN fails)."""
        return self._hold(Figure(name, value, limit, ">=", unit), else_say)

    def every(self, name: str, of: Sized, off: Sized, *, else_say: Callable[[str], str]) -> bool:
        """Hold that none of many is off: the figure counts those that are right, and has to be all of them.

        Args:
            name: What those that are right are, in words.
            of: All that are counted.
            off: Those of them that are wrong.
            else_say: Makes the problem from how many are off ("3 of 56"); called only where some are.
        """
        story = else_say(f"{len(off)} of {len(of)}") if len(off) else ""
        return self.equal(name, len(of) - len(off), len(of), else_say=story)

    def problem(self, sentence: str) -> None:
        """Record a defect that no single figure expresses."""
        self.problems.append(sentence)

    def note(self, sentence: str) -> None:
        """Record something worth knowing that is no defect."""
        self.notes.append(sentence)

    def _hold(self, figure: Figure, else_say: str) -> bool:
        self.figures.append(figure)
        if not figure.holds:
            self.problems.append(f"{else_say} [{figure}]")
        return figure.holds

    def verdict(self, columns: Sequence[str] = (), rows: Iterable[Sequence[Value | None]] = ()) -> Evidence:
        """The evidence, or :class:`CheckFailed` if there is any problem.

        Raises:
            CheckFailed: With the evidence attached.
        """
        evidence = self.close(columns, rows)
        if evidence.problems:
            raise CheckFailed(evidence)
        return evidence

    def close(self, columns: Sequence[str] = (), rows: Iterable[Sequence[Value | None]] = ()) -> Evidence:
        """The evidence, kept promise or broken one alike, for :func:`collecting` to collect."""
        table = Table(tuple(columns), tuple(tuple(row) for row in rows)) if columns else None
        notes = (*self.notes, *(_notes.get() or ()), *(known_defects(self.check) if self.problems else ()))
        figures, problems = tuple(self.figures), tuple(self.problems)
        evidence = Evidence(self.check, self.promise, figures, problems, notes, table, self.data)
        collected = _collected.get()
        if collected is not None:
            collected.append(evidence)
        return evidence


_judges: ContextVar[list[Judge] | None] = ContextVar("qvl_judges", default=None)
_notes: ContextVar[list[str] | None] = ContextVar("qvl_notes", default=None)
_collected: ContextVar[list[Evidence] | None] = ContextVar("qvl_evidence", default=None)


@contextmanager
def judging() -> Iterator[list[Judge]]:
    """List the judges that begin inside the block, so that what one has measured outlives an exception."""
    begun: list[Judge] = []
    token = _judges.set(begun)
    try:
        yield begun
    finally:
        _judges.reset(token)


@contextmanager
def noted() -> Iterator[list[str]]:
    """Add what is put into the list to the notes of every evidence made inside the block."""
    notes: list[str] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


@contextmanager
def collecting() -> Iterator[list[Evidence]]:
    """Collect the evidence of every verdict inside the block, kept promises and broken ones alike."""
    collected: list[Evidence] = []
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)
