"""What a preflight says: typed findings, neutral text. Standard library only."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["green", "red", "not judged"]
STATES: tuple[State, ...] = ("red", "not judged", "green")
VERSION = 1
NOT_TESTED = "other-method"  # name of the finding that the artefact as a whole was not judged
OWN_ERROR = "own-error"  # of a question that broke off: what it would have said nobody knows
_LONGEST = 1200  # characters of one sentence; names that strangers chose may be as long as they like


def neutral(text: Any, longest: int = _LONGEST) -> str:
    r"""Text from strangers as one harmless line: control characters, also line breaks, as Python escapes them.

    Terminal escapes, marks that turn the direction of text, and lone surrogates become ``\x1b``, ``\u202e`` and so on.

    Args:
        text: Anything; made a string first.
        longest: More characters than these are cut, and the cut is marked.
    """
    said = str(text)
    said = said if len(said) <= longest else f"{said[:longest]}[... {len(said) - longest} more characters]"
    if said.isascii() and said.isprintable():
        return said
    return "".join(c if unicodedata.category(c)[0] not in "CZ" or c == " " else ascii(c)[1:-1] for c in said)


def some(names: Iterable[str], shown: int = 3) -> str:
    """The first few of many names, and how many more there are."""
    found = list(names)
    more = f", and {len(found) - shown} more" if len(found) > shown else ""
    return ", ".join(neutral(name, 160) for name in found[:shown]) + more


def counted(count: int, thing: str) -> str:
    """How many of a thing, in words: ``1 tensor``, ``2 tensors``."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


@dataclass(frozen=True)
class Finding:
    """One line of the answer.

    Every text is made neutral (:func:`neutral`) when the finding is made.

    Attributes:
        question: Number of the question it answers.
        name: What it is about, one of a fixed set of words (``"idle-skip-entry"``); stays from release to release.
        state: ``"green"``, ``"red"`` or ``"not judged"``.
        line: What was found, in one sentence.
        cause: Why, where it is not green.
        fix: What to do, where it is not green.
        keeps_green: The command that keeps it green from now on, or shows that it is again.
        notes: What a reader should know although it decides nothing here (other releases).
    """

    question: int
    name: str
    state: State
    line: str
    cause: str = ""
    fix: str = ""
    keeps_green: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Make every text neutral.

        Raises:
            ValueError: A red finding without its cause or fix.
        """
        for name in ("line", "cause", "fix", "keeps_green"):
            object.__setattr__(self, name, neutral(getattr(self, name)))
        object.__setattr__(self, "notes", tuple(map(neutral, self.notes)))
        if self.state == "red" and not (self.cause and self.fix):
            raise ValueError(f"the red finding {self.name!r} lacks its cause or its fix")

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**vars(self), "notes": list(self.notes)}


@dataclass(frozen=True)
class Report:
    """Everything that a preflight found.

    Attributes:
        base: The base model, in words.
        adapter: The adapter's folder, or the LoRA configuration; empty for none.
        findings: In the order of the questions.
        versions: Of the packages that were asked, by name.
        seconds: How long it took.
    """

    base: str
    adapter: str = ""
    findings: tuple[Finding, ...] = ()
    versions: dict[str, str] = field(default_factory=dict, hash=False)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        """Make both names neutral."""
        object.__setattr__(self, "base", neutral(self.base))
        object.__setattr__(self, "adapter", neutral(self.adapter))

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def of(self, question: int) -> list[Finding]:
        """The findings of one question."""
        return [finding for finding in self.findings if finding.question == question]

    @property
    def red(self) -> list[Finding]:
        """What is wrong."""
        return [finding for finding in self.findings if finding.state == "red"]

    @property
    def not_judged(self) -> list[Finding]:
        """What could not be decided, and why."""
        return [finding for finding in self.findings if finding.state == "not judged"]

    @property
    def state(self) -> State:
        """The worst there is. One red finding makes it red; green only if what was given was judged."""
        states = {finding.state for finding in self.findings}
        if "red" in states:
            return "red"
        judged = "green" in states and not any(finding.name in (NOT_TESTED, OWN_ERROR) for finding in self.findings)
        return "green" if judged else "not judged"

    def counts(self) -> dict[State, int]:
        """How many findings there are of each state."""
        return {state: sum(f.state == state for f in self.findings) for state in STATES}

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as ``--json`` prints it."""
        return {
            "preflight": VERSION,
            "base": self.base,
            "adapter": self.adapter,
            "state": self.state,
            "counts": self.counts(),
            "versions": dict(self.versions),
            "seconds": round(self.seconds, 3),
            "findings": [finding.as_dict() for finding in self.findings],
        }


def numbers(values: Sequence[int]) -> str:
    """Whole numbers in words, runs of them together: ``1, 10-19``."""
    runs: list[list[int]] = []
    for value in sorted(set(values)):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
