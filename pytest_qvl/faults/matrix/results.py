"""What the matrix found, as data: one row per fault, the healthy variations and the graded doses."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import FAMILIES, catalogue

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from pytest_qvl.faults.catalogue import Fault

SCHEMA = "pytest-qvl/faults/1"
CAUGHT, OTHER_WORDS, MISSED, NOT_JUDGED, NOT_CARRIED, BROKEN = (
    *("caught", "other words", "missed"),
    *("not judged", "not carried", "broken"),
)
UNDECIDED = "cannot judge"
NOTICED = ("caught", "refused")
# They judge a whole, so they see much of what the checks of its parts see: the first two all that a model computes (the
# second on the embedded model only), the third all that a collator makes.
OF_A_WHOLE = ("layer_arithmetic", "golden_record", "batch")
# Of a part, whose every rule a check of the whole applies to the same inputs: no fault can be theirs alone, and why.
PART_OF_ANOTHER = {
    "label_mask": "but for its rules of thoughts, which only a template that opens them can break, `batch` holds the "
    "same labels to the same rules, and to masks and samples besides"
}


def faults_in_order() -> dict[str, Fault]:
    """Every fault by name, family by family: the catalogue itself begins with whatever was imported first."""
    modules, families = list(FAMILIES), list(dict.fromkeys(FAMILIES.values()))

    def place(fault: Fault) -> tuple[int, int]:
        return families.index(fault.family), modules.index(fault.damage.__module__.rpartition(".")[2])

    return {fault.name: fault for fault in sorted(catalogue().values(), key=place)}


@dataclass
class After:
    """What became of a fault that is in the reference too: the reference was recorded after the damage.

    Attributes:
        outcomes: Outcome by check, of checks that read the reference: of the named one, and of all where it is silent.
        named: Whether the named check notices it and its message holds the words it must.
        said: What the named check said, its beginning.
        broken: What went wrong in the fault's own code, or empty.
    """

    outcomes: dict[str, str] = field(default_factory=dict)
    named: bool = False
    said: str = ""
    broken: str = ""


@dataclass
class Row:
    """What became of one fault: every check's outcome on it.

    Attributes:
        check: The check that must catch it.
        outcomes: Check name to outcome.
        named: Whether the named check notices it and its message holds the words it must.
        smoke: Outcome of the plain smoke test; empty where it was not run.
        missing: Why the fault could not be made, or empty: what the model, its device or this machine lacks.
        broken: What went wrong in the fault's own code, or empty.
        said: What the named check said, its beginning.
        same: Why the outcome is the same with the reference recorded after the damage, or empty.
        after: What the outcome is then, where it may differ; ``None`` where that was not run.
    """

    check: str = ""
    outcomes: dict[str, str] = field(default_factory=dict)
    named: bool = False
    smoke: str = ""
    missing: str = ""
    broken: str = ""
    said: str = ""
    same: str = ""
    after: After | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Row:
        """Inverse of ``dataclasses.asdict``; records before the second column lack its keys."""
        after = data.get("after")
        return cls(**{**data, "after": None if after is None else After(**after)})

    @property
    def caught_after(self) -> tuple[str, ...] | None:
        """Which checks notice the fault with the reference recorded after the damage; ``None`` if that was not run.

        The named check alone, where it does so in the words that it must.
        """
        if self.missing or self.broken or not (self.same or self.after):
            return None
        after = self.after or After(named=self.named)
        if after.named:
            return (self.check,)
        outcomes = {} if after.broken else {**self.outcomes, **after.outcomes}
        return tuple(check for check, outcome in outcomes.items() if outcome in NOTICED)

    @property
    def verdict(self) -> str:
        """What became of the fault: one of the words above."""
        if self.missing:
            return NOT_CARRIED
        if self.broken:
            return BROKEN
        if self.named:
            return CAUGHT
        own = self.outcomes.get(self.check)
        if own in NOTICED:
            return OTHER_WORDS
        return NOT_JUDGED if own == UNDECIDED else MISSED


@dataclass
class Result:
    """What one run found: faults, healthy variations, graded defects, and what it ran with.

    Attributes:
        definitions: Digest of what decides the content, see :mod:`pytest_qvl.faults.matrix.freshness`.
        versions: Of the packages that compute.
        model: The model's source, as ``--model`` takes it.
        label: Of model and device, short.
        device: Name of the device: of the GPU, or ``"CPU"``.
        dtype: Load and compute dtype.
        rows: By fault.
        ill: What checks say of the model without any fault, where they do not pass.
        healthy: How many healthy variations each check judged.
        undecided: How many of them it could not judge.
        variations: How many there were.
        alarms: False alarms.
        doses: Graded defects.
        seconds: CPU time, by part.
    """

    definitions: str
    versions: dict[str, str]
    model: str = "embedded"
    label: str = "embedded × CPU"
    device: str = "CPU"
    dtype: str = "bfloat16"
    rows: dict[str, Row] = field(default_factory=dict)
    ill: dict[str, str] = field(default_factory=dict)
    healthy: dict[str, int] = field(default_factory=dict)
    undecided: dict[str, int] = field(default_factory=dict)
    variations: int = 0
    alarms: list[str] = field(default_factory=list)
    doses: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def made(self) -> dict[str, Row]:
        """The faults that could be made here."""
        return {name: row for name, row in self.rows.items() if not row.missing}

    @property
    def caught(self) -> int:
        """How many faults their named check caught, in the right words."""
        return sum(row.verdict == CAUGHT for row in self.rows.values())

    @property
    def after(self) -> dict[str, tuple[str, ...]]:
        """By fault, the checks that notice it where the reference was recorded after the damage; those that were run.

        Empty if that was not run for every fault that may have another outcome then.
        """
        found: dict[str, tuple[str, ...]] = {}
        for name, row in self.made.items():
            if row.broken:
                continue
            if row.caught_after is None:
                return {}
            found[name] = row.caught_after
        return found

    @property
    def verdicts(self) -> Counter[str]:
        """How many faults ended in which way."""
        return Counter(row.verdict for row in self.rows.values())

    @property
    def good(self) -> bool:
        """Whether every fault that could be made was caught in the right words, without a false alarm.

        And by any check where it is in the reference too, as far as that was run.
        """
        bad = {OTHER_WORDS, MISSED, NOT_JUDGED, BROKEN}
        missed = any(row.caught_after == () for row in self.rows.values())
        return not (bad & self.verdicts.keys() or missed or self.ill or self.alarms)

    def silent(self) -> list[str]:
        """Names of the faults that could be made and at which Transformers raises nothing."""
        faults = catalogue()
        return [name for name in self.made if faults[name].silent]

    def smoke_passes(self) -> list[str]:
        """Silent faults that the smoke test does not notice."""
        return [name for name in self.silent() if self.rows[name].smoke == "pass"]

    def only(self, check: str, *, aside: Collection[str] = ()) -> list[str]:
        """Faults that no other check catches; one that refuses the same inputs repeats ``validate_batch``.

        Args:
            check: The check.
            aside: Others that do not count.
        """
        return [
            name
            for name, row in self.made.items()
            if row.outcomes.get(check) == "caught"
            and not any(outcome == "caught" for other, outcome in row.outcomes.items() if other not in (check, *aside))
        ]

    def without_own_fault(self, *, aside: Collection[str] = ()) -> list[str]:
        """Checks of which every fault is caught by another check too, those that are set aside not counted."""
        checks = next((row.outcomes for row in self.made.values() if row.outcomes), {})
        return [check for check in checks if check not in aside and not self.only(check, aside=aside)]

    def as_dict(self) -> dict[str, Any]:
        """The result as plain data, to be written to a file."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Result:
        """Inverse of :meth:`as_dict`.

        Raises:
            ValueError: It is no record of faults of this version.
        """
        if data.get("schema") != SCHEMA:
            raise ValueError(f"no record of faults: its schema is {data.get('schema')!r}, not {SCHEMA!r}")
        fields = {name: value for name, value in data.items() if name != "schema"}
        return cls(**{**fields, "rows": {name: Row.from_dict(row) for name, row in data["rows"].items()}})


