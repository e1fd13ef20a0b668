"""Collecting the shipped suite, whatever a user's ini says about collection."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_qvl.session import fixture_graph

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

PACKAGE = "pytest_qvl.suite"
FOLDER = Path(__file__).parents[1] / "suite"


class OverrideWarning(pytest.PytestWarning):
    """A conftest overrides a fixture of this package without reaching the suite."""


def is_shipped(item: pytest.Item | pytest.Collector) -> bool:
    """Whether a test is one of the shipped suite."""
    return item.path.is_relative_to(FOLDER)


def check_name(item: pytest.Item) -> str:
    """The check that a shipped test calls."""
    return check_of(getattr(item, "originalname", item.name))


def check_of(test: str) -> str:
    """``test_feature_scatter`` and ``test_feature_scatter_in_training`` call ``feature_scatter``."""
    from pytest_qvl.promises import PROMISES

    name = test.removeprefix("test_")
    checks = (check for promise in PROMISES for check in promise.checks)
    return max((check for check in checks if f"{name}_".startswith(f"{check}_")), key=len, default=name)


class SuiteModule(pytest.Module):
    """A module of the suite; ``python_functions`` and ``python_classes`` are about the user's own tests."""

    def funcnamefilter(self, name: str) -> bool:
        """Which functions are tests."""
        return name.startswith("test_")

    def classnamefilter(self, name: str) -> bool:
        """Which classes hold tests."""
        return name.startswith("Test")


class ShippedSuite:
    """Collects the suite under any ini, and warns of overrides that do not reach it."""

    def __init__(self) -> None:
        self._unreached: list[str] = []
        self._first: pytest.Item | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_file(self, file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        """Collect modules of the suite that the user's ``python_files`` passes over."""
        if file_path.parent != FOLDER or not file_path.name.startswith("test_"):
            return None
        if parent.session.isinitpath(file_path):
            return None
        if any(file_path.match(pattern) for pattern in parent.config.getini("python_files")):
            return None
        return SuiteModule.from_parent(parent, path=file_path)

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makemodule(self, module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
        """Make modules of the suite that know which of their functions are tests."""
        if module_path.parent != FOLDER:
            return None
        return SuiteModule.from_parent(parent, path=module_path)

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(
        self, collector: pytest.Collector
    ) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        """A suite that turns out empty is an error of collection, not a green run.

        What ``-k``, ``-m`` and ``--deselect`` take away is still there at this point; ``--lf`` passes over whole
        files before.
        """
        report = yield
        ours = isinstance(collector, SuiteModule) or collector.path == FOLDER
        if ours and report.passed and not report.result and not collector.config.getoption("lf", False):
            report.outcome = "failed"
            report.longrepr = (
                f"{PACKAGE}: nothing was collected here, so nothing would be proved; look for what narrows "
                "collection: --ignore, --ignore-glob, collect_ignore in a conftest.py, a plugin"
            )
        return report

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Look for overrides that were meant for the suite and do not reach it."""
        shipped = [item for item in session.items if is_shipped(item)]
        if shipped:
            self._first = shipped[0]
            self._unreached = unreached_overrides(session.items, shipped)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Warn once, at the first test of the suite, so that ``-W error`` is an error of a test."""
        if item is self._first:
            for override in self._unreached:
                item.warn(OverrideWarning(override))


def unreached_overrides(items: Sequence[pytest.Item], shipped: Sequence[pytest.Item]) -> list[str]:
    """One sentence per override in a conftest that other tests of this run see but the suite does not."""
    seen_by_suite = {id(d) for item in shipped for d in _overrides(item)}
    found: dict[int, str] = {}
    for item in items:
        for definition in _overrides(item):
            file = Path(definition.func.__code__.co_filename)
            if id(definition) not in seen_by_suite and file.name == "conftest.py":
                found[id(definition)] = (
                    f"{file} overrides {definition.argname} for the tests below it, but not for {PACKAGE}; "
                    "move the override to the conftest.py of the rootdir, or into a module given with -p"
                )
    return list(found.values())


def _overrides(item: pytest.Item) -> list[fixture_graph.Definition]:
    return [
        definition
        for name in sorted(fixture_graph.fixture_names(item))
        if fixture_graph.is_ours(name)
        for definition in fixture_graph.definitions(item, name)
    ]
