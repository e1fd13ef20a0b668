"""What the run found out, on the terminal: here in the order in which it is shown."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qvl.evidence import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pytest_qvl.report.process_results import ProcessResults
    from pytest_qvl.report.report_data import LimitOutcome
    from pytest_qvl.report.run_results import ResultsBuilder, RunResults

NODE = "qvl session"
LOOK_AT = {
    "stale": "the check holds; remove the entry",
    "unmatched": "it means no test of the suite; correct its conditions, or remove it",
    "expired": "it does nothing any more; remove the entry, or set another date",
}
_COLOURS = {"kept": {"green": True}, "BROKEN": {"red": True}, "not judged": {"yellow": True}}


class Summary:
    """Registered as a plugin; silent in processes whose terminal nobody sees.

    Args:
        builder: Has the results of the run.
    """

    def __init__(self, builder: ResultsBuilder) -> None:
        self._builder = builder
        self._built: RunResults | None = None

    def pytest_terminal_summary(self, terminalreporter: Any, exitstatus: int) -> None:
        """Write every part; on ``-qq`` those that take a line each."""
        results = self._results(exitstatus)
        quiet = terminalreporter.config.get_verbosity() < -1
        for write in LINES_FIRST + (() if quiet else SECTIONS) + LINES_LAST:
            write(terminalreporter, results)

    @pytest.hookimpl(specname="pytest_terminal_summary", trylast=True)
    def pytest_terminal_summary_fault(self, terminalreporter: Any, exitstatus: int) -> None:
        """What a fault did, below all else: also below what other plugins write."""
        write_fault(terminalreporter, self._results(exitstatus))

    def _results(self, exitstatus: int) -> RunResults:
        """Those of the run, which is over: built once for all parts."""
        if self._built is None:
            self._built = self._builder.results(int(exitstatus))
        return self._built


def write_verdicts(terminal: Any, results: RunResults) -> None:
    """One line per verdict on the session."""
    for verdict in results.verdicts:
        first = str(verdict).splitlines()[0]
        terminal.line(f"{NODE}: {verdict.name}: {verdict.state}: {first}", **_COLOURS[verdict.state])


def write_gpu_failures(terminal: Any, results: RunResults) -> None:
    """One line for each, but for what was not run: a count."""
    not_run = Counter(failure.by for _, failure in results.gpu_failures if failure.kind == "not run")
    for phase, failure in results.gpu_failures:
        if failure.kind == "out of memory":
            terminal.line(f"qvl: {phase.test} ({phase.when}): {failure.text}", red=True)
        elif failure.kind == "broken":
            count = not_run[phase.test]
            later = f"{count} later GPU {'test was' if count == 1 else 'tests were'} not run"
            terminal.line(f"qvl: {failure.text}; {later}", red=True)


def write_problems(terminal: Any, results: RunResults) -> None:
    """What went wrong outside any test."""
    for problem in results.problems:
        terminal.line(f"qvl: {problem}", red=True, bold=True)


def write_limits_and_leases(terminal: Any, results: RunResults) -> None:
    """What became of the limits on VRAM, and which GPUs were used."""
    for line in (*limit_lines(results.limits), *lease_lines(results.processes)):
        terminal.line(f"qvl: {line}")


def limit_lines(limits: Sequence[LimitOutcome]) -> list[str]:
    """One line about the limits on VRAM, and one for each reason why some were not measured."""
    if not limits:
        return []
    reasons = Counter(limit.reason for limit in limits if limit.value is None)
    held = sum(limit.held for limit in limits)
    exceeded = len(limits) - held - reasons.total()
    line = f"vram limits: {held} held, {exceeded} exceeded, {reasons.total()} not measured"
    return [line, *(f"  not measured: {reason} ({count} ×)" for reason, count in reasons.most_common())]


def write_known_failures(terminal: Any, results: RunResults) -> None:
    """A line for every known failure that somebody has to look at, and one that counts the others."""
    states = results.known_failures
    for expected, state in states.items():
        if state in LOOK_AT:
            terminal.line(printable(f"qvl: known failure {state}: {expected}: {LOOK_AT[state]}"), yellow=True)
    counts = Counter(state for state in states.values() if state not in LOOK_AT)
    if counts:
        said = ", ".join(f"{count} {state}" for state, count in counts.items())
        terminal.line(f"qvl: known failures: {said}")


def lease_lines(processes: Sequence[ProcessResults]) -> Iterator[str]:
    """The GPUs that processes leased, and what was found on them."""
    for process in processes:
        lease = process.lease
        if lease is None:
            continue
        waited = f", waited {lease.waited:.0f} s for it" if lease.waited >= 1 else ""
        by = f" ({process.process})" if process.process else ""
        yield f"GPU lease{by}: {lease.gpu}{waited}"
        if lease.busy:
            yield f"  busy when it was leased: {lease.busy}"


def write_fault(terminal: Any, results: RunResults) -> None:
    """What was damaged on purpose, which check must notice it, and which checks did."""
    verdict = results.fault_verdict
    if verdict is None:
        return
    fault = verdict.fault
    terminal.line(f"qvl: fault {fault.name}: {fault.summary}")
    if fault.reference:
        terminal.line(f"qvl: the reference is {fault.reference}")
    line, also = f"qvl: {fault.check} must catch it, and", ", ".join(verdict.also)
    if verdict.state == "not run":
        terminal.line(f"{line} was not run", yellow=True)
    elif verdict.state == "missed":
        terminal.line(f"{line} DID NOT CATCH IT{f'; {also} did' if also else ''}", red=True)
    else:
        terminal.line(f"{line} caught it; so did {also or 'no other check'}", green=True)


def write_findings(terminal: Any, results: RunResults) -> None:
    """What was found out about models: backends side by side, and the promises."""
    if not results.findings:
        return
    from pytest_qvl.report.comparison import write_comparison
    from pytest_qvl.report.promise_table import write_promises

    write_comparison(terminal, results)
    write_promises(terminal, results)


Writers = tuple["Callable[[Any, RunResults], None]", ...]
LINES_FIRST: Writers = (write_verdicts, write_gpu_failures)
SECTIONS: Writers = (write_findings,)
LINES_LAST: Writers = (write_problems, write_known_failures, write_limits_and_leases)