def smallest(dose: Mapping[str, Any]) -> str:
    """The smallest dose that a check catches, of one of ``Result.doses``; or that there is none, or none to be had."""
    if dose.get("undecided"):
        return "not judged"
    return dose["caught"] or "none"


def summary(result: Result) -> str:
    """The totals as text, one figure per line; of a run of the graded doses alone, each of them."""
    if result.doses and not result.rows:
        return "\n".join(f"{d['defect']}, by {d['check']}: {smallest(d)}" for d in result.doses)
    silent, passes = result.silent(), result.smoke_passes()
    lines = [
        f"{result.caught} of {len(result.made)} faults caught by the named check, in the right words; "
        f"{len(result.rows) - len(result.made)} cannot be made here"
    ]
    lines.append(_common_mode(result))
    if result.variations:
        lines.append(
            f"{len(result.alarms)} false alarms over {result.variations} healthy variations "
            f"({sum(result.healthy.values()):,} checks)"
        )
    if any(row.smoke for row in result.rows.values()):
        lines += [
            f"{len(silent)} of {len(result.made)} faults raise nothing in Transformers; "
            f"{len(passes)} of these {len(silent)} pass a plain test that trains one step and generates text",
            f"checks without a fault that only they catch: {_with_reasons(result.without_own_fault()) or 'none'}",
            f"the same with {', '.join(OF_A_WHOLE)} aside: "
            f"{', '.join(result.without_own_fault(aside=OF_A_WHOLE)) or 'none'}",
        ]
    lines += [f"the model without a fault fails {check}: {said}" for check, said in result.ill.items()]
    return "\n".join(lines)


def _with_reasons(checks: Collection[str]) -> str:
    """The checks by name, with the reason where there is one."""
    return ", ".join(f"{check} ({why})" if (why := PART_OF_ANOTHER.get(check)) else check for check in checks)


def _common_mode(result: Result) -> str:
    """The figure of the second column."""
    where = "with the reference recorded after the damage, as a user's is"
    after = result.after
    if not after:
        return f"{where}: not run"
    rows = {name: result.rows[name] for name in after}
    caught = sum(bool(checks) for checks in after.values())
    others = [name for name, checks in after.items() if checks and rows[name].check not in checks]
    missed = [name for name, checks in after.items() if not checks]
    return (
        f"{caught} of {len(rows)} {where}: {sum(row.after is not None for row in rows.values())} judged again, the "
        f"others' outcomes do not depend on it; {len(others)} by another check than the named one; "
        f"missed: {', '.join(missed) or 'none'}"
    )
