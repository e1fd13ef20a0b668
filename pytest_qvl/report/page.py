"""The page of the run (``--qvl-html``), written when the record is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.outputs import replace_file
from pytest_qvl.records.page import as_page
from pytest_qvl.records.stored import as_newest
from pytest_qvl.report.record import Record

if TYPE_CHECKING:
    from pytest_qvl.report.base_comparison import BaseComparison


class Page(Record):
    """Writes the page at the end of the run; register it as a plugin, in the process that was started.

    Attributes:
        comparison: With a base; ``None`` where none was asked for.
    """

    setting = "qvl_html"
    comparison: BaseComparison | None = None

    def write(self, data: dict[str, Any]) -> str:
        """Write the page of a record's data."""
        record, against = as_newest(data, "this run"), self.comparison
        page = as_page(record) if against is None else as_page(record, against.found, against.refused)
        return replace_file(self.path, page)
