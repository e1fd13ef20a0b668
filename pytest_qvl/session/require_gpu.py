"""``--qvl-require-gpu``: where a GPU is promised, a skipped GPU test is an error; so is a run without any.

A GPU test counts as executed if its body ran and torch gave out memory on CUDA between the beginning of its setup and
the end of its body, in the process that ran it. The mark alone proves nothing: a test may carry it and never touch a
GPU. (Work in place on tensors that were there before, and in processes that a test starts, is not seen.)
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from pytest_qvl.evidence import CannotJudge
from pytest_qvl.report.report_data import add_to_report
from pytest_qvl.session.findings import skip_reason
from pytest_qvl.session.keys import GIVEN_OUT_KEY

if TYPE_CHECKING:
    from collections.abc import Generator

    from pytest_qvl.report.run_results import ResultsBuilder


def given_out_on_cuda() -> int:
    """Bytes that torch has ever given out on CUDA in this process, over all devices; neither imports nor starts it."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    if cuda is None or not cuda.is_initialized():
        return 0
    stats = map(cuda.memory_stats_as_nested_dict, range(cuda.device_count()))
    return sum(one["allocated_bytes"]["all"]["allocated"] for one in stats)


class GpuRequired:
    """Turns skipped GPU tests, and a run without any, into errors; registered only with ``--qvl-require-gpu``.

    Args:
        builder: Has the results of the run, and takes the verdict.
    """

    def __init__(self, builder: ResultsBuilder) -> None:
        self._builder = builder
        self._ran = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Note how much was allocated before the first fixture."""
        item.stash[GIVEN_OUT_KEY] = given_out_on_cuda()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        """Note that tests are run; where they are only listed (``--collect-only``) or set up, none is required."""
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
        if on_gpu and call.when == "call" and (not report.skipped or hasattr(report, "wasxfail")):
            add_to_report(report, ran_on_cuda=given_out_on_cuda() != item.stash[GIVEN_OUT_KEY])
        if not on_gpu or not report.skipped or hasattr(report, "wasxfail"):
            return report
        judged = call.excinfo is not None and isinstance(call.excinfo.value.__cause__, CannotJudge)
        if judged or item.get_closest_marker("skip") is not None:
            return report
        report.outcome = "failed"
        report.longrepr = f"--qvl-require-gpu: a GPU test was skipped: {skip_reason(report)}"
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail a run in which no test ran on a GPU."""
        if hasattr(session.config, "workerinput") or not self._ran:
            return
        on_cuda = [phase.data.ran_on_cuda for phase in self._builder.results().phases]
        if True not in on_cuda:
            idle = on_cuda.count(False)
            said = f": {idle} marked gpu ran and allocated nothing on CUDA" if idle else ""
            self._builder.add_problem(f"--qvl-require-gpu: no GPU test was executed{said}")
