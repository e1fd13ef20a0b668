"""The JSON record of one run: what was measured, and on what.

Schema ``pytest-qvl/record/2``, in ``record.schema.json`` beside this file. Checks are keyed by model, device, check
and parameters, not by node id, which changes with the folder that pytest was started in. ``seconds_by_test`` has
setup, call and teardown of every test that uses a model: shared fixtures count for the test that came first.
``promises`` has the state of every promise for every model, as in the summary (since version 2). What turned a run red
is in ``checks`` (broken verdicts), ``errors`` (what failed without one), ``session`` and ``problems``. ``vram`` has the
peaks of the whole process and of each phase. Written atomically, also when tests fail, as the last thing of the
session: the exit status is the process's.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qvl.outputs import write_json
from pytest_qvl.report.comparison import comparison
from pytest_qvl.report.environment import environment, machine
from pytest_qvl.suite import SUITE_VERSION

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from pytest_qvl.evidence import Evidence
    from pytest_qvl.records.compare import Comparison
    from pytest_qvl.report.injected_fault import FaultVerdict
    from pytest_qvl.report.process_results import ProcessResults
    from pytest_qvl.report.report_data import Finding
    from pytest_qvl.report.run_results import PhaseResult, ResultsBuilder, RunResults

SCHEMA = "pytest-qvl/record/2"
ANSWERS = "answers"  # in the data of the check "alignment"


class RunRecord:
    """The record of a run as data, for all that write it, show it or compare it; what it ran on is looked up once.

    Args:
        builder: Has the results of the run.
        settings: As the header shows them.
        configuration: Name, value and source of every setting.

    Attributes:
        builder: The same.
        compared: The comparison with a base, and why there can be none; whoever compares sets it.
    """

    def __init__(
        self, builder: ResultsBuilder, settings: Sequence[str], configuration: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.builder = builder
        self.compared: tuple[Comparison | None, str] = (None, "")
        self._chosen = {"settings": list(settings), "configuration": list(configuration)}
        self._ran_on: dict[str, Any] = {}

    def data(self, session: pytest.Session) -> dict[str, Any]:
        """What has been found out so far, with the exit status that the session has now; every key of the schema."""
        results = self.builder.results(int(session.exitstatus))
        if not self._ran_on:
            self._ran_on = {"environment": environment(session.config.rootpath), "machine": machine()}
        return {
            "schema": SCHEMA,
            "suite": SUITE_VERSION,
            "started": results.started.isoformat(timespec="seconds"),
            "seconds": round(results.seconds, 1),
            "exit_status": results.exit_status,
            "command": ["pytest", *map(str, session.config.invocation_params.args)],
            **self._chosen,
            **self._ran_on,
            **plain(results),
        }


class Record:
    """Writes the file at the end of the run; register it as a plugin, in the process that was started.

    Args:
        path: The file.
        run: What is to be written.

    Attributes:
        setting: Which asked for the file.
        required: Whether a run without it is not green.
        path: The file.
    """

    setting = "qvl_record"
    required = True

    def __init__(self, path: Path, run: RunRecord) -> None:
        self.path = path
        self._run = run

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, object, object]:
        """Write the file, after whoever may still change the exit status; without a record it is not green."""
        try:
            return (yield)
        finally:
            problem = self.write(session)
            if problem:
                if self.required and session.exitstatus == pytest.ExitCode.OK:
                    session.exitstatus = pytest.ExitCode.TESTS_FAILED
                self._say(session.config, f"{self.setting}: {problem}")

    @staticmethod
    def _say(config: pytest.Config, line: str) -> None:
        reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is None:
            print(line, file=sys.stderr)
        else:
            reporter.ensure_newline()
            reporter.write_line(line, red=True, bold=True)

    def write(self, session: pytest.Session) -> str:
        """Write the file; returns why it could not be written, empty if it was."""
        return write_json(self.path, self._run.data(session))


def plain(results: RunResults) -> dict[str, Any]:
    """What a run found out as plain data, under the keys of the record."""
    return {
        "subjects": [asdict(subject) for subject in results.subjects],
        "probes": [{**asdict(probe), "images": list(probe.images)} for probe in results.probes],
        "tests": dict(results.tests),
        "skipped": dict(results.skipped),
        "checks": [entry for phase, finding in results.findings for entry in _checks(phase, finding)],
        "errors": [_error(phase) for phase in results.errors],
        "seconds_by_test": _seconds_by_test(results),
        "promises": [
            {"target": target, **asdict(state)} for target, found in results.suite.items() for state in found.promises()
        ],
        "comparison": [
            {"name": name, "columns": table.columns, "rows": table.rows} for name, table in comparison(results).items()
        ],
        "session": [asdict(verdict) for verdict in results.verdicts],
        "limits": [asdict(limit) for limit in results.limits],
        "problems": list(results.problems),
        "gpu_failures": [
            {"test": phase.test, "when": phase.when, **asdict(failure)} for phase, failure in results.gpu_failures
        ],
        "leases": [
            # Without what names a machine or somebody's programs.
            {"name": gpu.name, "index": gpu.index, "waited": gpu.waited, "process": p.process, "busy": bool(gpu.busy)}
            for p in results.processes
            if (gpu := p.lease) is not None
        ],
        "vram": _vram(results.processes),
        "fault": _fault(results.fault_verdict),
        "known_failures": [{"reason": reason, "state": state} for reason, state in results.known_failures.items()],
    }


def _checks(phase: PhaseResult, finding: Finding) -> Iterator[dict[str, Any]]:
    """Every verdict, and every check that gave none."""
    common = {
        "target": finding.target,
        "test": _name(phase),
        "outcome": phase.outcome,
        "seconds": round(phase.seconds, 3),
    }
    for evidence in finding.evidence:
        yield {**common, **evidence.as_dict(), **_answers(evidence)}
    for check, reason in finding.not_judged:
        yield {**common, "check": check, "not_judged": reason}


def _answers(evidence: Evidence) -> dict[str, Any]:
    """What became of the answer to each sample, by the sample's digest, where a check asked."""
    found = dict(str(pair).split(" ") for pair in evidence.data.get(ANSWERS, ()))
    return {ANSWERS: found} if found else {}


