"""Out of memory, and CUDA broken for good: verdicts of their own, so that one test does not drag the rest along.

A test that runs out of memory reports how much was asked for, in which phase, and who else holds the card; what its
frames hold is released before the next test. After work that broke CUDA every later call in the process fails, so its
GPU tests are not run, and say whose doing it is.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from pytest_qvl.report.report_data import GpuFailure, Kind, add_to_report
from pytest_qvl.session.errors import CudaUnusable
from pytest_qvl.session.gpu_access import is_gpu
from pytest_qvl.session.keys import OUT_OF_MEMORY_KEY
from pytest_qvl.session.process_gpu import others_on
from pytest_qvl.session.tracebacks import release_frames
from pytest_qvl.vram.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Generator

    from pytest_qvl.session.gpu_access import GpuAccess
    from pytest_qvl.vram.meter import Meter

ASKED = re.compile(r"Tried to allocate (\d[\d.]* [KMGT]?i?B)")
# The driver's own refusals, which torch's allocator does not see; CUDA works on after them.
OTHER_REFUSALS = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
SECTION = "GPU"


class GpuFailures:
    """Recognises out-of-memory errors and broken CUDA in failed tests; registered in every process.

    Args:
        access: The way to the GPU.
        meter: The one meter of this process.
    """

    def __init__(self, access: GpuAccess, meter: Meter) -> None:
        self._access, self._meter = access, meter

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Put the verdict on the report of the failure."""
        report = yield
        error = None if call.excinfo is None else call.excinfo.value
        if isinstance(error, CudaUnusable):
            _mark(report, "not run", str(error), by=error.by)
        elif self._just_broken(item, call.when):
            text = f"{item.nodeid} broke CUDA ({call.when}): {self._access.broken}"
            _conclude(report, f"{text}; no later GPU test of this process can run")
            _mark(report, "broken", text, by=item.nodeid)
        elif error is not None and ran_out(error):
            if call.when == "teardown":
                release_frames(error)
            else:
                item.stash.setdefault(OUT_OF_MEMORY_KEY, []).append(error)
            if report.failed:
                text = self._describe_out_of_memory(error, call.when)
                _conclude(report, text)
                _mark(report, "out of memory", text)
        return report

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        """Before teardown and the next test: release what a failed allocation left in frames and cache."""
        errors = item.stash.get(OUT_OF_MEMORY_KEY, [])
        for error in errors:
            release_frames(error)
        if errors:
            errors.clear()
            self._meter.reclaim("after running out of memory")
        return (yield)

    def _just_broken(self, item: pytest.Item, when: str) -> bool:
        if self._access.breaker or not is_gpu(item):
            return False
        return self._access.note_broken(item.nodeid, f"in {item.nodeid} ({when})")

    def _describe_out_of_memory(self, error: BaseException, when: str) -> str:
        phase = getattr(error, "qvl_phase", "")
        asked = ASKED.search(str(error))
        alive = self._meter.alive()
        uuid = self._access.gpu.uuid()
        others = others_on(uuid) if uuid else ""
        return "; ".join(
            [
                f"out of GPU memory in {f'phase {phase!r}' if phase else when}"
                + (f": {asked[1]} were asked for" if asked else ""),
                *([f"torch holds {format_bytes(alive.reserved)} of the card"] if alive else []),
                f"other processes hold {others}" if others else "no other process is known to hold any of it",
            ]
        )


def ran_out(error: BaseException) -> bool:
    """Whether an exception, or what it was explicitly raised from, is an allocation that failed on the GPU."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        text = str(cause)
        if type(cause).__name__ == "OutOfMemoryError" or any(refusal in text for refusal in OTHER_REFUSALS):
            return True
        seen.append(cause)
        cause = cause.__cause__
    return False


def _conclude(report: pytest.TestReport, text: str) -> None:
    """Make a verdict the failure's message (in the short summary, in JUnit's file); its traceback stays."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if report.failed and crash is not None:
        crash.message = text
        report.sections.append((SECTION, text))
    else:
        report.outcome, report.longrepr = "failed", text
        vars(report).pop("wasxfail", None)


def _mark(report: pytest.TestReport, kind: Kind, text: str, by: str = "") -> None:
    add_to_report(report, gpu_failure=GpuFailure(kind, text, by))
