"""What a test found out, taken from the test to its report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from pytest_qvl.evidence import CannotJudge, CheckFailed, Evidence, InputError, ModelCrashed, collecting, printable
from pytest_qvl.report.report_data import Finding, add_to_report, why_skipped
from pytest_qvl.report.run_results import OWN_MODELS
from pytest_qvl.session import fixture_graph
from pytest_qvl.session.suite_collection import check_name, is_shipped
from pytest_qvl.session.targets import FIXTURE, NEEDS_CUDA, target_of

CHECKS = "pytest_qvl.checks"
_HIDDEN = (CHECKS, "pytest_qvl.evidence", "pytest_qvl.models", "pytest_qvl.samples")
_IN_WORDS = (CheckFailed, InputError)


@dataclass
class Outcome:
    """What one phase of a test found out.

    Attributes:
        evidence: Verdicts of the checks it called.
        not_judged: Check and reason, where a check could not decide.
    """

    evidence: list[Evidence] = field(default_factory=list)
    not_judged: list[tuple[str, str]] = field(default_factory=list)


OUTCOME_KEY = pytest.StashKey[Outcome]()


@contextmanager
def judging(item: pytest.Item) -> Iterator[None]:
    """Collect evidence; a check that cannot judge becomes a skip with its reason."""
    outcome = item.stash[OUTCOME_KEY] = Outcome()
    with collecting() as collected:
        outcome.evidence = collected
        try:
            yield
        except CannotJudge as reason:
            outcome.not_judged.append((_check_in(reason, item), str(reason)))
            raise pytest.skip.Exception(printable(f"not judged: {reason}"), _use_item_location=True) from reason


def _check_in(reason: CannotJudge, item: pytest.Item) -> str:
    """The check that could not judge: the outermost one that the exception went through."""
    trace = reason.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        module = trace.tb_frame.f_globals.get("__name__", "")
        if module.startswith(CHECKS) and _is_check(code.co_name):
            return code.co_name
        trace = trace.tb_next
    return check_name(item)


@contextmanager
def trim_traceback(config: pytest.Config, excinfo: pytest.ExceptionInfo[BaseException] | None) -> Iterator[None]:
    """Let a report end the traceback of a check where the test called it, except with ``--full-trace``.

    Where the model crashed or an argument is wrong, the message says all there is to know: by default neither the
    test's fixtures nor the exception behind it are shown then; with ``--tb=long`` or ``--tb=native`` both are.
    """
    if excinfo is None or not isinstance(excinfo.value, _IN_WORDS):
        yield
        return
    for entry in excinfo.traceback:
        names = entry.frame.f_globals
        if names.get("__name__", "").startswith(_HIDDEN):
            names.setdefault("__tracebackhide__", _is_check_failure)
    style = config.getoption("tbstyle", "auto")
    if not isinstance(excinfo.value, ModelCrashed | InputError) or style in ("long", "native"):
        yield
        return
    error, cause, suppressed = excinfo.value, excinfo.value.__cause__, excinfo.value.__suppress_context__
    config.option.tbstyle = "short" if style == "auto" else style
    error.__cause__ = None  # which suppresses the context, too
    try:
        yield
    finally:
        config.option.tbstyle = style
        error.__cause__, error.__suppress_context__ = cause, suppressed


def _is_check_failure(excinfo: pytest.ExceptionInfo[BaseException]) -> bool:
    """Whether an exception's message tells all there is to know: not where a check itself has a bug."""
    return isinstance(excinfo.value, _IN_WORDS)


def attach(item: pytest.Item, report: pytest.TestReport) -> None:
    """Put what was found out on the report."""
    target = target_of(item)
    shipped = is_shipped(item)
    found = item.stash.get(OUTCOME_KEY, Outcome())
    item.stash[OUTCOME_KEY] = Outcome()
    if target is None and not shipped and not (found.evidence or found.not_judged):
        return
    reason = skip_reason(report) if report.skipped and not found.not_judged else ""
    variant = _variant(item) if shipped else ""
    finding = Finding(
        target=target_name(item),
        subject=_named(None if target is None else target.subject, variant),
        backend=None if target is None else target.backend,
        check=check_name(item) if shipped else None,
        evidence=tuple(found.evidence),
        not_judged=tuple(found.not_judged),
        # In a user's own test, every other skip is the test's own affair.
        skipped=reason if shipped or reason.startswith(NEEDS_CUDA) else None,
    )
    add_to_report(report, finding=finding)
    # JUnit's file takes the properties from the report of the teardown, which comes after this.
    item.user_properties += [(f"qvl_{one.check}", _said(one)) for one in found.evidence]
    if report.failed:
        _point_to_explanations(report, finding)


def _said(evidence: Evidence) -> str:
    """State and weakest figure of a verdict, for those who read JUnit's properties."""
    return printable(f"{evidence.state}: {evidence.worst}" if evidence.worst else evidence.state)


def _point_to_explanations(report: pytest.TestReport, finding: Finding) -> None:
    """Name the command that explains each broken check, below the failure."""
    from pytest_qvl.report.states import checks_to_explain  # it reads all checks' declarations

    known = [f"pytest-qvl explain {check}" for check in checks_to_explain(finding)]
    if known:
        report.sections.append(("usual causes and fixes", "\n".join(known)))


def _is_check(name: str) -> bool:
    from pytest_qvl.promises import promise_number

    return promise_number(name) is not None


def target_name(item: pytest.Item) -> str | None:
    """The target of a test as findings name it, with the parameters of a user's fixtures that the suite runs with."""
    target = target_of(item)
    return _named(None if target is None else str(target), _variant(item) if is_shipped(item) else "")


def _variant(item: pytest.Item) -> str:
    """With which parameters of a user's fixtures a test of the suite runs, such as ``qvl_adapter first``."""
    parameters = {name: shown for name, shown in fixture_graph.fixture_parameters(item).items() if name != FIXTURE}
    # Where it has no name of its own, pytest calls a parameter by the fixture's and a number.
    return ", ".join(shown if shown.startswith(name) else f"{name} {shown}" for name, shown in parameters.items())


def _named(target: str | None, variant: str) -> str | None:
    return f"{target or OWN_MODELS}, {variant}" if variant else target


def skip_reason(report: pytest.TestReport) -> str:
    """Why a test was skipped."""
    return why_skipped(report).removeprefix("Skipped: ")
