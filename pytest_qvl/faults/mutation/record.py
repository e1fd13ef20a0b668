"""The record of a run of mutations, and the page that is made of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.common_mode import reads_reference
from pytest_qvl.faults.mutation.judging import CAUGHT, EQUIVALENT, MISSED, RAISES, UNRESOLVED, Judged

if TYPE_CHECKING:
    from collections.abc import Sequence

SCHEMA = "pytest-qvl/mutations/1"
NAME = "mutations.md"
COMMAND = "pytest-qvl faults --table docs/records/mutations-embedded-cpu.json --docs docs"
# The share of mutations that change something which must be caught.
BAR = 0.95
WORDS = {
    CAUGHT: "caught by a check",
    MISSED: "missed",
    RAISES: "raises by itself: everybody meets the exception",
    EQUIVALENT: "equivalent: logits, loss, gradients and replies of all probes are bitwise the same",
    UNRESOLVED: "below the resolution of float32: they differ by no more than rounding explains",
}


def record(found: Sequence[Judged], count: int, seed: int) -> dict[str, Any]:
    """The run as plain data."""
    from pytest_qvl.faults.matrix.freshness import definitions_digest
    from pytest_qvl.faults.matrix.journal import versions
    from pytest_qvl.faults.mutation.running import DTYPE
    from pytest_qvl.faults.subject import embedded

    return {
        "schema": SCHEMA,
        "seed": seed,
        "asked": count,
        "complete": len(found) == count,
        "subject": str(embedded(DTYPE)),
        "versions": versions(),
        "definitions": definitions_digest(),
        "seconds": round(sum(one.seconds for one in found), 1),
        "longest": max((one.seconds for one in found), default=0.0),
        "mutations": [asdict(one) for one in found],
    }


def share_caught(mutations: Sequence[dict[str, Any]]) -> float:
    """The share of caught ones among those that change something and raise nothing; 1 if there is none."""
    counts = Counter(one["outcome"] for one in mutations)
    judged = counts[CAUGHT] + counts[MISSED]
    return counts[CAUGHT] / judged if judged else 1.0


def totals(data: dict[str, Any]) -> list[str]:
    """The figures of a record, one per line."""
    mutations = data["mutations"]
    counts = Counter(one["outcome"] for one in mutations)
    by_reference = sum(one["outcome"] == CAUGHT and reads_reference(one["by"]) for one in mutations)
    return [
        f"{counts[CAUGHT]} of {counts[CAUGHT] + counts[MISSED]} mutations that change something are caught "
        f"({100 * share_caught(mutations):.1f} %), {by_reference} of them only against the healthy reference",
        f"{counts[RAISES]} more raise by themselves, {counts[EQUIVALENT]} are equivalent, {counts[UNRESOLVED]} are "
        "below the resolution of float32",
        f"{len(mutations)} of {data['asked']} drawn from seed {data['seed']} in {data['seconds'] / 60:.1f} min of CPU, "
        f"{data['longest']:.1f} s at most for one",
    ]


def page(data: dict[str, Any]) -> str:
    """``docs/mutations.md``."""
    mutations = data["mutations"]
    kinds = list(dict.fromkeys(one["kind"] for one in mutations if one["kind"]))
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    lines = [
        "# Random mutations",
        "",
        f"<!-- Written by `{COMMAND}`; definitions {data['definitions']} -->",
        "",
        "The [catalogue](faults.md) holds faults that somebody thought of. Here nobody chooses: elements, blocks and",
        "rows of tensors, values of modules, configurations and processor, and expressions of code that runs are drawn",
        "from a seed, changed one at a time in the live model, and put back: `pytest-qvl faults --random N --seed S`.",
        "",
        *(f"- {line}" for line in totals(data)),
        f"- Run on {data['subject']} with {versions}.",
        "",
        "| | " + " | ".join(kinds) + " |",
        "|" + "---|" * (1 + len(kinds)),
        *(_row(outcome, kinds, mutations) for outcome in WORDS),
        "",
        "A fresh adapter's own weights are left out: any draw of them is as good as another. What rounding explains",
        "is four times the [noise floor](limits.md#noise-floor) for logits, twice that for the loss, and for gradients",
        "four times what eager attention in place of SDPA makes of them. Checks that read a reference are asked last:",
        "theirs is healthy here, and that of a user whose library or checkpoint is broken is not.",
        "",
        "## Caught by",
        "",
        "The first check, in the order from cheap to expensive, that catches it.",
        "",
        "| check | mutations | for instance |",
        "|---|---|---|",
        *_checks(mutations),
        "",
    ]
    for outcome, title in ((MISSED, "Missed"), (UNRESOLVED, "Below the resolution"), (EQUIVALENT, "Equivalent")):
        found = [one for one in mutations if one["outcome"] == outcome]
        lines += [f"## {title}", "", *([f"- {_cell(one)}" for one in found] or ["None."]), ""]
    return "\n".join(lines)


def _row(outcome: str, kinds: list[str], mutations: Sequence[dict[str, Any]]) -> str:
    counts = [sum(one["outcome"] == outcome and one["kind"] == kind for one in mutations) for kind in kinds]
    return f"| {WORDS[outcome]} | {' | '.join(map(str, counts))} |"


def _checks(mutations: Sequence[dict[str, Any]]) -> list[str]:
    counts = Counter(one["by"] for one in mutations if one["outcome"] == CAUGHT)
    first = {one["by"]: one for one in reversed(mutations) if one["outcome"] == CAUGHT}
    return [f"| {check} | {count} | {_cell(first[check])} |" for check, count in counts.most_common()]


def _cell(mutation: dict[str, Any]) -> str:
    """Number and words of a mutation, as code that no bar or accent ends."""
    what = mutation["what"].replace("|", "\\|").replace("`", "'")
    return f"{mutation['number']}: `{what}`"
