"""Memory that should be free again: after a test that used the model, after a load that failed, after the session.

A leak is called one only once garbage is collected, the allocator's cache and cuBLAS's workspaces are given back, and
the allocator still counts the memory as allocated.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from pytest_qvl.report.process_results import Verdict
from pytest_qvl.session import fixture_graph
from pytest_qvl.session.tracebacks import forget, forget_last, release_frames
from pytest_qvl.vram.units import MiB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pytest_qvl.session.first_errors import FirstErrors
    from pytest_qvl.session.gpu_access import GpuAccess
    from pytest_qvl.session.model_state import ModelState
    from pytest_qvl.vram.meter import Meter

# A block that is reused may count for up to 1 MiB more than was asked for; tables that libraries make once per
# process (bitsandbytes' quantization maps) are a thousandth of that.
TOLERANCE = MiB
STOPPED = (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR)  # with fixtures still alive


class LeakWatch:
    """Compares what is allocated with what was allocated before.

    Args:
        meter: The one meter of this process.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._first: int | None = None
        self._before = 0
        self._made = 0
        self._making = 0

    @property
    def begun(self) -> bool:
        """Whether a test has used the model so far."""
        return self._first is not None

    def begin(self) -> None:
        """Start to watch a test that uses the model, before its fixtures are set up."""
        if self._first is None:
            self._meter.reclaim("before the first model")
            self._first = self._allocated()
        self._before, self._made = self._allocated(), 0

    @contextmanager
    def making(self) -> Iterator[None]:
        """A fixture of a wider scope than one test is made: what it allocates stays, unless it fails."""
        if not self.begun:
            yield
            return
        before = self._allocated()
        self._making += 1
        try:
            yield
        finally:
            self._making -= 1
        if not self._making:
            self._made += self._allocated() - before

    def left_by_test(self, let_go: Callable[[], None], own_storages: Callable[[], frozenset[int]]) -> str:
        """After teardown: how much the test left allocated and who holds it; empty where it left nothing.

        Args:
            let_go: Drops what pytest itself still holds of the test.
            own_storages: Addresses of the model's own storages, which are no leak.
        """
        # From cheap to dear: most tests leave nothing, and collecting garbage among a model's objects takes a while.
        measures = (lambda: None, let_go, lambda: self._meter.reclaim("after a test"))
        left = self._left_after(measures, self._before + self._made)
        return self._describe_left(left, own_storages()) if left else ""

    def left_by_session(self, let_go: Callable[[], None]) -> str:
        """After everything is torn down: how much is left and who holds it; empty where nothing is.

        Args:
            let_go: Drops what pytest itself still holds.
        """

        def reclaim() -> None:
            self._meter.reclaim("after the session")

        left = self._left_after((reclaim, let_go, reclaim), self._first or 0)
        return self._describe_left(left, frozenset()) if left else ""

    def _left_after(self, measures: Iterable[Callable[[], object]], before: int) -> int:
        """How much more is allocated than before, once a measure after another was taken; 0 as soon as nothing is."""
        left = 0
        for measure in measures:
            measure()
            left = self._allocated() - before
            if left <= TOLERANCE:
                return 0
        return left

    def _allocated(self) -> int:
        reading = self._meter.read_without_workspaces()
        return 0 if reading is None else reading.allocated

    def _describe_left(self, left: int, besides: frozenset[int]) -> str:
        process = self._meter.process.read() if self._meter.process else None
        driver = f" (the driver counts {format_bytes(process.used)} for this process)" if process else ""
        lines = [f"{format_bytes(left)} of GPU memory stayed allocated{driver}"]
        lines += [f"  {format_bytes(h.size)} held by {h.where}" for h in self._meter.holders(besides)]
        if len(lines) == 1:
            lines.append("  no tensor that Python knows holds it: a C++ object (an autograd graph, a CUDA graph) does")
        return "\n".join(lines)


class LeakVerdicts:
    """Which test left memory allocated, and whether the session did; one per process.

    Args:
        meter: The one meter of this process.
        access: The way to the GPU; says whether CUDA still works.
        model: The model between two tests.
        errors: Which test met a fixture's error first.

    Attributes:
        watch: What is allocated, compared with what was.
    """

    def __init__(self, meter: Meter, access: GpuAccess, model: ModelState, errors: FirstErrors) -> None:
        self._meter, self._access, self._model, self._errors = meter, access, model, errors
        self.watch = LeakWatch(meter)
        self._tearing_down: tuple[pytest.Item, list[BaseException]] | None = None
        self._left = ""

    def begin_teardown(self, item: pytest.Item, errors: list[BaseException]) -> None:
        """The test's own fixtures are torn down next, then perhaps wider ones.

        Args:
            item: The test.
            errors: What it raised so far; their frames are let go if memory is missing.
        """
        self._left = ""
        self._tearing_down = (item, errors) if fixture_graph.requested_models(item) else None

    def look(self) -> None:
        """Look for what the test left, once: before the first wider fixture goes, whose memory would make up for it."""
        if self._tearing_down is None or self._access.broken:
            return
        (item, errors), self._tearing_down = self._tearing_down, None

        def let_go() -> None:
            self.release_errors(errors)
            forget_last()
            if hasattr(item, "funcargs"):
                item.funcargs.clear()  # pytest does it a moment later
            self._model.free_buffers()

        left = self.watch.left_by_test(let_go, self._model.storages)
        if left:
            failed = self._errors.met_first_by(item)
            after = "a load that failed half-way" if failed else "the test and its teardown"
            amount, *holders = left.splitlines()
            self._left = "\n".join([f"{item.nodeid} leaks: {amount}, after {after}", *holders])

    def judge(self) -> str | None:
        """After teardown: say if a test that uses the model left memory allocated."""
        self.look()
        return self._left or None

    def release_errors(self, errors: Iterable[BaseException]) -> None:
        """Drop what kept errors hold in their frames, half-built models too."""
        for error in errors:
            release_frames(error)
            forget(error)
        for definition in self._model.noted:
            fixture_graph.forget_traceback(definition)

    def judge_session(self, session: pytest.Session) -> list[Verdict]:
        """After all fixtures are torn down: is all memory of models free again?"""
        if not self.watch.begun or session.exitstatus in STOPPED:
            return []
        self._errors.clear()
        self._model.release()
        left = self.watch.left_by_session(forget_last) if self._meter.alive() else ""
        if self._access.broken:
            text = f"CUDA was broken by {self._access.breaker}: {self._access.broken}"
            return [Verdict("leak", "not judged", text)]
        if not self._meter.alive():
            return []
        if left:
            return [Verdict("leak", "BROKEN", left)]
        return [Verdict("leak", "kept", "all memory of models is free again")]
