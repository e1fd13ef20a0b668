"""The run compared with an earlier record (``--qvl-compare``): what changed, and an exit status that says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_qvl.records.base import base_record
from pytest_qvl.records.compare import Comparison, compare
from pytest_qvl.records.compare_output import as_text, one_line
from pytest_qvl.records.stored import RecordError
from pytest_qvl.report.folding import write_folded

if TYPE_CHECKING:
    from pytest_qvl.report.record import RunRecord


class BaseComparison:
    """Compares when the session has been judged; register it as a plugin, in the process that was started.

    Args:
        base: A record's file, or ``shipped``.
        run: What is compared; it is told what was found, for reports.

    Attributes:
        found: What changed; ``None`` before the end of the run, and where it cannot be compared.
        refused: Why it cannot; empty where it can.
    """

    def __init__(self, base: str, run: RunRecord) -> None:
        self._base, self._run = base, run
        self.found: Comparison | None = None
        self.refused = ""

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Compare, before the summary is written; a regression is no green run, nor is one that cannot be compared.

        The base is read here, not when the run began: the run may write its record over it, after this.
        """
        new = self._run.data(session)
        try:
            self.found = compare(base_record(self._base, new), new)
        except RecordError as error:
            self.refused = str(error)
        self._run.compared = self.found, self.refused
        red = self.refused or (self.found is not None and self.found.regressions)
        if red and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Say what changed, below the promises; on ``-qq`` the verdict alone."""
        if self.refused:
            said = one_line(f"qvl: qvl_compare: cannot compare: {self.refused}")
            write_folded(terminalreporter, said, red=True, bold=True)
        elif self.found is not None:
            lines = as_text(self.found).splitlines()
            if terminalreporter.config.get_verbosity() >= -1:
                terminalreporter.section(f"compared with {self._base}", sep="=", bold=True)
                for line in lines[:-1]:
                    write_folded(terminalreporter, line)
            colour = {"red": True} if self.found.regressions else {"green": True}
            write_folded(terminalreporter, f"qvl: {lines[-1]}", bold=True, **colour)
