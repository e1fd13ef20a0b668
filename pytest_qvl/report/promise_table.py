"""One line per promise, its worst figure with the limit, and the verdict; a line for what a user's own tests found."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qvl.evidence import printable
from pytest_qvl.promises import PROMISES, promise_number
from pytest_qvl.report.folding import INDENT, MORE, NARROW, STATE_WIDTH, TITLE_WIDTH, write_folded
from pytest_qvl.report.states import STATES, PromiseState

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_qvl.evidence import Evidence
    from pytest_qvl.report.report_data import CheckReason
    from pytest_qvl.report.run_results import RunResults, TargetResults

TITLE = "does QLoRA leave the model seeing?"
YELLOW = {"yellow": True}
COLOURS = {"kept": {"green": True}, "BROKEN": {"red": True}, "error": {"red": True}}
TABLES_SHOWN = ("peak_vram",)  # numbers that are wanted though nothing is wrong with them


def write_promises(terminal: Any, results: RunResults) -> None:
    """Write a table for each model that the suite ran on, and a line for whatever else was found.

    Args:
        terminal: pytest's terminal reporter.
        results: Of the whole run.
    """
    stopped = results.exit_status in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR)
    ran = {t: r for t, r in results.suite.items() if r.evidence or r.errors or r.not_judged}
    if ran:
        terminal.section(TITLE, sep="=", bold=True)
    for target, found in ran.items():
        _write_table(terminal, target, found, stopped)
    lines = [_skip_line(target, found) for target, found in results.suite.items() if target not in ran]
    lines += [_own_line(target, found) for target, found in results.own.items()]
    for line in filter(None, lines):
        terminal.line(printable(f"qvl: {line}"))


def _write_table(terminal: Any, target: str, results: TargetResults, stopped: bool) -> None:
    width = terminal.config.get_terminal_writer().fullwidth
    terminal.line(target, bold=True)
    states: Counter[str] = Counter()
    for promise in results.promises():
        states[promise.state] += 1
        for line in _row(promise, width):
            terminal.line(printable(line), **COLOURS.get(promise.state, YELLOW))
        for check, reason in _about(promise.number, results.errors):
            write_folded(terminal, printable(f"{INDENT}error: {check}: {reason}"), **COLOURS["error"])
        for check, reason in _about(promise.number, results.not_judged):
            write_folded(terminal, printable(f"{INDENT}not judged: {check}: {reason}"), **YELLOW)
        found = [e for e in results.evidence if promise_number(e.check) == promise.number]
        for line in _measured(found, terminal.config.get_verbosity()):
            write_folded(terminal, printable(line))
        for table in (e.table for e in found if e.check in TABLES_SHOWN and e.table):
            for row in str(table).splitlines():
                terminal.line(printable(f"{INDENT}{row}"))
    verdict = _verdict(states, stopped)
    counts = "".join(f", {states[state]} {state}" for state in STATES[1:] if states[state])
    said = f"{states['kept']} of {len(PROMISES)} promises kept{counts}"
    checks = f"{len(results.evidence)} check{'s' * (len(results.evidence) != 1)} in {results.seconds:.0f} s"
    colour = COLOURS.get("error" if states["error"] else verdict, YELLOW)
    write_folded(terminal, printable(f"   verdict: {verdict}: {said}; {checks}"), bold=True, **colour)


def _measured(found: Sequence[Evidence], verbosity: int) -> Iterator[str]:
    """On ``-v`` what each check measured nearest to its limit, on ``-vv`` every figure of it."""
    for evidence in found if verbosity > 0 else ():
        figures = evidence.figures if verbosity > 1 else [evidence.worst] if evidence.worst else []
        if len(figures) == 1:
            yield f"{INDENT}{evidence.check}: {evidence.state}: {figures[0]}"
            continue
        yield f"{INDENT}{evidence.check}: {evidence.state}"
        yield from (f"{INDENT}{MORE}{figure}" for figure in figures)


def _about(number: int, reasons: Sequence[CheckReason]) -> list[CheckReason]:
    return [reason for reason in dict.fromkeys(reasons) if promise_number(reason[0]) == number]


def _row(promise: PromiseState, width: int) -> list[str]:
    """A promise in one line; on a narrow terminal its title, then state and figure below it."""
    if width >= NARROW:
        line = (
            f"   {promise.number:>2}  {promise.title:<{TITLE_WIDTH}}  {promise.state:<{STATE_WIDTH}}  {promise.detail}"
        )
        return [line.rstrip()]
    title = textwrap.wrap(promise.title, width, initial_indent=f"   {promise.number:>2}  ", subsequent_indent=INDENT)
    said = f"{promise.state}: {promise.detail}" if promise.detail else promise.state
    return [*title, *textwrap.wrap(said, width, initial_indent=INDENT, subsequent_indent=INDENT)]


def _verdict(states: Counter[str], stopped: bool) -> str:
    if states["BROKEN"]:
        return "BROKEN"
    if stopped:
        return "stopped early"
    if states["error"]:
        return "could not be judged"
    return next((state for state in ("kept", "partly judged") if states[state]), "not judged")


def _skip_line(target: str, results: TargetResults) -> str:
    reasons = Counter(reason for _, reason in results.skipped)
    if not reasons:
        return ""
    said = "; ".join(reason if len(reasons) == 1 else f"{reason} ({n})" for reason, n in reasons.items())
    return f"{target}: {_tests(reasons.total())} not run: {said}"


def _own_line(target: str, results: TargetResults) -> str:
    parts = []
    broken = sorted({e.check for e in results.evidence if not e.ok})
    if broken:
        parts.append(f"BROKEN: {', '.join(broken)}")
    kept = sum(e.ok for e in results.evidence)
    if kept:
        parts.append(f"{kept} {'check' if kept == 1 else 'checks'} kept")
    if results.not_judged:
        reasons = dict.fromkeys(f"{check}: {why}" for check, why in results.not_judged)
        parts.append(f"{len(results.not_judged)} not judged ({'; '.join(reasons)})")
    skipped = _skip_line("", results).removeprefix(": ")
    return f"{target}: {', '.join([*parts, *([skipped] if skipped else [])])}" if parts or skipped else ""


def _tests(count: int) -> str:
    return f"{count} {'test' if count == 1 else 'tests'}"
