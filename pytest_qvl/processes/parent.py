"""More than one backend: each runs its tests in a process of its own, and this one collects and reports.

Unsloth patches Transformers and PEFT for the whole process that imports it, so backends never share one. As many
processes run at a time as there are GPUs for them, and each frees its GPU before the next starts; this process runs
no test, so it never starts CUDA and never holds a GPU. Reports come back as xdist's do, serialised by pytest's own
hooks, and are handed to this process's plugins: summary, JUnit, ``--lf``, the record and ``-x`` know no difference.

POSIX only, as the GPU lease is. Imports no torch, and asks the driver how many GPUs there are.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qvl.gpu.visible import VisibleDevicesError, visible_gpus
from pytest_qvl.processes.child import BOOT, Channel
from pytest_qvl.session import findings
from pytest_qvl.session.keys import CONSOLE_KEY, RESULTS_KEY, SESSION_VERDICTS_KEY
from pytest_qvl.session.process_link import PARENT_NAME
from pytest_qvl.session.targets import target_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_qvl.options import Settings

# What a process gets to tear its fixtures down after Ctrl-C, before it is killed.
GRACE_S = 15.0
# How often to look whether it still lives: something it started may hold its socket open.
POLL_S = 1.0


def refuse_what_needs_a_terminal(config: pytest.Config) -> None:
    """Refuse options that cannot work where tests run in other processes.

    Raises:
        pytest.UsageError: Names the option and the fix.
    """
    for flag, name in (("--pdb", "usepdb"), ("--trace", "trace")):
        if config.getoption(name, False):
            raise pytest.UsageError(
                f"{flag} needs the tests in this process, and with more than one backend each runs in a process of "
                "its own; choose one with --qvl-backend"
            )


def start_backends(config: pytest.Config, settings: Settings) -> None:
    """Let the tests of each backend run in a process of its own, and none in this one.

    Raises:
        pytest.UsageError: An option cannot work in other processes.
    """
    refuse_what_needs_a_terminal(config)
    children = Children(config, settings.backend, config.stash[CONSOLE_KEY].progress)
    config.pluginmanager.register(children, PARENT_NAME)


class Children:
    """Runs the selected tests, one process per backend, and replays their reports; register it as a plugin.

    Args:
        config: pytest's configuration.
        backends: In the order they run. Tests without a model run once, with the first.
        progress: Called with a line to show when a process starts.
    """

    def __init__(self, config: pytest.Config, backends: Sequence[str], progress: Callable[[str], None]) -> None:
        self._backends = backends
        self._progress = progress
        # xdist, if it is there, starts its workers in each backend's process, and they share the GPUs.
        self._with_workers = bool(getattr(config.option, "numprocesses", None) or getattr(config.option, "tx", None))
        for name, off in (("dist", "no"), ("tx", []), ("numprocesses", None)):
            if hasattr(config.option, name):
                setattr(config.option, name, off)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Run the backends' processes in place of pytest's loop, unless nothing is to run or collection failed."""
        options = session.config.option
        if options.collectonly or (session.testsfailed and not options.continue_on_collection_errors):
            return None
        shares = {backend: [i for i in session.items if self._backend_of(i) == backend] for backend in self._backends}
        waiting = [(backend, items) for backend, items in shares.items() if items]
        at_once = self._at_once(session.items)
        running: list[ChildRun] = []
        try:
            while waiting or running:
                while waiting and len(running) < at_once and not (session.shouldfail or session.shouldstop):
                    backend, items = waiting.pop(0)
                    self._progress(f"{backend}: {len(items)} tests in a process of its own")
                    running.append(ChildRun(session, backend, items))
                if not running:
                    break
                for run in ready(running):
                    if not run.advance():
                        running.remove(run)
                        for problem in run.conclude():
                            session.config.stash[RESULTS_KEY].add_problem(problem)
        finally:
            for run in running:
                run.kill()
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        return True

    def _at_once(self, items: Sequence[pytest.Item]) -> int:
        """How many processes may run together: each needs a GPU of its own, and the CPU is there once."""
        targets = [target for item in items if (target := target_of(item)) is not None]
        if self._with_workers or not targets or any(target.device != "cuda" for target in targets):
            return 1
        try:
            return max(1, len(visible_gpus().gpus))
        except VisibleDevicesError:  # reported by the process that takes the lease
            return 1

    def _backend_of(self, item: pytest.Item) -> str:
        target = target_of(item)
        return self._backends[0] if target is None else target.backend


