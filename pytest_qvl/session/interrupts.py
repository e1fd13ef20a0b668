"""Ctrl-C and SIGTERM end a run with its summary, whenever they come.

A KeyboardInterrupt in the middle of an import does not always arrive: it is swallowed, turned into an ImportError that
leaves a half-imported module to every later test, or ends the process in torch's C++ code. One that comes while
fixtures are torn down and the summary is written is a traceback without either. So signals are noted when they come: an
import that is under way comes to its end first, a run goes on no longer than its current phase, and one that is ending
ends in peace: it reports the interrupt, tears fixtures down and writes its summary and record. Ctrl-C twice meanwhile
ends the process at once, as the signal does by default: without a traceback of pytest's own inner life.

Imports no torch.
"""

from __future__ import annotations

import _thread
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qvl.session import fixture_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

HANDLED = (signal.SIGINT, signal.SIGTERM)
IMPORTING = "<frozen importlib._bootstrap>"
LOOK_AGAIN_S = 0.1
_installed: list[Interrupts] = []  # one at most


class Interrupts:
    """Handles the two signals while a run that uses this package's fixtures lasts; register it as a plugin.

    Args:
        say: Shows a line at once.

    Attributes:
        caught: Name of the signal that came and has stopped nothing yet; empty where none has.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._before: dict[signal.Signals, Any] = {}
        self._process = 0
        self._tearing_down = False  # the fixtures of a test, or the whole session
        self._ending = False  # no test runs any more
        self._until = "fixtures are torn down"  # then a run that is ending stops
        self._deferred = False  # until an import has come to its end
        self._awaited: set[signal.Signals] = set()
        self.caught = ""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        """Handle signals while tests run, in a run that uses our fixtures; an xdist worker is stopped by xdist."""
        config = session.config
        uses = any(fixture_graph.is_ours(name) for item in session.items for name in fixture_graph.fixture_names(item))
        controls = bool(getattr(config.option, "tx", None))
        if (uses or controls) and not hasattr(config, "workerinput"):
            self._install()
        try:
            return (yield)
        finally:
            # One that stopped the run has got through: the next, while pytest reports it, is the first to meet the end.
            self._ending = self._tearing_down = True
            self._deferred, self.caught = False, ""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self) -> Generator[None, object, object]:
        """Hold a signal back until the test's fixtures are torn down."""
        self._tearing_down = True
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> Generator[None, object, object]:
        """Stop, if a signal came during this phase and did not get through.

        A body that passes has dealt with the signal itself.
        """
        caught, self.caught, self._deferred = self.caught, "", False
        self._tearing_down = False
        if caught and (call.excinfo is not None or call.when != "call"):
            raise KeyboardInterrupt(caught)
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, object, object]:
        """Until the session has ended, let no signal interrupt teardown or the summary."""
        try:
            return (yield)
        finally:
            if self.caught:
                session.exitstatus = pytest.ExitCode.INTERRUPTED
            self.caught, self._until = "", "its reports are written"

    def _install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._process = os.getpid()
        for number in HANDLED:
            before = signal.getsignal(number)
            # A shell's background jobs ignore Ctrl-C, and whoever has a handler knows why.
            if before in (signal.default_int_handler, signal.SIG_DFL):
                self._before[number] = before
                signal.signal(number, self._handle)
        _installed[:] = [self]

    def uninstall(self) -> None:
        """Leave the signals to whoever had them before."""
        for number, before in self._before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, before)
        self._before.clear()
        _installed.clear()

    def step_aside(self) -> None:
        """Remove the handlers before a fork, so that the child never has them."""
        for number, before in self._before.items():
            signal.signal(number, before)

    def step_back(self) -> None:
        """Install the handlers again after a fork, in the parent."""
        for number in self._before:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        came = signal.Signals(number)
        if os.getpid() != self._process:  # a child that another thread has forked
            signal.signal(came, self._before[came])
            os.kill(os.getpid(), came)
            return
        if came in self._awaited:
            self._awaited.discard(came)
            if self._deferred:
                self._interrupt(came, frame)
            return
        again, self.caught = bool(self.caught), came.name
        if again and self._ending:
            signal.signal(came, signal.SIG_DFL)
            os.kill(os.getpid(), came)
            return
        if again:
            raise KeyboardInterrupt(came.name)
        if self._tearing_down:
            self._say(f"{came.name}: the run stops when {self._until}; once more to stop at once")
            return
        if _importing(frame):
            self._say(f"{came.name}: the run stops when an import has come to its end; once more to stop at once")
        self._interrupt(came, frame)

    def _interrupt(self, came: signal.Signals, frame: Any) -> None:
        self._deferred = _importing(frame)
        if not self._deferred:
            raise KeyboardInterrupt(came.name)
        self._wait_for_import(came)

    def _wait_for_import(self, came: signal.Signals) -> None:
        """Let the signal come again until no import is under way; from another thread, because this one imports."""

        def come_again() -> None:
            if self._deferred:
                self._awaited.add(came)
                _thread.interrupt_main(came)

        timer = threading.Timer(LOOK_AGAIN_S, come_again)
        timer.daemon = True
        timer.start()


class UntilWritten:
    """Keeps signals from what is written at the end of a run; register it after all that writes.

    The exit status that the record has is settled by then: a signal that comes so late does not change it.

    Args:
        interrupts: Handles the signals.
    """

    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self) -> Generator[None, object, object]:
        """Let signals through again when all is written."""
        try:
            return (yield)
        finally:
            self._interrupts.uninstall()


def _before_fork() -> None:
    if _installed and threading.current_thread() is threading.main_thread():
        _installed[0].step_aside()


def _after_fork_in_parent() -> None:
    if _installed and threading.current_thread() is threading.main_thread():
        _installed[0].step_back()


def _after_fork_in_child() -> None:
    _installed.clear()


# Cannot be taken back, so it is done once.
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


def _importing(frame: Any) -> bool:
    """Whether a frame, or one that called it, is part of an import."""
    while frame is not None:
        if frame.f_code.co_filename == IMPORTING:
            return True
        frame = frame.f_back
    return False
