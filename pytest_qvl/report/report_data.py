"""What this package adds to a test's report: one typed object, kept on the report as plain data.

xdist and the processes of backends send reports as JSON or by execnet, which know lists, dicts and numbers only, so a
report carries :meth:`ReportData.as_dict` under one attribute; :func:`report_data` reads it and nothing else does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pytest_qvl.evidence import Evidence

if TYPE_CHECKING:
    import pytest

ATTRIBUTE = "qvl"
Kind = Literal["out of memory", "broken", "not run"]
EXPECTED_TO_FAIL = "expected to fail: "
CheckReason = tuple[str, str]  # check, and why it gave no verdict


@dataclass(frozen=True)
class Finding:
    """What one phase of a test found out about a model.

    Attributes:
        target: Model, device and backend, as reports name them, and the parameters of a user's fixtures that the suite
            runs with; ``None`` for a test without a model.
        subject: What several backends have in common: model, device and those parameters.
        backend: How the model was loaded.
        check: The check that a test of the shipped suite calls; ``None`` for a user's own test.
        evidence: Verdicts of the checks it called.
        not_judged: Check and reason, where a check could not decide.
        skipped: Why the test was skipped, where that is this package's affair.
    """

    target: str | None
    subject: str | None
    backend: str | None
    check: str | None
    evidence: tuple[Evidence, ...] = ()
    not_judged: tuple[CheckReason, ...] = ()
    skipped: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        evidence = [{**one.as_dict(), "data": one.data} for one in self.evidence]
        return {**vars(self), "evidence": evidence, "not_judged": [list(pair) for pair in self.not_judged]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Finding:
        """Inverse of :meth:`as_dict`."""
        evidence = tuple(map(Evidence.from_dict, data["evidence"]))
        not_judged = tuple((check, reason) for check, reason in data["not_judged"])
        return cls(**{**data, "evidence": evidence, "not_judged": not_judged})


@dataclass(frozen=True)
class LimitOutcome:
    """What became of one limit on VRAM.

    Attributes:
        test: Node id.
        limit: Bytes.
        of: The number bounded.
        scope: What was measured.
        value: Bytes; ``None`` where nothing was measured.
        reason: Why nothing was measured.
        marked: Whether a mark on the test set the limit.
    """

    test: str
    limit: int
    of: str
    scope: str
    value: int | None
    reason: str
    marked: bool

    @property
    def held(self) -> bool:
        """Whether it was measured and is within the limit."""
        return self.value is not None and self.value <= self.limit


@dataclass(frozen=True)
class GpuFailure:
    """A failure of the GPU, not of what a test asserts.

    Attributes:
        kind: What happened.
        text: What was found, in one sentence.
        by: The test that broke CUDA; empty where memory ran out.
    """

    kind: Kind
    text: str
    by: str = ""


@dataclass(frozen=True)
class ReportData:
    """All that this package puts on one report.

    Attributes:
        finding: What was found out about a model; ``None`` for a test that has nothing to do with one.
        limits: What became of limits on VRAM.
        ran_on_cuda: Whether torch gave out memory on CUDA; ``None`` where nobody asked.
        gpu_failure: What happened to the GPU.
        session_verdict: Set on a report of a verdict on the session, which is no test's: the word for it in the
            short summary.
    """

    finding: Finding | None = None
    limits: tuple[LimitOutcome, ...] = ()
    ran_on_cuda: bool | None = None
    gpu_failure: GpuFailure | None = None
    session_verdict: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "finding": None if self.finding is None else self.finding.as_dict(),
            "limits": [asdict(outcome) for outcome in self.limits],
            "ran_on_cuda": self.ran_on_cuda,
            "gpu_failure": None if self.gpu_failure is None else asdict(self.gpu_failure),
            "session_verdict": self.session_verdict,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ReportData:
        """Inverse of :meth:`as_dict`."""
        finding, failure = data["finding"], data["gpu_failure"]
        return cls(
            None if finding is None else Finding.from_dict(finding),
            tuple(LimitOutcome(**outcome) for outcome in data["limits"]),
            data["ran_on_cuda"],
            None if failure is None else GpuFailure(**failure),
            data["session_verdict"],
        )


def report_data(report: pytest.TestReport) -> ReportData:
    """What a report carries; empty for one that carries nothing."""
    data = getattr(report, ATTRIBUTE, None)
    return ReportData() if data is None else ReportData.from_dict(data)


def why_skipped(report: pytest.TestReport) -> str:
    """Why a skipped test was skipped, as pytest says it ("Skipped: …"), or expected to fail."""
    if hasattr(report, "wasxfail"):  # its longrepr is the traceback
        reason = report.wasxfail.removeprefix("reason: ")
        return f"{EXPECTED_TO_FAIL}{reason}" if reason else EXPECTED_TO_FAIL.removesuffix(": ")
    return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)


def add_to_report(report: pytest.TestReport, **fields: Any) -> None:
    """Set fields of a report's :class:`ReportData`, and leave the others as they are."""
    vars(report)[ATTRIBUTE] = replace(report_data(report), **fields).as_dict()
