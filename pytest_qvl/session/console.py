"""Lines that are shown while tests run, past what pytest captures."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from pytest_qvl.evidence import printable
from pytest_qvl.session.process_link import parent_link

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import pytest


class Console:
    """Shows lines on the terminal; there is one per process, and a backend's process sends its lines to its parent.

    Args:
        config: pytest's configuration.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def progress(self, line: str) -> None:
        """Show a line of progress on a terminal; silent elsewhere, under ``-q`` and in workers."""
        parent = parent_link(self._config)
        if parent is not None:
            parent.request("progress", line=line)
            return
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if reporter is None or self._config.get_verbosity() < 0 or not reporter.isatty:
            return
        with self._uncaptured():
            _write(reporter, line)

    def announce(self, line: str) -> None:
        """Show what somebody may be waiting for at once, on a terminal or not.

        A worker's terminal goes nowhere, its standard error is the controller's; that of a backend's process is silent.
        """
        parent = parent_link(self._config)
        if parent is not None:
            parent.request("announce", line=f"{parent.backend}: {line}")
            return
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        worker = getattr(self._config, "workerinput", {}).get("workerid", "")
        with self._uncaptured():
            if reporter is None or worker:
                print(f"\nqvl: {f'{worker}: ' if worker else ''}{line}", file=sys.__stderr__, flush=True)
            else:
                _write(reporter, line)
                reporter.flush()

    def _uncaptured(self) -> AbstractContextManager[object]:
        capture: Any = self._config.pluginmanager.get_plugin("capturemanager")
        return nullcontext() if capture is None else capture.global_and_fixture_disabled()


def _write(reporter: Any, line: str) -> None:
    """A line of its own, whatever stands on the terminal."""
    reporter.ensure_newline()
    reporter.write_line(printable(f"qvl: {line}"))
