"""A report as text, as JSON and as Markdown; what strangers wrote stays text in each of them."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING

from pytest_qvl.preflight.questions import QUESTIONS

if TYPE_CHECKING:
    from pytest_qvl.preflight.findings import Finding, Report

# What Markdown or HTML would take for markup.
_MARKUP = re.compile(r"[\\`*_{}\[\]<>()#+!|&~$@:]")
_OUTSIDE_JSON_TEXT = {ord(mark): f"\\u{ord(mark):04x}" for mark in "<>&"}


def as_text(report: Report) -> str:
    """For a terminal: one block per finding, red ones with cause and fix; last the command that keeps it green."""
    command = _command(report)
    lines = [f"base     {report.base}"]
    if report.adapter:
        lines.append(f"adapter  {report.adapter}")
    lines.append(f"with     {', '.join(f'{name} {version}' for name, version in report.versions.items())}")
    for question in QUESTIONS:
        findings = report.of(question.number)
        if findings:
            lines += ["", f"{question.number}. {question.title}"]
            lines += [line for finding in findings for line in _block(finding, command)]
    lines += ["", f"To keep it green: {command}"] if command else []
    counts = ", ".join(f"{count} {state}" for state, count in report.counts().items())
    return "\n".join([*lines, "", f"{report.state.upper()}: {counts} ({report.seconds:.1f} s)"])


def _command(report: Report) -> str:
    """The command that keeps most of the findings green, which is said once; empty for none."""
    commands = Counter(finding.keeps_green for finding in report if finding.keeps_green)
    return commands.most_common(1)[0][0] if commands else ""


def _block(finding: Finding, command: str) -> list[str]:
    lines = [f"  {finding.state:<10}  {finding.line}"]
    parts = [("cause", finding.cause), ("fix", finding.fix)]
    parts += [("note", note) for note in finding.notes]
    parts += [("keep", finding.keeps_green)] if finding.keeps_green != command else []
    return lines + [f"  {'':<10}  {word + ':':<7}{text}" for word, text in parts if text]


def as_json(report: Report) -> str:
    """JSON in ASCII, without a character that HTML would take for markup."""
    return json.dumps(report.as_dict(), indent=1, ensure_ascii=True).translate(_OUTSIDE_JSON_TEXT)


def as_markdown(report: Report) -> str:
    """A table for a step summary or an issue."""
    lines = [f"**{report.state}**: {_plain(report.base)}"]
    if report.adapter:
        lines[0] += f" with {_plain(report.adapter)}"
    command = _command(report)
    lines += ["", "| | state | finding | cause | fix |", "| --- | --- | --- | --- | --- |"]
    for finding in report:
        others = [finding.keeps_green] if finding.keeps_green != command else []
        notes = [f"Note: {note}." for note in finding.notes] + [
            f"To keep it green: {other}" for other in others if other
        ]
        line = " ".join([f"{finding.line}." if notes else finding.line, *notes])
        cells = [str(finding.question), finding.state, *map(_plain, (line, finding.cause, finding.fix))]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"To keep it green: {_code(command)}"] if command else []
    return "\n".join(lines)


def _code(command: str) -> str:
    """A command to be copied, where nothing in it ends a code span or is HTML."""
    return _plain(command) if set(command) & set("`<>&") else f"`{command}`"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: every mark that could mean something as a character reference."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", text)


FORMATS = {"text": as_text, "json": as_json, "md": as_markdown}
