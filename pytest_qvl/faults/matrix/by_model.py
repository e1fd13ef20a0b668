"""The faults on several models and devices side by side, from the records of ``pytest-qvl faults --matrix --out``."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

from pytest_qvl.faults.matrix.results import (
    BROKEN,
    CAUGHT,
    MISSED,
    NOT_CARRIED,
    NOT_JUDGED,
    OTHER_WORDS,
    Result,
    Row,
    faults_in_order,
    smallest,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

NAME = "faults-by-model.md"
COMMAND = "pytest-qvl faults --table docs/records/faults-*.json --docs docs"
WORDS = {
    CAUGHT: "caught by the named check, in words that point at the cause",
    OTHER_WORDS: "caught, in other words",
    MISSED: "missed",
    NOT_JUDGED: "not judged",
    NOT_CARRIED: "not carried by this model or device",
    BROKEN: "could not be made: an error in the fault's own code",
}


def read_record(file: Path) -> Result:
    """The record in a file.

    Raises:
        ValueError: It is none; names the file.
    """
    try:
        return Result.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


def ordered(results: Iterable[Result]) -> list[Result]:
    """The embedded model before others, the CPU before CUDA, small before large by name."""
    return sorted(results, key=lambda result: (result.model != "embedded", result.device != "CPU", result.model))


def by_model(results: Sequence[Result]) -> str:
    """The page: figures per model and a row per fault, of records that have faults; then the smallest doses."""
    faults, graded = faults_in_order(), [result for result in results if result.doses]
    results = [result for result in results if result.rows]
    lines = [
        "# The faults on every model",
        "",
        f"<!-- Written by `{COMMAND}`; definitions {', '.join(result.definitions for result in results)} -->",
        "",
        "The deliberate faults of [faults.md](faults.md) on models of other sizes and on a GPU, each judged by the",
        "check that must catch it. What a model cannot carry says why. One command makes this page from the records in",
        f"[records](records/README.md): `{COMMAND}`.",
        "",
        *_figures(results),
    ]
    for family in dict.fromkeys(fault.family for fault in faults.values()):
        lines += [f"## {family[0].upper()}{family[1:]}", ""]
        lines.append("| " + " | ".join(["fault", "must be caught by", *_labels(results)]) + " |")
        lines.append("|" + "---|" * (2 + len(results)))
        for name, fault in faults.items():
            if fault.family == family:
                cells = [_cell(result.rows.get(name)) for result in results]
                lines.append("| " + " | ".join([f"`{name}`", fault.check, *cells]) + " |")
        lines.append("")
    return "\n".join([*lines, *_doses(graded)])


def _doses(results: Sequence[Result]) -> list[str]:
    """The smallest dose of each defect that each check catches, by model."""
    from pytest_qvl.faults.matrix.doses import GRADED

    if not results:
        return []
    found = [{(dose["defect"], dose["check"]): dose for dose in result.doses} for result in results]
    graded = ((each.defect, check) for each in GRADED for check in each.checks)
    judged = dict.fromkeys((*graded, *(key for doses in found for key in doses)))
    lines = ["## The smallest dose", "", "| " + " | ".join(["defect", "check", *_labels(results)]) + " |"]
    lines.append("|" + "---|" * (2 + len(results)))
    lines.append("| definitions | | " + " | ".join(f"`{result.definitions}`" for result in results) + " |")
    for key in judged:
        cells = [smallest(doses[key]) if key in doses else "not in the record" for doses in found]
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    return [
        *lines,
        "",
        '"None": caught at no dose. "Not judged": random weights know nothing that answers could be held to; or the',
        "model lacks what the defect is about; or the check fails the model without a fault.",
        "",
    ]


def _labels(results: Sequence[Result]) -> list[str]:
    """Of model and device, and of the dtype where several records are of the same two."""
    counts = Counter(result.label for result in results)
    return [f"{r.label}, {r.dtype}" if counts[r.label] > 1 else r.label for r in results]


def _figures(results: Sequence[Result]) -> list[str]:
    lines = ["| | " + " | ".join(_labels(results)) + " |", "|" + "---|" * (1 + len(results))]
    lines.append("| device | " + " | ".join(result.device for result in results) + " |")
    lines.append("| dtype | " + " | ".join(result.dtype for result in results) + " |")
    lines.append("| definitions of faults and checks | " + " | ".join(f"`{r.definitions}`" for r in results) + " |")
    for package in results[0].versions if results else ():
        lines.append(f"| {package} | " + " | ".join(result.versions.get(package, "") for result in results) + " |")
    for verdict, words in WORDS.items():
        lines.append(f"| {words} | " + " | ".join(str(result.verdicts[verdict]) for result in results) + " |")
    after = [f"{sum(map(bool, r.after.values()))} of {len(r.after)}" if r.after else "not run" for r in results]
    lines.append("| caught with the reference recorded after the damage | " + " | ".join(after) + " |")
    ill = ["; ".join(result.ill) or "none" for result in results]
    return [*lines, "| checks that fail the model without a fault | " + " | ".join(ill) + " |", ""]


def _cell(row: Row | None) -> str:
    if row is None:
        return "not in the record"
    detail = {NOT_CARRIED: row.missing, NOT_JUDGED: row.said, BROKEN: row.broken, OTHER_WORDS: row.said}
    said = detail.get(row.verdict, "").partition(";")[0][:160]
    shown = f"**{row.verdict}**" if row.verdict in (MISSED, BROKEN, OTHER_WORDS) else row.verdict
    by = row.caught_after
    if row.after is not None and by is not None and by != (row.check,):
        shown += f"; reference after: {', '.join(by) or 'missed'}"
    return (f"{shown}: {said}" if said else shown).replace("|", "\\|")
