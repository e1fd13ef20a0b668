"""Session verdicts: what no single test is to blame for, reported under a name of its own.

A session fixture whose teardown raises is an error of the last, innocent test. A verdict is a result of its own
instead, ``qvl session::leak``: a line of the summary, a test case in JUnit's file, an entry in the record, and an exit
status. Every process that runs tests judges for itself; under xdist the controller gathers and reports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pytest

from pytest_qvl.report.process_results import ProcessResults
from pytest_qvl.report.report_data import add_to_report, report_data
from pytest_qvl.report.terminal import NODE
from pytest_qvl.session.process_link import parent_link, starts_processes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_qvl.report.process_results import Verdict
    from pytest_qvl.report.run_results import ResultsBuilder, RunResults
    from pytest_qvl.session.gpu_access import GpuAccess
    from pytest_qvl.session.leaks import LeakVerdicts
    from pytest_qvl.session.probe_replies import ProbeReplies
    from pytest_qvl.session.session_limits import SessionLimits
    from pytest_qvl.session.subjects import Subjects

_OUTPUT = "qvl_session"


class SessionVerdicts:
    """Judges the session when it ends, brings the results of processes together, and reports.

    Args:
        builder: Takes what every process found out.
        limits: On the session's VRAM.
        leaks: Whether the session left memory allocated.
        access: The way to the GPU.
        subjects: What was judged; ``None`` where no record is written.
        probes: What the model saw and said; ``None`` where no report is asked for.
    """

    def __init__(
        self,
        builder: ResultsBuilder,
        limits: SessionLimits,
        leaks: LeakVerdicts,
        access: GpuAccess,
        *,
        subjects: Subjects | None = None,
        probes: ProbeReplies | None = None,
    ) -> None:
        self._builder, self._subjects, self._probes = builder, subjects, probes
        self._limits, self._leaks, self._access = limits, leaks, access

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Judge, before JUnit's file and the record are written; send the results to whoever reports them."""
        config: Any = session.config
        if not starts_processes(config):
            self._builder.add_process(self._judge(session))
        results = self._builder.results()
        output = [process.as_dict() for process in results.processes]
        if hasattr(config, "workeroutput"):
            config.workeroutput[_OUTPUT] = output
            return
        parent = parent_link(config)
        if parent is not None:
            parent.request("session", output=output)
            return
        self._report(config, results.verdicts)
        if _turns_red(session.exitstatus, results):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take a worker's verdicts; one that crashed leaves none."""
        output = getattr(node, "workeroutput", {}).get(_OUTPUT)
        if output is not None:
            self.take(output, node.gateway.id)

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """Broken verdicts count as failures; none of them is a test's letter in the progress."""
        word = report_data(report).session_verdict
        return None if word is None else ("failed" if report.failed else "", "", word)

    def take(self, output: Sequence[dict[str, Any]], process: str) -> None:
        """Take over the results, as plain data, of a process that this one started, and of those below it."""
        for data in output:
            self._builder.add_process(ProcessResults.from_dict(data).started_by(process))

    def _judge(self, session: pytest.Session) -> ProcessResults:
        """Of the process that ran the tests, after its fixtures are torn down; an interrupted one does that later."""
        verdicts = (*self._limits.judge_session(), *self._leaks.judge_session(session))
        whole, phases = self._access.vram()
        subjects = () if self._subjects is None else self._subjects.found
        lease, limits = self._access.gpu.leased(), self._limits.outcomes
        known = tuple(self._builder.known.items())
        probes = () if self._probes is None else self._probes.found
        return ProcessResults(whole, phases, lease, verdicts, limits, subjects=subjects, known=known, probes=probes)

    def _report(self, config: pytest.Config, verdicts: Sequence[Verdict]) -> None:
        for name in dict.fromkeys(verdict.name for verdict in verdicts):
            same = [verdict for verdict in verdicts if verdict.name == name]
            report = _merged(name, same)
            add_to_report(report, session_verdict="")
            config.hook.pytest_runtest_logreport(report=report)
            add_to_report(report, session_verdict=report.outcome.upper())  # for the short summary


def _turns_red(status: int, results: RunResults) -> bool:
    """Whether a run whose tests are green is not: a verdict is broken, or something went wrong outside any test."""
    if results.problems:
        return status in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    return status == pytest.ExitCode.OK and any(verdict.state == "BROKEN" for verdict in results.verdicts)


def _merged(name: str, verdicts: Sequence[Verdict]) -> pytest.TestReport:
    """One report for the verdicts of all processes: failed if one is broken, skipped if none could be judged."""
    broken = [verdict for verdict in verdicts if verdict.state == "BROKEN"]
    outcome: Literal["passed", "failed", "skipped"] = "failed" if broken else "passed"
    longrepr: Any = "\n\n".join(map(str, broken)) or None
    if all(verdict.state == "not judged" for verdict in verdicts):
        outcome, longrepr = "skipped", (NODE, 0, f"Skipped: {verdicts[0]}")
    node = f"{NODE}::{name}"
    return pytest.TestReport(node, (NODE, None, node), {}, outcome, longrepr, "call")
