"""Peak VRAM by phase, in three numbers that are always named.

* *allocated*: what tensors occupied, by torch's allocator. The same from run to run.
* *reserved*: what the allocator had taken from the driver for them, with its gaps.
* *process*: what the driver says this process holds, with CUDA's context, kernels and libraries.

What decides whether a card suffices is *fit*: peak reserved + context, the context being what the process
holds beyond what the allocator reserved (on another card than the real one, that card's own context).

Torch has one pair of peaks for the whole process, and whoever resets them resets them for all. The meter is
their one owner: at each border of a phase it carries the peaks into every phase that is open, then resets them.
So phases nest, and a phase inside another takes nothing from it. Code under measurement that itself calls
``torch.cuda.reset_peak_memory_stats`` hides from the meter what it had reached before.
"""

from __future__ import annotations

import gc
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from pytest_qvl.vram.allocator import Allocator, History, Reading, TorchAllocator
from pytest_qvl.vram.holders import Holder, holders_at_peak
from pytest_qvl.vram.usage import Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_qvl.gpu.nvml import ProcessReading


class CudaBroken(RuntimeError):
    """Work on the GPU failed so badly that CUDA refuses everything else in this process."""


class ProcessMeter(Protocol):
    """Tells what this process holds of the GPU."""

    def read(self) -> ProcessReading | None:
        """Bytes now; ``None`` where nobody can tell."""


@dataclass(eq=False)
class Phase:
    """A phase while it runs; ``usage`` is there once it has ended.

    Attributes:
        name: What is measured.
        inner: Phases that began and ended inside it.
        usage: Its numbers.
        holders: Who held the memory at its peak, if the history was kept.
        history: The history, if kept.
    """

    name: str
    inner: list[Usage] = field(default_factory=list)
    usage: Usage | None = None
    holders: tuple[Holder, ...] = ()
    history: History | None = None
    _exclusive: bool = False
    _always: bool = False
    _keep: Callable[[Usage], bool] | None = None
    _recording: bool = False
    _started: float = 0.0
    _began_us: float = 0.0
    _overhead: float = 0.0
    _unmeasured: str = ""
    _alive: Reading | None = None
    _seen: bool = False
    _allocated: int = 0
    _reserved: int = 0
    _process: ProcessReading | None = None
    _context: int | None = None

    def _update_peaks(self, reading: Reading, process: ProcessReading | None) -> None:
        """Take in the peaks since the last border of a phase, and what the driver says of the process now."""
        self._seen = True
        self._allocated = max(self._allocated, reading.peak_allocated)
        self._reserved = max(self._reserved, reading.peak_reserved)
        if process is not None:
            if self._process is None or process.used > self._process.used:
                self._process = process
            self._context = max(self._context or 0, process.used - reading.reserved)

    def _finished(self, seconds: float, why_not: str, context: int | None, error: str) -> Usage:
        """The usage so far: ``why_not`` for nothing measured, ``context`` in bytes."""
        reason = self._unmeasured or ("" if self._seen else why_not)
        if reason:
            return Usage(self.name, seconds, reason, error=error)
        alive = self._alive or Reading(0, 0, 0, 0)
        reserved = max(self._reserved, alive.reserved)
        return Usage(
            self.name,
            seconds,
            "",
            max(self._allocated, alive.allocated),
            reserved,
            max(self._process.used, reserved + (self._context or 0)) if self._process else None,
            self._process.source if self._process else "",
            self._context if context is None else context,
            alive.allocated,
            alive.reserved,
            error,
        )