def _error(phase: PhaseResult) -> dict[str, Any]:
    """What failed without a verdict, and its first line."""
    finding = phase.data.finding
    target, check = (None, None) if finding is None else (finding.target, finding.check)
    return {"target": target, "test": _name(phase), "when": phase.when, "check": check, "text": phase.error}


def _fault(verdict: FaultVerdict | None) -> dict[str, Any] | None:
    return None if verdict is None else {**asdict(verdict.fault), "state": verdict.state, "also": verdict.also}


def _seconds_by_test(results: RunResults) -> list[dict[str, Any]]:
    seconds: dict[tuple[str | None, str], dict[str, float]] = {}
    for phase, finding in results.findings:
        if phase.when in ("setup", "call", "teardown"):  # not the report of a worker that crashed
            seconds.setdefault((finding.target, _name(phase)), {})[phase.when] = round(phase.seconds, 3)
    return [{"target": target, "test": test, **by_phase} for (target, test), by_phase in seconds.items()]


def _name(phase: PhaseResult) -> str:
    return phase.test.rsplit("::", 1)[-1]


def _vram(processes: Sequence[ProcessResults]) -> dict[str, Any]:
    """VRAM of the one process that ran the tests; of each, by name, where it started others for that."""
    found = [
        {
            **({"process": one.process} if one.process else {}),
            "session": one.session.as_dict(),
            "phases": [usage.as_dict() for usage in one.phases],
        }
        for one in processes
    ]
    started = [one for one in found if "process" in one]
    return {"processes": started} if started else next(iter(found), {})
