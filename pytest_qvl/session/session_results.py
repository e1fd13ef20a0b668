"""Session verdicts: what no single test is to blame for, reported under a name of its own.

A session fixture whose teardown raises is an error of the last, innocent test. A verdict is a result of its own
instead, ``qvl session::leak``: a line of the summary, a test case in JUnit's file, an entry in the record, and an exit
status. Every process that runs tests judges for itself; under xdist the controller gathers and reports.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import pytest

from pytest_qvl.session.process_link import parent_link, starts_processes
from pytest_qvl.session.report_data import add_to_report, report_data

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

NODE = "qvl session"
_OUTPUT = "qvl_session"
_COLOURS = {"kept": {"green": True}, "BROKEN": {"red": True}, "not judged": {"yellow": True}}


@dataclass(frozen=True)
class Verdict:
    """One process's verdict on its session.

    Attributes:
        name: What is judged, ``leak``.
        state: As in the summary of the suite.
        text: What was found; the first line says it all.
        process: The backend's process or the xdist worker; empty where there is only one process.
    """

    name: str
    state: Literal["kept", "BROKEN", "not judged"]
    text: str
    process: str = ""

    def __str__(self) -> str:
        return f"{self.process}: {self.text}" if self.process else self.text


class SessionVerdicts:
    """Asks the judges when the session ends, and reports.

    Args:
        judges: Called once, in the process that ran the tests, after its fixtures are torn down (an interrupted
            session tears them down later).
        facts: What else of this process the summary and the record want, by name.

    Attributes:
        verdicts: All processes' verdicts, complete once the session has finished.
        facts: All processes' facts, each with its ``process``.
    """

    def __init__(
        self,
        judges: Sequence[Callable[[pytest.Session], Iterable[Verdict]]],
        facts: Callable[[], dict[str, Any]],
    ) -> None:
        self._judges = judges
        self._ask_facts = facts
        self.verdicts: list[Verdict] = []
        self.facts: list[dict[str, Any]] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Judge, before JUnit's file and the record are written; send the verdicts to whoever reports them."""
        config: Any = session.config
        if not starts_processes(config):
            found = [asdict(verdict) for judge in self._judges for verdict in judge(session)]
            self.take({"verdicts": found, "facts": [self._ask_facts()]}, "")
        output = {"verdicts": [asdict(verdict) for verdict in self.verdicts], "facts": self.facts}
        if hasattr(config, "workeroutput"):
            config.workeroutput[_OUTPUT] = output
            return
        parent = parent_link(config)
        if parent is not None:
            parent.request("session", output=output)
            return
        self._report(config)
        if session.exitstatus == pytest.ExitCode.OK and any(v.state == "BROKEN" for v in self.verdicts):
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

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """One line per verdict."""
        for verdict in self.verdicts:
            first = str(verdict).splitlines()[0]
            terminalreporter.line(f"{NODE}: {verdict.name}: {verdict.state}: {first}", **_COLOURS[verdict.state])

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the record."""
        return {"session": [asdict(verdict) for verdict in self.verdicts]}

    def take(self, output: dict[str, Any], process: str) -> None:
        """Take over verdicts and facts, as plain data, of a process that this one started."""

        def named(data: dict[str, Any]) -> dict[str, Any]:
            return {**data, "process": " ".join(filter(None, (process, data.get("process", ""))))}

        self.verdicts += [Verdict(**named(data)) for data in output["verdicts"]]
        self.facts += map(named, output["facts"])

    def _report(self, config: pytest.Config) -> None:
        for name in dict.fromkeys(verdict.name for verdict in self.verdicts):
            same = [verdict for verdict in self.verdicts if verdict.name == name]
            report = _merged(name, same)
            add_to_report(report, session_verdict="")
            config.hook.pytest_runtest_logreport(report=report)
            add_to_report(report, session_verdict=report.outcome.upper())  # for the short summary


def _merged(name: str, verdicts: Sequence[Verdict]) -> pytest.TestReport:
    """One report for the verdicts of all processes: failed if one is broken, skipped if none could be judged."""
    broken = [verdict for verdict in verdicts if verdict.state == "BROKEN"]
    outcome: Literal["passed", "failed", "skipped"] = "failed" if broken else "passed"
    longrepr: Any = "\n\n".join(map(str, broken)) or None
    if all(verdict.state == "not judged" for verdict in verdicts):
        outcome, longrepr = "skipped", (NODE, 0, f"Skipped: {verdicts[0]}")
    node = f"{NODE}::{name}"
    return pytest.TestReport(node, (NODE, None, node), {}, outcome, longrepr, "call")