class Meter:
    """The one owner of the allocator's peaks in this process.

    Without CUDA, phases run and their usage says why nothing was measured.

    Args:
        allocator: What to measure; by default torch's on the first device.
        process: Tells the memory of the process; without it ``process`` and (unless a card's context is
            assumed) ``fit`` stay unknown.
        context: Context of the card to fit, in bytes; by default the measured one.
        clock: Seconds, monotonic.

    Attributes:
        process: As given; may be set later, before CUDA starts.
        context: As given; may be set later.
        broken: Why CUDA refuses to work in this process, and when that was noticed, once it does.
        cause: The same in CUDA's own words.
    """

    def __init__(
        self,
        allocator: Allocator | None = None,
        process: ProcessMeter | None = None,
        *,
        context: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._allocator: Allocator = TorchAllocator() if allocator is None else allocator
        self.process = process
        self.context = context
        self._clock = clock
        self._overhead = 0.0
        self.broken = self.cause = ""
        session = Phase("session", _always=True, _started=clock())
        self._open: list[Phase] = [session]

    @contextmanager
    def phase(
        self,
        name: str,
        *,
        exclusive: bool = False,
        settle: bool = True,
        keep: Callable[[Usage], bool] | None = None,
    ) -> Iterator[Phase]:
        """Measure a block; see :meth:`begin` for the arguments.

        Raises:
            CudaBroken: Work of the block (or, on entry, work before it) broke CUDA.
        """
        phase = self.begin(name, exclusive=exclusive, settle=settle, keep=keep)
        try:
            yield phase
        except BaseException as error:
            self.end(phase, error)
            raise
        self.end(phase)

    def begin(
        self,
        name: str,
        *,
        exclusive: bool = False,
        settle: bool = True,
        keep: Callable[[Usage], bool] | None = None,
    ) -> Phase:
        """Begin a phase where no ``with`` block fits; :meth:`end` it. Phases may end in any order.

        Args:
            name: What is measured.
            exclusive: Charge it to nobody but itself and the session: loading a model that many tests share.
            settle: Collect garbage, wait for the device and empty the allocator's cache first, so that what
                is reserved does not depend on what ran before.
            keep: Given the usage at the end, says whether to keep the allocation history and name the
                holders. The history is recorded from the beginning, which costs some microseconds per
                allocation. It is kept in any case if the phase runs out of memory.

        Raises:
            CudaBroken: Earlier work broke CUDA, and this is the first to see it.
        """
        entered = self._clock()
        phase = Phase(name, _exclusive=exclusive, _keep=keep, _unmeasured=self.broken)
        if not self.broken and self._update_peaks() is not None:
            if settle:
                gc.collect()
                self._guarded(self._allocator.release_cached, f"before {name!r}")
            self._guarded(self._allocator.synchronize, f"before {name!r}")
            phase._alive = self._update_peaks()
        if keep:
            phase._recording = self._allocator.start_history()
        self._open.append(phase)
        phase._began_us = time.time() * 1e6
        phase._started = self._clock()
        self._overhead += phase._started - entered
        phase._overhead = self._overhead
        return phase

    def end(self, phase: Phase, error: BaseException | None = None) -> Usage:
        """End a phase.

        Args:
            phase: From :meth:`begin`.
            error: The exception that ends it; the name of the innermost phase it came through is left on it
                as ``qvl_phase``.

        Raises:
            CudaBroken: Its work broke CUDA and no exception has told so yet.
        """
        trouble = None
        if not self.broken and self._allocator.read() is not None:
            try:
                self._guarded(self._allocator.synchronize, f"in {phase.name!r}")
            except CudaBroken as broken:
                trouble = broken
        ended = self._clock()
        self._update_peaks()
        seconds = ended - phase._started - (self._overhead - phase._overhead)
        usage = phase.usage = self._usage(phase, seconds, error)
        for outer in self._charged():
            if outer is not phase:
                outer.inner.append(usage)
        self._open.remove(phase)
        self._keep_history(phase, usage)
        if phase._exclusive and error is None and trouble is None and usage.measured:
            # What it left in the cache must not count as reserved by whoever comes next.
            gc.collect()
            self._guarded(self._allocator.release_cached, f"after {phase.name!r}")
            self._allocator.reset_peaks()
        if error is not None:
            vars(error).setdefault("qvl_phase", phase.name)
        self._overhead += self._clock() - ended
        if trouble and error is None:
            raise trouble
        return usage

    def session(self) -> Phase:
        """The whole process so far, loading included; its ``inner`` are all phases that have ended."""
        self._update_peaks()
        session = self._open[0]
        session.usage = self._usage(session, self._clock() - session._started, None)
        return session

    def alive(self) -> Reading | None:
        """What is allocated and reserved now; ``None`` while nothing can be measured."""
        return None if self.broken else self._allocator.read()

    def read_without_workspaces(self) -> Reading | None:
        """As :meth:`alive`, without cuBLAS's workspaces: any matrix product takes them again."""
        if self.alive() is not None:
            self._allocator.drop_workspaces()
        return self.alive()

    def reclaim(self, when: str) -> Reading | None:
        """Collect garbage, give cached memory back, and say what is still there; ``None`` as for :meth:`alive`."""
        if self.alive() is not None:
            gc.collect()
            with suppress(CudaBroken):
                self._guarded(self._allocator.release_cached, when)
        return self.alive()

    def holders(self, besides: frozenset[int] = frozenset()) -> tuple[Holder, ...]:
        """Who holds memory now, biggest first, but for the blocks at the addresses ``besides``."""
        return self._allocator.holders(besides)

    def probe(self, when: str) -> str:
        """Wait for the device; why CUDA refuses to work in this process, empty while it works."""
        if self.alive() is not None:
            with suppress(CudaBroken):
                self._guarded(self._allocator.synchronize, when)
        return self.broken

    def _usage(self, phase: Phase, seconds: float, error: BaseException | None) -> Usage:
        name = type(error).__name__ if error is not None else ""
        return phase._finished(seconds, self._allocator.why_not(), self.context, name)

    def _charged(self) -> list[Phase]:
        """The open phases that what happens now is charged to."""
        first = max((i for i, phase in enumerate(self._open) if phase._exclusive), default=0)
        return [phase for i, phase in enumerate(self._open) if i >= first or phase._always]

    def _update_peaks(self) -> Reading | None:
        """Carry the allocator's peaks into every open phase, then reset them; ``None`` before CUDA runs."""
        reading = self._allocator.read()
        if reading is None:
            return None
        process = self.process.read() if self.process else None
        for phase in self._charged():
            phase._update_peaks(reading, process)
        self._allocator.reset_peaks()
        return reading

    def _guarded(self, action: Callable[[], None], when: str) -> None:
        """Run what waits for the device; an error of CUDA there ends all measuring and says when it was noticed.

        Raises:
            CudaBroken: The device reports an error of earlier work.
        """
        try:
            action()
        except RuntimeError as error:
            self.cause = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.broken = f"CUDA broke {when}: {self.cause}"
            raise CudaBroken(f"{self.broken} (every later CUDA call of this process fails too)") from None

    def _keep_history(self, phase: Phase, usage: Usage) -> None:
        """Keep the allocation history of an ended phase, with the holders at its peak, if its ``keep`` wants it."""
        if phase._keep is None:
            return
        if usage.measured and (usage.error == "OutOfMemoryError" or phase._keep(usage)):
            phase.history = self._allocator.history()
        if phase._recording:
            self._allocator.stop_history()
        if phase.history:
            # A history begun for this phase is all its own; of a longer one, the two clocks differ a little.
            own = phase._recording
            events = [e for e in phase.history.events if own or e.time >= phase._began_us]
            before = "what was alive before (fixtures)"
            phase.holders = holders_at_peak(events, usage.alive_allocated, before)
