"""A comparison as text, Markdown and JSON."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING

from pytest_qvl.evidence import printable
from pytest_qvl.records.compare import KINDS, REGRESSIONS, Change, Comparison, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FEW = 8  # of one kind, said one by one where they are no regression


def as_text(found: Comparison) -> str:
    """For a terminal: what else is different, then the changes by kind, then the verdict."""
    return "\n".join(map(one_line, [*_lines(found), f"compare: {found.verdict}"]))


def one_line(text: str) -> str:
    """Text from strangers as one line of a terminal: a line of its own could be a command to a CI service."""
    return " ".join(printable(text).splitlines())


def _lines(found: Comparison) -> Iterator[str]:
    if found.versions:
        yield "the runs differ in:"
        yield from (f"   {line}" for line in found.versions)
    for kind, changes in _by_kind(found):
        yield f"{kind} ({KINDS[kind]}):"
        if len(changes) > FEW and kind not in REGRESSIONS:
            yield f"   {len(changes)}: {', '.join(dict.fromkeys(change.check or change.test for change in changes))}"
        else:
            yield from (f"   {change}" for change in changes)


def _by_kind(found: Comparison) -> Iterator[tuple[Kind, list[Change]]]:
    return ((kind, list(changes)) for kind, changes in groupby(found.changes, key=lambda change: change.kind))


def as_markdown(found: Comparison) -> str:
    """For a pull request or a step summary: a table of the changes, folded where there are many."""
    lines = [f"**Compared:** {escaped(found.verdict)}", ""]
    if found.changes:
        lines += ["| | check | test | before | now |", "| --- | --- | --- | --- | --- |"]
        lines += [_row(change) for change in found.changes]
        lines.append("")
    if found.versions:
        lines += ["<details><summary>The runs differ in</summary>", ""]
        lines += [f"- {escaped(line)}" for line in found.versions]
        lines += ["", "</details>", ""]
    return "\n".join(lines)


def _row(change: Change) -> str:
    old, new = (f"{change.what}: {text}" if change.what else text for text in (change.old, change.new))
    cells = (f"**{change.kind}**" if change.kind in REGRESSIONS else change.kind, change.check, change.test, old, new)
    return "| " + " | ".join([cells[0], *map(escaped, cells[1:])]) + " |"


def escaped(text: str) -> str:
    """Text from strangers (model names, replies) as it can stand in a cell of a Markdown table: all of it is text."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~@&-])", r"\\\1", printable(text)).replace("\n", " ")


def as_json(found: Comparison) -> str:
    """For programs: every change, whether it is a regression, and the verdict."""
    changes = [{**asdict(change), "regression": change.kind in REGRESSIONS} for change in found.changes]
    data = {"verdict": found.verdict, "compared": found.compared, "versions": found.versions, "changes": changes}
    return json.dumps(data, indent=1)


FORMATS: dict[str, Callable[[Comparison], str]] = {"text": as_text, "md": as_markdown, "json": as_json}
