"""All that one run found out, as one typed object: the terminal, the record and every other report read only that.

:class:`ResultsBuilder` is the one listener to reports of tests that records anything; whoever else listens acts on
what it hears (a backend's process sends it on). ``config.stash[RESULTS_KEY].results()`` (in
:mod:`pytest_qvl.session.keys`) is what has been found out so far; at the end of the session, all of it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING

from pytest_qvl.report.report_data import EXPECTED_TO_FAIL, ReportData, report_data, why_skipped

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pytest

    from pytest_qvl.evidence import Evidence
    from pytest_qvl.report.injected_fault import FaultVerdict, InjectedFault
    from pytest_qvl.report.process_results import KnownFailureState, ProcessResults, SeenProbe, Subject, Verdict
    from pytest_qvl.report.report_data import CheckReason, Finding, GpuFailure, LimitOutcome
    from pytest_qvl.report.states import PromiseState

OWN_MODELS = "models of the tests' own"
XPASS = "[XPASS(strict)]"  # how pytest begins the report of a test that was to fail and passed


@dataclass(frozen=True)
class PhaseResult:
    """What became of one phase of one test, or of a file that could not be collected.

    Attributes:
        test: Node id.
        when: ``setup``, ``call`` or ``teardown``; ``collect`` for a file; something else where no phase was to blame.
        outcome: ``passed``, ``failed`` or ``skipped`` (as an expected failure is).
        seconds: How long it took.
        skipped: Why it was skipped, as pytest says it, or expected to fail; empty where it was not.
        error: First line of what failed; empty where nothing did.
        data: What this package found out about it.
    """

    test: str
    when: str
    outcome: str
    seconds: float
    skipped: str
    error: str
    data: ReportData

    @property
    def failed(self) -> bool:
        """Whether it failed, for whatever reason."""
        return self.outcome == "failed"

    @property
    def is_error(self) -> bool:
        """Whether it failed without a broken verdict of a check: its reason is in :attr:`error` alone."""
        return self.failed and (self.data.finding is None or all(one.ok for one in self.data.finding.evidence))

    @classmethod
    def of(cls, report: pytest.TestReport) -> PhaseResult:
        """What a report says."""
        reason = why_skipped(report) if report.skipped else ""
        error = _first_line(report, str(report.when))
        return cls(report.nodeid, str(report.when), report.outcome, report.duration, reason, error, report_data(report))

    @classmethod
    def of_collection(cls, report: pytest.CollectReport) -> PhaseResult:
        """What the report on a file says that could not be collected."""
        # Of a module that cannot be imported, pytest has a text alone, in which the exception comes last.
        lines = [line[1:].strip() for line in str(report.longrepr).splitlines() if line.startswith("E ")]
        error = lines[-1] if lines else _first_line(report, "collect")
        return cls(report.nodeid, "collect", "failed", 0.0, "", error, ReportData())


def _first_line(report: pytest.TestReport | pytest.CollectReport, otherwise: str) -> str:
    """First line of what failed, or the other text where it said nothing; empty where nothing failed."""
    if not report.failed:
        return ""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = (str(report.longrepr) if crash is None else crash.message).strip()
    return text.splitlines()[0] if text else otherwise


@dataclass(frozen=True)
class TargetResults:
    """What was found out about one model on one device, by the suite or by a user's own tests.

    Attributes:
        evidence: Verdicts of checks.
        not_judged: Check and reason, where a check could not decide.
        errors: Check and first line, where a test of the suite failed without a verdict.
        skipped: Check and reason, where a test was skipped.
        seconds: Time in setup, call and teardown.
    """

    evidence: tuple[Evidence, ...] = ()
    not_judged: tuple[CheckReason, ...] = ()
    errors: tuple[CheckReason, ...] = ()
    skipped: tuple[CheckReason, ...] = ()
    seconds: float = 0.0

    @classmethod
    def of(cls, phases: Sequence[tuple[PhaseResult, Finding]]) -> TargetResults:
        """Put together what phases of tests found out about one model."""
        return cls(
            # A broken promise that a passing test expected (with pytest.raises, or xfail) is no finding.
            tuple(one for phase, found in phases for one in found.evidence if phase.failed or one.ok),
            tuple(reason for _, found in phases for reason in found.not_judged),
            tuple((found.check, phase.error) for phase, found in phases if found.check is not None and phase.is_error),
            tuple(
                (found.check or "", found.skipped)
                for phase, found in phases
                if phase.outcome == "skipped" and found.skipped is not None
            ),
            sum(phase.seconds for phase, _ in phases),
        )

    def promises(self) -> list[PromiseState]:
        """The state of every promise."""
        from pytest_qvl.report.states import promise_states

        return promise_states(self.evidence, self.errors, self.not_judged, self.skipped)


@dataclass(frozen=True)
class RunResults:
    """All that one run found out, over all its processes.

    Attributes:
        started: When the session began.
        seconds: How long ago that was.
        exit_status: Of the process; ``None`` while it may still change.
        phases: What became of every phase of every test, and of each file that could not be collected, in the order of
            reports. What a check measured (figures,
            notes, tables, logits as numbers in ``Evidence.data``) is in :attr:`findings`.
        processes: What every process that ran tests says of its session: verdicts, leases, VRAM by phase.
        problems: What went wrong outside any test, one sentence each: a backend's process that died, no GPU where one
            was required.
        fault: What ``--qvl-fault`` damaged; ``None`` for a run on what was given.
    """

    started: datetime
    seconds: float
    exit_status: int | None
    phases: tuple[PhaseResult, ...] = ()
    processes: tuple[ProcessResults, ...] = ()
    problems: tuple[str, ...] = ()
    fault: InjectedFault | None = None

    @cached_property
    def tests(self) -> Mapping[str, int]:
        """Number of tests by outcome; ``error`` is a failure outside a test's body."""
        counts: Counter[str] = Counter()
        for phase in self.phases:
            if phase.when == "call" or phase.outcome != "passed":
                outside = phase.when != "call" and phase.outcome != "skipped"
                counts["error" if outside else phase.outcome] += 1
        return dict(counts)

    @cached_property
    def skipped(self) -> Mapping[str, int]:
        """Number of skipped tests by reason."""
        return dict(Counter(phase.skipped for phase in self.phases if phase.outcome == "skipped"))

    @cached_property
    def suite(self) -> Mapping[str, TargetResults]:
        """What the shipped suite found out, by target."""
        return self._by_target(shipped=True)

    @cached_property
    def own(self) -> Mapping[str, TargetResults]:
        """What a user's own tests found out, by target."""
        return self._by_target(shipped=False)

    @cached_property
    def findings(self) -> tuple[tuple[PhaseResult, Finding], ...]:
        """What was found out about models, and in which phase of which test."""
        return tuple((phase, phase.data.finding) for phase in self.phases if phase.data.finding is not None)

    @property
    def errors(self) -> tuple[PhaseResult, ...]:
        """What failed without a broken verdict, in tests and in collection."""
        return tuple(phase for phase in self.phases if phase.is_error)

    @property
    def limits(self) -> tuple[LimitOutcome, ...]:
        """What became of every limit on VRAM."""
        found = [limit for phase in self.phases for limit in phase.data.limits]
        return (*found, *(limit for process in self.processes for limit in process.limits))

    @property
    def gpu_failures(self) -> tuple[tuple[PhaseResult, GpuFailure], ...]:
        """What happened to the GPU, and in which phase of which test."""
        return tuple((phase, phase.data.gpu_failure) for phase in self.phases if phase.data.gpu_failure is not None)

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """All processes' verdicts on their sessions."""
        return tuple(verdict for process in self.processes for verdict in process.verdicts)

    @property
    def probes(self) -> tuple[SeenProbe, ...]:
        """What models saw and said, where a report is asked for."""
        return tuple(probe for process in self.processes for probe in process.probes)

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """What each target's tests were run on, put together from all processes."""
        found: dict[str, Subject] = {}
        for one in (subject for process in self.processes for subject in process.subjects):
            found[one.target] = found.get(one.target, one).with_facts(vars(one))
        return tuple(found.values())

    @property
    def known_failures(self) -> Mapping[str, KnownFailureState]:
        """What became of every known failure, by the reason that is expected."""
        found: dict[str, KnownFailureState] = {}
        for expected, state in (pair for process in self.processes for pair in process.known):
            if found.get(expected, "unmatched") == "unmatched":  # one process may have other tests than another
                found[expected] = state
        for expected in found:
            if any(phase.error == f"{XPASS} {expected}" for phase in self.phases):
                found[expected] = "stale"
            elif any(phase.skipped == f"{EXPECTED_TO_FAIL}{expected}" for phase in self.phases):
                found[expected] = "as expected"
        return found

    @property
    def fault_verdict(self) -> FaultVerdict | None:
        """Which checks noticed the fault that was made; ``None`` where none was."""
        if self.fault is None:
            return None
        noticed: dict[str, bool] = {}
        for phase, found in self.findings:
            if found.check is None or phase.when != "call":
                continue
            if phase.outcome != "skipped" or found.not_judged:  # a fault that cannot be made here proves nothing
                # A known failure that has not failed is red, but its check has noticed nothing.
                failed = phase.failed and not phase.error.startswith(XPASS)
                noticed[found.check] = noticed.get(found.check, False) or failed
        return self.fault.verdict(noticed)

    def _by_target(self, *, shipped: bool) -> dict[str, TargetResults]:
        phases: dict[str, list[tuple[PhaseResult, Finding]]] = {}
        for phase, finding in self.findings:
            if (finding.check is not None) == shipped:
                phases.setdefault(finding.target or OWN_MODELS, []).append((phase, finding))
        return {target: TargetResults.of(found) for target, found in phases.items()}


