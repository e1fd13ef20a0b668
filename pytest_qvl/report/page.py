"""The page of the run (``--qvl-html``), written when the record is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qvl.outputs import replace_file
from pytest_qvl.records.page import as_page
from pytest_qvl.report.record import Record

if TYPE_CHECKING:
    import pytest


class Page(Record):
    """Writes the page at the end of the run; register it as a plugin, in the process that was started."""

    setting = "qvl_html"

    def write(self, session: pytest.Session) -> str:
        """Write the page; returns why it could not be written, empty if it was."""
        return replace_file(self.path, as_page(self._run.data(session), *self._run.compared))
