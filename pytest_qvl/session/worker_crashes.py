"""An xdist worker that died in the middle of a test sends no finding: here its report gets one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from pytest_qvl.report.report_data import Finding, add_to_report
from pytest_qvl.session.suite_collection import FOLDER, check_of
from pytest_qvl.session.targets import target_in

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_qvl.options import Settings
    from pytest_qvl.report.run_results import ResultsBuilder

    Location = tuple[str, int | None, str]


class WorkerCrashes:
    """Adds the lost check to xdist's report of a crash; does its work in the controller.

    Args:
        settings: Of this run.
        rootdir: What locations of tests start from.
        builder: Has the results of the run: of phases that were over before the crash, on which model they ran.
    """

    def __init__(self, settings: Settings, rootdir: Path, builder: ResultsBuilder) -> None:
        self._settings = settings
        self._rootdir = rootdir
        self._builder = builder
        self._running: dict[str, Location] = {}

    def pytest_runtest_logstart(self, nodeid: str, location: Location) -> None:
        """Note where a test is: a report of a crash does not say."""
        self._running[nodeid] = location

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Forget a test that came to its end."""
        self._running.pop(nodeid, None)

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport) -> None:
        """Put on xdist's report of a crash what the promises have to know: the check that was lost, and of which model.

        A crash of a user's own test is a failed test, and no more: nobody misses a verdict.
        """
        location = self._running.pop(crashitem, None)
        if location is None or not self._is_shipped(location):
            return
        before = [finding for phase, finding in self._builder.results().findings if phase.test == crashitem]
        known = before[-1] if before else crashed_in_setup(location[2], self._settings)
        add_to_report(report, finding=replace(known, evidence=(), not_judged=(), skipped=None))

    def _is_shipped(self, location: Location) -> bool:
        return (self._rootdir / location[0]).resolve().is_relative_to(FOLDER)


def crashed_in_setup(test: str, settings: Settings) -> Finding:
    """What is known of a test of the suite by its name and parameters alone."""
    name, _, parameters = test.partition("[")
    target = target_in(parameters.rpartition("]")[0], settings)
    check = check_of(name)
    if target is None:
        return Finding(None, None, None, check)
    return Finding(str(target), target.subject, target.backend, check)