class ResultsBuilder:
    """Listens to reports; complete in the process that was started. Register it as a plugin.

    Attributes:
        known: What this process made of each known failure when it collected, by the reason that is expected.
    """

    def __init__(self) -> None:
        self._started = datetime.now(UTC)
        self._phases: list[PhaseResult] = []
        self._processes: list[ProcessResults] = []
        self._problems: list[str] = []
        self._fault: InjectedFault | None = None
        self.known: dict[str, KnownFailureState] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take in one phase of a test; a verdict on the session is no test's, and comes with its process."""
        phase = PhaseResult.of(report)
        if phase.data.session_verdict is None:
            self._phases.append(phase)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Take in a file that could not be collected."""
        if report.failed:
            self._phases.append(PhaseResult.of_collection(report))

    def add_process(self, results: ProcessResults) -> None:
        """Take in what a process says of its session."""
        self._processes.append(results)

    def add_problem(self, sentence: str) -> None:
        """Take in what went wrong outside any test; it turns a green run red."""
        self._problems.append(sentence)

    def set_fault(self, fault: InjectedFault) -> None:
        """Take in what is damaged on purpose in this run."""
        self._fault = fault

    def results(self, exit_status: int | None = None) -> RunResults:
        """All that has been found out so far; a later report does not change it.

        Args:
            exit_status: Of the process, once it is known.
        """
        seconds = (datetime.now(UTC) - self._started).total_seconds()
        parts = tuple(self._phases), tuple(self._processes), tuple(self._problems)
        return RunResults(self._started, seconds, exit_status, *parts, self._fault)
