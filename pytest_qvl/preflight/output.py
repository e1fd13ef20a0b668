"""A report as text, as JSON and as Markdown; what strangers wrote stays text in each of them."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from pytest_qvl.preflight.questions import QUESTIONS

if TYPE_CHECKING:
    from pytest_qvl.preflight.findings import Finding, Report

# What Markdown or HTML would take for markup.
_MARKUP = re.compile(r"[\\`*_{}\[\]<>()#+!|&~$@:]")
_OUTSIDE_JSON_TEXT = {ord(mark): f"\\u{ord(mark):04x}" for mark in "<>&"}


def as_text(report: Report) -> str:
    """For a terminal: one block per finding, red ones with cause, fix and the command that keeps it green."""
    lines = [f"base     {report.base}"]
    if report.adapter:
        lines.append(f"adapter  {report.adapter}")
    lines.append(f"with     {', '.join(f'{name} {version}' for name, version in report.versions.items())}")
    for question in QUESTIONS:
        findings = report.of(question.number)
        if findings:
            lines += ["", f"{question.number}. {question.title}"]
            lines += [line for finding in findings for line in _block(finding)]
    counts = ", ".join(f"{count} {state}" for state, count in report.counts().items())
    return "\n".join([*lines, "", f"{report.state.upper()}: {counts} ({report.seconds:.1f} s)"])


def _block(finding: Finding) -> list[str]:
    lines = [f"  {finding.state:<10}  {finding.line}"]
    parts = [("cause", finding.cause), ("fix", finding.fix)]
    parts += [("note", note) for note in finding.notes]
    parts += [("keep", finding.keeps_green)]
    return lines + [f"  {'':<10}  {word + ':':<7}{text}" for word, text in parts if text]


def as_json(report: Report) -> str:
    """JSON in ASCII, without a character that HTML would take for markup."""
    return json.dumps(report.as_dict(), indent=1, ensure_ascii=True).translate(_OUTSIDE_JSON_TEXT)


def as_markdown(report: Report) -> str:
    """A table for a step summary or an issue."""
    lines = [f"**{report.state}**: {_plain(report.base)}"]
    if report.adapter:
        lines[0] += f" with {_plain(report.adapter)}"
    lines += ["", "| | state | finding | cause | fix | keeps it green |", "| --- | --- | --- | --- | --- | --- |"]
    for finding in report:
        line = " ".join([finding.line, *(f"Note: {note}" for note in finding.notes)])
        cells = [str(finding.question), finding.state, *map(_plain, (line, finding.cause, finding.fix))]
        lines.append(f"| {' | '.join(cells)} | {_plain(finding.keeps_green)} |")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: every mark that could mean something as a character reference."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", text)


FORMATS = {"text": as_text, "json": as_json, "md": as_markdown}
