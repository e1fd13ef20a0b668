"""``--qvl-require-gpu``: where a GPU is promised, a skipped GPU test is an error; so is a run without any."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_qvl.evidence import CannotJudge
from pytest_qvl.outcome import skip_reason

if TYPE_CHECKING:
    from collections.abc import Generator


class GpuRequired:
    """Registered only when the switch is on."""

    def __init__(self) -> None:
        self._executed = 0
        self._ran = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        """Tests are about to run; listing options, ``--collect-only`` and ``--setup-plan`` ask for none."""
        options = session.config.option
        self._ran = not (options.collectonly or getattr(options, "setuponly", False))
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Turn the skip of a GPU test into a failure with its reason."""
        report = yield
        on_gpu = item.get_closest_marker("gpu") is not None
        report.qvl_gpu = on_gpu  # type: ignore[attr-defined]
        if not on_gpu or not report.skipped or hasattr(report, "wasxfail"):
            return report
        judged = call.excinfo is not None and isinstance(call.excinfo.value.__cause__, CannotJudge)
        if judged or item.get_closest_marker("skip") is not None:
            return report
        report.outcome = "failed"
        report.longrepr = f"--qvl-require-gpu: a GPU test was skipped: {skip_reason(report)}"
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count what ran, over all workers."""
        executed = report.when == "call" and (not report.skipped or hasattr(report, "wasxfail"))
        self._executed += executed and getattr(report, "qvl_gpu", False)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A green run without a GPU test is not what was asked for."""
        if hasattr(session.config, "workerinput"):
            return
        if self._without_gpu and session.exitstatus in (
            pytest.ExitCode.OK,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        ):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Say so."""
        if self._without_gpu:
            terminalreporter.line("qvl: --qvl-require-gpu: no GPU test was executed", red=True, bold=True)

    @property
    def _without_gpu(self) -> bool:
        return self._ran and self._executed == 0
