"""The matrix as a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qvl.faults.matrix.by_model import NAME as BY_MODEL
from pytest_qvl.faults.matrix.results import NOTICED, faults_in_order, smallest
from pytest_qvl.faults.unreproduced import UNREPRODUCED
from pytest_qvl.models.families import FAMILIES

if TYPE_CHECKING:
    from pytest_qvl.faults.catalogue import Fault
    from pytest_qvl.faults.matrix.results import Result, Row

COMMAND = "pytest-qvl faults --matrix --docs docs"


def page(result: Result) -> str:
    """``docs/faults.md``."""
    from pytest_qvl.faults.matrix.results import summary

    faults, after = faults_in_order(), bool(result.after)
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    minutes = ", ".join(f"{name} {seconds / 60:.1f} min" for name, seconds in result.seconds.items())
    lines = [
        "# What is caught",
        "",
        f"<!-- Written by `{COMMAND}`; definitions {result.definitions} -->",
        "",
        "A catalogue of deliberate faults, each taken from a public thread where one is given, is applied to the",
        "embedded model in NF4 with LoRA; every check then judges the damaged model. One command makes this page:",
        f"`{COMMAND}`.",
        "",
        *(f"- {line}" for line in summary(result).splitlines()),
        f"- Run with {versions}, on CPU, one thread; CPU time: {minutes}.",
        "",
        "See one for yourself: `pytest --pyargs pytest_qvl.suite --qvl-fault scatter-off-by-one`. The same faults",
        f"on a GPU and on models of true size: [{BY_MODEL}]({BY_MODEL}).",
        "",
        "![Faults by checks](faults.svg)",
        "",
        "## The faults",
        "",
        '"Silent": forward, backward and `generate` raise nothing. "Smoke test": one training step with a finite',
        "loss, then text comes out; what a project without further tests sees.",
        *(_AFTER if after else ()),
        "",
    ]
    for family in dict.fromkeys(fault.family for fault in faults.values()):
        own = {name: fault for name, fault in faults.items() if fault.family == family and name in result.rows}
        lines += _family(result, family, own, after=after)
    lines += _checks(result) + _graded(result) + _unreproduced() + _alarms(result)
    return "\n".join(lines)


_AFTER = (
    '"Reference after": which check catches the fault where it is in the reference too, as with a user whose library,',
    'configuration, processor or checkpoint is broken for both. "same": the outcome does not depend on that, because',
    "the check reads no reference, or because no reference can have the fault.",
)


def _family(result: Result, family: str, faults: dict[str, Fault], *, after: bool) -> list[str]:
    """The faults of one family that are in the result, as a table under a heading."""
    columns = ["fault", "what is wrong", "caught by", *["reference after"] * after, "also by", "silent", "smoke test"]
    head = "| " + " | ".join([*columns, "from"]) + " |"
    lines = [f"### {family[0].upper()}{family[1:]}", "", head, "|" + "---|" * (len(columns) + 1)]
    for name, fault in faults.items():
        row = result.rows[name]
        if row.missing:
            empty = "| " * (after + 3)
            lines.append(
                f"| `{name}` | {_cell(fault.summary)} | not made here: {row.missing} {empty}| {fault.source} |"
            )
            continue
        also = [c for c, o in row.outcomes.items() if o in NOTICED and c != fault.check]
        smoke = "passes" if row.smoke == "pass" else "fails"
        caught = f"{fault.check if row.named else '**missed**'}{f' | {_after(row)}' * after}"
        lines.append(
            f"| `{name}` | {_cell(fault.summary)} | {caught} | {', '.join(also)} | "
            f"{'yes' if fault.silent else 'no'} | {smoke} | {fault.source} |"
        )
    return [*lines, ""]


def _after(row: Row) -> str:
    if row.same:
        return "same"
    if row.after is not None and row.after.broken:
        return f"**could not be made**: {_cell(row.after.broken)}"
    return ", ".join(row.caught_after or ()) or "**missed**"


def _cell(text: str) -> str:
    """Text inside a table: a bare bar would end its column."""
    return text.replace("|", "\\|")


def _checks(result: Result) -> list[str]:
    faults = faults_in_order()
    checks = next(iter(result.made.values())).outcomes
    labels = [family.label for family in FAMILIES.values()]
    lines = [
        "## The checks",
        "",
        '"Only": faults that no other check catches. "Healthy": on how many of the healthy variations it ran (dtypes,',
        "seeds, batch shapes, grids, padding, attention kernels, adapters, k-bit preparation, and random weights of",
        f"{', '.join(labels[:-1])} and {labels[-1]}), false alarms, and cases it could not judge.",
        "",
        "| check | named for | notices | only | for instance | healthy | false alarms | cannot judge |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for check in checks:
        seen = [n for n, row in result.made.items() if row.outcomes[check] in NOTICED]
        only = result.only(check)
        named = sum(faults[n].check == check for n in result.made)
        alarms = sum(f", {check} (" in alarm for alarm in result.alarms)
        lines.append(
            f"| {check} | {named} | {len(seen)} | {len(only)} | {', '.join(f'`{n}`' for n in only[:2])} | "
            f"{result.healthy.get(check, 0)} | {alarms} | {result.undecided.get(check, 0)} |"
        )
    return [*lines, ""]


def _graded(result: Result) -> list[str]:
    lines = [
        "## The smallest dose",
        "",
        "| defect | check | smallest dose caught | smaller doses not noticed |",
        "|---|---|---|---|",
    ]
    lines += [f"| {d['defect']} | {d['check']} | {smallest(d)} | {', '.join(d['missed'])} |" for d in result.doses]
    return [
        *lines,
        "",
        "Where structure can be counted or compared bitwise, one token, one layer or one weight is enough. Alignment",
        "asks the model: what its answers do not depend on, it does not notice, whatever the dose. The same on a GPU",
        f"and on models of true size: [{BY_MODEL}]({BY_MODEL}#the-smallest-dose).",
        "",
    ]


def _unreproduced() -> list[str]:
    lines = ["## Known failures that are not in the catalogue", "", "| failure | thread | why |", "|---|---|---|"]
    return [*lines, *(f"| {what} | {thread} | {why} |" for what, thread, why in UNREPRODUCED), ""]


def _alarms(result: Result) -> list[str]:
    if not result.alarms:
        return []
    return ["## False alarms", "", *(f"- {' '.join(alarm.split())[:400]}" for alarm in result.alarms), ""]
