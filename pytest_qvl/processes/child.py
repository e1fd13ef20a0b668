"""The process that runs the tests of one backend, as seen from inside.

It is an ordinary pytest run with the arguments of its parent. It selects the tests that the parent names, in
the parent's order, and tells the parent what becomes of each; its own terminal stays silent. Every message
waits for an answer, so that output of tests (``-s``) and of the parent comes in order, and so that a parent
that has seen enough (``-x``, ``--maxfail``, ``--stepwise``) stops the child before the next test.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qvl.session.process_link import CHILD_NAME

if TYPE_CHECKING:
    import socket

WORKER_NAME = "qvl-child-worker"
WORKER_INPUT = "qvl_share"
# How an xdist worker learns whose it is before its configuration exists; its tests do not see it.
WORKER_VARIABLE = "QVL_CHILD_BACKEND"
# Started with the number of the socket. Imports find what they find in the parent.
BOOT = """
import json, socket, sys
channel = socket.socket(fileno=int(sys.argv[1]))
channel.set_inheritable(False)
task = json.loads(channel.makefile(encoding="utf-8").readline())
sys.path[:] = task["path"]
from pytest_qvl.processes.child import main
sys.exit(main(channel, task))
"""


class Channel:
    """JSON messages over a socket, one a line."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket: socket.socket | None = connection
        self._lines = connection.makefile(encoding="utf-8", newline="\n")

    def fileno(self) -> int:
        """Number of the socket."""
        return -1 if self._socket is None else self._socket.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; to nobody, if the other side is gone."""
        if self._socket is not None:
            try:
                self._socket.sendall(json.dumps(message, default=str, skipkeys=True).encode() + b"\n")
            except OSError:
                self.close()

    def receive(self) -> dict[str, Any] | None:
        """The next message; ``None`` once the other side is gone, even in the middle of a message."""
        if self._socket is None:
            return None
        try:
            line = self._lines.readline()
        except OSError:
            line = ""
        if not line.endswith("\n"):
            self.close()
            return None
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        """Let the other side know that nobody listens any more."""
        if self._socket is not None:
            self._lines.close()
            self._socket.close()
            self._socket = None


def main(connection: socket.socket, task: dict[str, Any]) -> int:
    """Run the tests of a task; its answer is the exit status."""
    sys.argv[:] = ["pytest", *task["args"]]
    return int(pytest.main(task["args"], plugins=[Child(Channel(connection), task)]))


def backend_of(config: pytest.Config) -> str | None:
    """The backend whose tests this process runs; ``None`` where it is nobody's child."""
    share = config.pluginmanager.get_plugin(CHILD_NAME) or getattr(config, "workerinput", {}).get(WORKER_INPUT)
    backend: str | None = share["backend"] if isinstance(share, dict) else getattr(share, "backend", None)
    return backend


def backend_of_worker() -> str | None:
    """The same for an xdist worker of a child that is only starting; ``None`` when asked again."""
    return os.environ.pop(WORKER_VARIABLE, None)


def select(items: list[pytest.Item], nodeids: list[str]) -> None:
    """Keep the tests named, in the order named."""
    place = {nodeid: index for index, nodeid in enumerate(nodeids)}
    items[:] = sorted((item for item in items if item.nodeid in place), key=lambda item: place[item.nodeid])


class WorkerShare:
    """Selects the child's tests in an xdist worker that the child started."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keep the tests that the child was given."""
        select(items, config.workerinput[WORKER_INPUT]["items"])  # type: ignore[attr-defined]


class Child:
    """The plugin of a backend's process: selects its tests and reports them to the parent.

    Attributes:
        backend: The backend it runs.
    """

    def __init__(self, channel: Channel, task: dict[str, Any]) -> None:
        self.__name__ = CHILD_NAME  # what it is registered under
        self.backend: str = task["backend"]
        self._nodeids: list[str] = task["items"]
        self._channel = channel
        self._config: pytest.Config | None = None
        self._uncollected = False

    def request(self, kind: str, **message: Any) -> None:
        """Send a message to the parent and wait for its answer, which may stop the run after this test."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self._channel.send({"kind": kind, **message})
        answer = self._channel.receive() or {"stop": "the parent process is gone"}
        if answer["stop"] and self._config is not None:
            plugin = self._config.pluginmanager.get_plugin
            runner = plugin("dsession") or plugin("session")  # xdist's, or pytest's own
            if runner is not None and not runner.shouldstop:
                runner.shouldstop = answer["stop"]

    # ---- start -------------------------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Leave to the parent what is written once for the whole run."""
        self._config = config
        option = config.option
        # The parent has selected already, and its cache changes while children run.
        option.lf = option.failedfirst = option.newfirst = False
        option.stepwise = option.stepwise_skip = option.stepwise_reset = False
        option.xmlpath = None
        option.maxfail = 0
        if option.basetemp:
            folder = Path(option.basetemp)
            folder.mkdir(parents=True, exist_ok=True)
            option.basetemp = str(folder / self.backend)

    @pytest.hookimpl(specname="pytest_configure", trylast=True)
    def pytest_configure_terminal(self, config: pytest.Config) -> None:
        """Silence the terminal's reporter; others may count on its being there."""
        reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            quiet = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for the rest of the process
            reporter._tw = type(reporter._tw)(quiet)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_setupnodes(self) -> None:
        """Pass the backend's name to the xdist workers that are about to start."""
        os.environ[WORKER_VARIABLE] = self.backend

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Hand the share on to the xdist workers of this process."""
        node.workerinput[WORKER_INPUT] = {"backend": self.backend, "items": self._nodeids}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the tests that the parent named."""
        select(items, self._nodeids)

    # ---- what the parent hears ---------------------------------------------------------------------------

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Report what failed to import here, although it imports in the parent."""
        if report.failed:
            self._uncollected = True
            self.request("collected", report=self._plain(report))

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        """Report that a test begins."""
        self.request("start", nodeid=nodeid, location=location)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Report a phase of a test that has ended."""
        self.request("report", report=self._plain(report))

    def pytest_runtest_logfinish(self, nodeid: str, location: Any) -> None:
        """Report that a test has ended."""
        self.request("finish", nodeid=nodeid, location=location)

    def pytest_warning_recorded(self, warning_message: Any, when: str, nodeid: str, location: Any) -> None:
        """Report a test's warning; warnings of collection come in the parent too."""
        if when == "runtest":
            self.request(
                "warning",
                name=warning_message.category.__name__,
                text=str(warning_message.message),
                filename=warning_message.filename,
                lineno=warning_message.lineno,
                nodeid=nodeid,
                location=location,
            )

    def pytest_internalerror(self, excrepr: Any) -> bool:
        """Report an internal error of pytest."""
        self.request("internalerror", text=str(excrepr))
        return True

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Report what ended the run: ``pytest.exit``, a plugin, a signal; or that nothing could be collected here."""
        status = getattr(excinfo.value, "returncode", None)
        self.request(
            "interrupted", text=str(excinfo.value) or excinfo.typename, for_all=not self._uncollected, status=status
        )

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Report the end of the session, after all tests are reported and fixtures torn down."""
        self.request("end")

    def _plain(self, report: pytest.CollectReport | pytest.TestReport) -> dict[str, Any]:
        assert self._config is not None
        data: dict[str, Any] = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        data.pop("node", None)  # an xdist worker's handle
        return data
