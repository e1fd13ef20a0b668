"""The terminal summary: one line per promise, its worst figure with the limit, and the verdict."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest

from pytest_qvl.evidence import Evidence, printable
from pytest_qvl.report.promises import PROMISES, promise_of
from pytest_qvl.report.states import STATES, PromiseState, promise_states
from pytest_qvl.session.report_data import Said, report_data

TITLE = "does QLoRA leave the model seeing?"
TITLE_WIDTH = max(len(promise.title) for promise in PROMISES)
STATE_WIDTH = max(map(len, STATES))
YELLOW = {"yellow": True}
COLOURS = {"kept": {"green": True}, "BROKEN": {"red": True}, "error": {"red": True}}
TABLES_SHOWN = ("peak_vram",)  # numbers that are wanted though nothing is wrong with them
OWN_MODELS = "models of the tests' own"
NARROW = len("   11  ") + TITLE_WIDTH + len("  ") + STATE_WIDTH  # below it, a promise takes lines of its own


@dataclass
class Results:
    """What was found out about one model on one device, by the suite or by a user's own tests.

    Attributes:
        evidence: Verdicts of checks.
        not_judged: Check and reason, where a check could not decide.
        errors: Check and first line, where a test of the suite failed without a verdict.
        skipped: Check and reason, where a test was skipped.
        seconds: Time in set-up, call and tear-down.
    """

    evidence: list[Evidence] = field(default_factory=list)
    not_judged: list[Said] = field(default_factory=list)
    errors: list[Said] = field(default_factory=list)
    skipped: list[Said] = field(default_factory=list)
    seconds: float = 0.0

    def states(self) -> list[PromiseState]:
        """The state of every promise."""
        return promise_states(self.evidence, self.errors, self.not_judged, self.skipped)


class Summary:
    """Listens to reports (on the controller under xdist) and writes the section at the end of the run."""

    def __init__(self) -> None:
        self._suite: dict[str, Results] = {}
        self._own: dict[str, Results] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take what was found out off a report."""
        finding = report_data(report).finding
        if finding is None:
            return
        target, check, found = finding.target or OWN_MODELS, finding.check, finding.evidence
        results = (self._own if check is None else self._suite).setdefault(target, Results())
        # A broken promise that a passing test expected (with pytest.raises, or xfail) is no finding.
        results.evidence += found if report.failed else [e for e in found if e.ok]
        results.not_judged += finding.not_judged
        results.seconds += report.duration
        if report.skipped and finding.skipped is not None:
            results.skipped.append((check or "", finding.skipped))
        if check is not None and report.failed and all(e.ok for e in found):
            results.errors.append((check, _first_line(report)))

    def pytest_terminal_summary(self, terminalreporter: Any, exitstatus: int) -> None:
        """Write a table for each model that the suite ran on, and a line for whatever else was found."""
        if terminalreporter.config.get_verbosity() < -1:
            return
        stopped = exitstatus in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR)
        ran = {t: r for t, r in self._suite.items() if r.evidence or r.errors or r.not_judged}
        if ran:
            terminalreporter.section(TITLE, sep="=", bold=True)
        for target, results in ran.items():
            _write_table(terminalreporter, target, results, stopped)
        lines = [_skip_line(t, r) for t, r in self._suite.items() if t not in ran]
        lines += [_own_line(target, results) for target, results in self._own.items()]
        for line in filter(None, lines):
            terminalreporter.line(printable(f"qvl: {line}"))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the record: the state of every promise, for each model that the suite was collected for."""
        states = [{"target": t, **asdict(state)} for t, results in self._suite.items() for state in results.states()]
        return {"promises": states}


def _write_table(terminal: Any, target: str, results: Results, stopped: bool) -> None:
    terminal.line(target, bold=True)
    width = terminal.config.get_terminal_writer().fullwidth
    states: Counter[str] = Counter()
    for promise in results.states():
        states[promise.state] += 1
        for line in _row(promise, width):
            terminal.line(printable(line), **COLOURS.get(promise.state, YELLOW))
        index = promise.number - 1
        for check, said in _about(index, results.errors):
            terminal.line(printable(f"       error: {check}: {said}"), **COLOURS["error"])
        for check, said in _about(index, results.not_judged):
            terminal.line(printable(f"       not judged: {check}: {said}"), **YELLOW)
        found = [e for e in results.evidence if promise_of(e.check) == index]
        for table in (e.table for e in found if e.check in TABLES_SHOWN and e.table):
            for row in str(table).splitlines():
                terminal.line(printable(f"       {row}"))
    verdict = _verdict(states, stopped)
    counts = "".join(f", {states[state]} {state}" for state in STATES[1:] if states[state])
    terminal.line(
        f"   verdict: {verdict}: {states['kept']} of {len(PROMISES)} promises kept{counts}; "
        f"{len(results.evidence)} checks in {results.seconds:.0f} s",
        bold=True,
        **COLOURS.get("error" if states["error"] else verdict, YELLOW),
    )


def _about(index: int, pairs: list[Said]) -> list[Said]:
    return [pair for pair in dict.fromkeys(pairs) if promise_of(pair[0]) == index]


def _row(promise: PromiseState, width: int) -> list[str]:
    """A promise in one line; on a narrow terminal its title, then state and figure below it."""
    if width >= NARROW:
        line = (
            f"   {promise.number:>2}  {promise.title:<{TITLE_WIDTH}}  {promise.state:<{STATE_WIDTH}}  {promise.detail}"
        )
        return [line.rstrip()]
    indent = " " * len("   11  ")
    title = textwrap.wrap(promise.title, width, initial_indent=f"   {promise.number:>2}  ", subsequent_indent=indent)
    said = f"{promise.state}: {promise.detail}" if promise.detail else promise.state
    return [*title, *textwrap.wrap(said, width, initial_indent=indent, subsequent_indent=indent)]


def _verdict(states: Counter[str], stopped: bool) -> str:
    if states["BROKEN"]:
        return "BROKEN"
    if stopped:
        return "stopped early"
    if states["error"]:
        return "could not be judged"
    return next((state for state in ("kept", "partly judged") if states[state]), "not judged")


def _skip_line(target: str, results: Results) -> str:
    reasons = Counter(reason for _, reason in results.skipped)
    if not reasons:
        return ""
    said = "; ".join(reason if len(reasons) == 1 else f"{reason} ({n})" for reason, n in reasons.items())
    return f"{target}: {_tests(reasons.total())} not run: {said}"


def _own_line(target: str, results: Results) -> str:
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


def _first_line(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr) if crash is None else crash.message
    return text.strip().splitlines()[0] if text.strip() else report.when or ""
