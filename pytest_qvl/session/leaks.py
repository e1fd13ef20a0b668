"""Memory that should be free again: after a test that used the model, after a load that failed, after the session.

A leak is called one only once garbage is collected, the allocator's cache and cuBLAS's workspaces are given back, and
the allocator still counts the memory as allocated.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from pytest_qvl.vram.units import MiB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pytest_qvl.vram.meter import Meter

# A block that is reused may count for up to 1 MiB more than was asked for; tables that libraries make once per
# process (bitsandbytes' quantization maps) are a thousandth of that.
TOLERANCE = MiB


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

    def begin(self) -> None:
        """A test that uses the model begins, before its fixtures are made."""
        if self._first is None:
            self._meter.reclaim("before the first model")
            self._first = self._allocated()
        self._before, self._made = self._allocated(), 0

    @contextmanager
    def making(self) -> Iterator[None]:
        """A fixture of a wider scope than one test is made: what it allocates stays, unless it fails."""
        before = self._allocated()
        self._making += 1
        try:
            yield
        finally:
            self._making -= 1
        if not self._making:
            self._made += self._allocated() - before

    def left_by_test(self, let_go: Callable[[], None], own_storages: Callable[[], frozenset[int]]) -> str:
        """After tear-down: how much the test left allocated and who holds it; empty where it left nothing.

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
        reading = self._meter.at_rest()
        return 0 if reading is None else reading.allocated

    def _describe_left(self, left: int, besides: frozenset[int]) -> str:
        process = self._meter.process.read() if self._meter.process else None
        driver = f" (the driver counts {format_bytes(process.used)} for this process)" if process else ""
        lines = [f"{format_bytes(left)} of GPU memory stayed allocated{driver}"]
        lines += [f"  {format_bytes(h.size)} held by {h.where}" for h in self._meter.holders(besides)]
        if len(lines) == 1:
            lines.append("  no tensor that Python knows holds it: a C++ object (an autograd graph, a CUDA graph) does")
        return "\n".join(lines)