class ChildRun:
    """One backend's tests in a process of their own, which starts at once.

    Args:
        session: The parent's.
        backend: Whose tests these are.
        items: The parent's own copies of them, in order.
    """

    def __init__(self, session: pytest.Session, backend: str, items: Sequence[pytest.Item]) -> None:
        self._session, self._config, self._hook = session, session.config, session.config.hook
        self._backend = backend
        self._waiting = {item.nodeid: item for item in items}
        self._phases: dict[str, str] = {}  # last phase reported of each test that has not ended
        self._running: dict[str, None] = {}
        self._problems: list[str] = []
        self._ended = False
        self._why = ""
        self._exit: tuple[str, int | None] | None = None
        self._process, self._channel = self._start()

    @property
    def speaks(self) -> bool:
        """Whether a message has come, or the process has closed its side."""
        return bool(select.select([self._channel], [], [], 0)[0])

    @property
    def lives(self) -> bool:
        """Whether the process has not ended; something that it started may hold its socket open even then."""
        return self._process.poll() is None

    def fileno(self) -> int:
        """Number of the socket."""
        return self._channel.fileno()

    def advance(self) -> bool:
        """Replay the next message, if there is one; ``False`` once the process has nothing more to say."""
        # Every message waits for its answer, so there is never one left in a buffer.
        message = self._channel.receive() if self.speaks else None
        if message is None:
            return False
        getattr(self, f"_on_{message.pop('kind')}")(**message)
        sys.stdout.flush()
        self._channel.send({"stop": self._stop_reason})
        return self._channel.fileno() >= 0

    def kill(self) -> None:
        """End the process before its time."""
        self._channel.close()
        self._end(self._process)

    def conclude(self) -> list[str]:
        """After the last message: tests that the process did not live to run fail by name.

        Returns:
            What went wrong outside any test.
        """
        self._channel.close()
        try:
            status = self._process.wait()
        except BaseException:
            self._end(self._process)
            raise
        if self._exit is not None:
            raise pytest.exit.Exception(*self._exit)
        if self._stop_reason:
            return self._problems
        if self._waiting:
            self._fail_the_rest(self._why or self._how_it_ended(status))
        elif status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not self._ended:
            how = self._why or _status(status)
            self._problems.append(f"backend {self._backend}'s process {how} after its last test")
        return self._problems

    @property
    def _stop_reason(self) -> str:
        return str(self._session.shouldfail or self._session.shouldstop or "")

    def _start(self) -> tuple[subprocess.Popen[bytes], Channel]:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", BOOT, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                cwd=self._config.invocation_params.dir,
                # Ctrl-C then reaches this process alone, which passes it on once.
                start_new_session=True,
            )
        channel = Channel(ours)
        channel.send(
            {
                "path": sys.path,
                "args": [os.fspath(argument) for argument in self._config.invocation_params.args],
                "backend": self._backend,
                "items": list(self._waiting),
            }
        )
        return process, channel

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Let the process tear down, and kill it with all it started if it takes too long."""
        process.send_signal(signal.SIGINT)
        try:
            process.wait(GRACE_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    # ---- messages ----------------------------------------------------------------------------------------

    def _on_collected(self, report: dict[str, Any]) -> None:
        self._hook.pytest_collectreport(report=self._report(report))

    def _on_start(self, nodeid: str, location: list[Any]) -> None:
        self._running[nodeid] = None
        self._hook.pytest_runtest_logstart(nodeid=nodeid, location=tuple(location))

    def _on_report(self, report: dict[str, Any]) -> None:
        made = self._report(report)
        if made.when in ("setup", "call"):
            self._phases[made.nodeid] = made.when
        else:  # teardown, or what xdist says of a worker that crashed
            self._waiting.pop(made.nodeid, None)
        self._hook.pytest_runtest_logreport(report=made)

    def _on_finish(self, nodeid: str, location: list[Any]) -> None:
        self._running.pop(nodeid, None)
        self._hook.pytest_runtest_logfinish(nodeid=nodeid, location=tuple(location))

    def _on_warning(
        self, *, name: str, text: str, filename: str, lineno: int, nodeid: str, location: list[Any] | None
    ) -> None:
        # Its class may be defined in a module that this process does not import; only the name is shown.
        category = type(name, (Warning,), {})
        self._hook.pytest_warning_recorded.call_historic(
            kwargs={
                "warning_message": warnings.WarningMessage(category(text), category, filename, lineno),
                "when": "runtest",
                "nodeid": nodeid,
                "location": None if location is None else tuple(location),
            }
        )

    def _on_progress(self, line: str) -> None:
        self._config.stash[CONSOLE_KEY].progress(line)

    def _on_announce(self, line: str) -> None:
        self._config.stash[CONSOLE_KEY].announce(line)

    def _on_session(self, output: list[dict[str, Any]]) -> None:
        self._config.stash[SESSION_VERDICTS_KEY].take(output, self._backend)

    def _on_internalerror(self, text: str) -> None:
        self._why = f"met an internal error of pytest:\n{text}"

    def _on_interrupted(self, text: str, for_all: bool, status: int | None) -> None:
        if not for_all:
            self._why = f"stopped: {text}"
        elif not self._stop_reason:
            self._exit = (f"backend {self._backend}: {text}", status)

    def _on_end(self) -> None:
        self._ended = True

    def _report(self, data: dict[str, Any]) -> Any:
        # JSON has lists only, and pytest tells a skip by its tuple.
        for key in ("longrepr", "location"):
            if isinstance(data.get(key), list):
                data[key] = tuple(data[key])
        return self._hook.pytest_report_from_serializable(config=self._config, data=data)

    # ---- a process that did not live to the end ----------------------------------------------------------

    def _how_it_ended(self, status: int) -> str:
        if self._ended and status >= 0:
            return "did not collect it"
        return _status(status)

    def _fail_the_rest(self, how: str) -> None:
        process = f"backend {self._backend}'s process"
        met = next((nodeid for nodeid in self._running if nodeid in self._waiting), None)
        where = f" while running {met}" if met else ""
        for nodeid, item in self._waiting.items():
            if nodeid in self._running:
                text = f"{process} {how} while running {nodeid}"
            else:
                text = f"not run: {process} {how}{where}"
                self._hook.pytest_runtest_logstart(nodeid=nodeid, location=item.location)
            when: Any = "teardown" if self._phases.get(nodeid) == "call" else "call"
            keywords: Any = dict.fromkeys(item.keywords, 1)
            report = pytest.TestReport(nodeid, item.location, keywords, "failed", text, when, duration=0.0)
            findings.attach(item, report)
            self._hook.pytest_runtest_logreport(report=report)
            self._hook.pytest_runtest_logfinish(nodeid=nodeid, location=item.location)
            how, *_ = how.splitlines()  # what pytest itself says can be long; once is enough
            if self._stop_reason:
                return


def ready(runs: Sequence[ChildRun]) -> list[ChildRun]:
    """Those that have something to say, or will never again; waits for the first."""
    while True:
        speaking: list[ChildRun] = select.select(runs, [], [], POLL_S)[0]
        if speaking:
            return speaking
        ended = [run for run in runs if not run.lives and not run.speaks]
        if ended:
            return ended


def _status(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        name = f" ({signal.Signals(-status).name})"
    except ValueError:
        name = ""
    return f"died with signal {-status}{name}"
