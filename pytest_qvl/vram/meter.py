"""Peak VRAM by phase, in three numbers that are always named.

* *allocated*: what tensors occupied, by torch's allocator. The same from run to run.
* *reserved*: what the allocator had taken from the driver for them, with its gaps.
* *process*: what the driver says this process holds, with CUDA's context, kernels and libraries.

What decides whether a card suffices is *fit*: peak reserved + context, the context being what the process
holds beyond what the allocator reserved (on another card than the real one, that card's own context).

Torch has one pair of peaks for the whole process, and whoever resets them resets them for all. The meter is
their one owner: at each border of a phase it folds the peaks into every phase that is open, then resets them.
So phases nest, and a phase inside another takes nothing from it. Code under measurement that itself calls
``torch.cuda.reset_peak_memory_stats`` hides from the meter what it had reached before.
"""

from __future__ import annotations

import gc
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pytest_qvl.evidence import Evidence, Figure, Judge
from pytest_qvl.vram.allocator import Allocator, History, Reading, TorchAllocator
from pytest_qvl.vram.holders import Holder, holders_at_peak
from pytest_qvl.vram.units import GiB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pytest_qvl.gpu.nvml import ProcessReading

Number = Literal["allocated", "reserved", "process", "fit"]
NUMBERS: tuple[Number, ...] = ("allocated", "reserved", "process", "fit")
_SHOWN_HOLDERS = 5
_SHOWN_PHASES = 8


class CudaBroken(RuntimeError):
    """Work on the GPU failed so badly that CUDA refuses everything else in this process."""


class ProcessMeter(Protocol):
    """Tells what this process holds of the GPU."""

    def read(self) -> ProcessReading | None:
        """Bytes now; ``None`` where nobody can tell."""


@dataclass(frozen=True)
class Usage:
    """What one phase used; bytes and seconds. All numbers are 0 where nothing was measured.

    Attributes:
        name: The phase.
        seconds: From its start to its end with the device synchronised, without the meter's own work.
        reason: Why nothing was measured; empty when it was.
        allocated: Peak allocated.
        reserved: Peak reserved.
        process: What the process held at most: the highest reading, taken at borders of phases, or peak reserved
            with what the process was seen to hold beyond it, whichever is more; ``None`` where the driver does not
            tell.
        process_source: Where that comes from: ``process``, ``device`` (what the whole device gained), or
            empty.
        context: What the process holds beyond the allocator, or what the card to fit is known to need;
            ``None`` when neither is known.
        alive_allocated: Allocated when the phase began: what fixtures and earlier code left.
        alive_reserved: Reserved when the phase began.
        error: Type of the exception that ended it.
    """

    name: str
    seconds: float = 0.0
    reason: str = ""
    allocated: int = 0
    reserved: int = 0
    process: int | None = None
    process_source: str = ""
    context: int | None = None
    alive_allocated: int = 0
    alive_reserved: int = 0
    error: str = ""

    @property
    def measured(self) -> bool:
        """Whether the numbers mean anything."""
        return not self.reason

    @property
    def fit(self) -> int | None:
        """Peak reserved + context, what a card must have; ``None`` where the context is unknown."""
        return None if self.context is None else self.reserved + self.context

    def number(self, of: Number) -> int | None:
        """One of the numbers by name; ``None`` where it was not measured."""
        return getattr(self, of) if self.measured else None

    def missing(self, of: Number) -> str:
        """Why that number was not measured; empty when it was."""
        if self.number(of) is not None:
            return ""
        return self.reason or (
            f"the driver does not tell the memory of this process, which {of!r} needs (no NVML library, or a "
            "container without the 'utility' capability); 'reserved' needs no driver"
        )

    def figures(self) -> tuple[Figure, ...]:
        """The numbers in GiB and the seconds, for evidence and records."""
        numbers = [
            Figure(f"{self.name}: peak {of}", value / GiB, unit="GiB")
            for of in NUMBERS
            if (value := self.number(of)) is not None
        ]
        return (*numbers, Figure(f"{self.name}: time", self.seconds, unit="s"))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the record and for the way from an xdist worker; :class:`Usage` takes it back."""
        return asdict(self)


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
    _apart: bool = False
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

    def _fold(self, reading: Reading, process: ProcessReading | None) -> None:
        self._seen = True
        self._allocated = max(self._allocated, reading.peak_allocated)
        self._reserved = max(self._reserved, reading.peak_reserved)
        if process is not None:
            if self._process is None or process.used > self._process.used:
                self._process = process
            self._context = max(self._context or 0, process.used - reading.reserved)

    def _finished(self, seconds: float, why_not: str, context: int | None, error: str) -> Usage:
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
        apart: bool = False,
        settle: bool = True,
        keep: Callable[[Usage], bool] | None = None,
    ) -> Iterator[Phase]:
        """Measure a block; see :meth:`begin` for the arguments.

        Raises:
            CudaBroken: Work of the block (or, on entry, work before it) broke CUDA.
        """
        phase = self.begin(name, apart=apart, settle=settle, keep=keep)
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
        apart: bool = False,
        settle: bool = True,
        keep: Callable[[Usage], bool] | None = None,
    ) -> Phase:
        """Begin a phase where no ``with`` block fits; :meth:`end` it. Phases may end in any order.

        Args:
            name: What is measured.
            apart: Charge it to nobody but itself and the session: loading a model that many tests share.
            settle: Collect garbage, wait for the device and empty the allocator's cache first, so that what
                is reserved does not depend on what ran before.
            keep: Given the usage at the end, says whether to keep the allocation history and name the
                holders. The history is recorded from the beginning, which costs some microseconds per
                allocation. It is kept in any case if the phase runs out of memory.

        Raises:
            CudaBroken: Earlier work broke CUDA, and this is the first to see it.
        """
        entered = self._clock()
        phase = Phase(name, _apart=apart, _keep=keep, _unmeasured=self.broken)
        if not self.broken and self._fold() is not None:
            if settle:
                gc.collect()
                self._touch(self._allocator.settle, f"before {name!r}")
            self._touch(self._allocator.synchronize, f"before {name!r}")
            phase._alive = self._fold()
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
                self._touch(self._allocator.synchronize, f"in {phase.name!r}")
            except CudaBroken as broken:
                trouble = broken
        ended = self._clock()
        self._fold()
        seconds = ended - phase._started - (self._overhead - phase._overhead)
        usage = phase.usage = self._usage(phase, seconds, error)
        for outer in self._charged():
            if outer is not phase:
                outer.inner.append(usage)
        self._open.remove(phase)
        self._keep_history(phase, usage)
        if phase._apart and error is None and trouble is None and usage.measured:
            # What it left in the cache must not count as reserved by whoever comes next.
            gc.collect()
            self._touch(self._allocator.settle, f"after {phase.name!r}")
            self._allocator.reset_peaks()
        if error is not None:
            vars(error).setdefault("qvl_phase", phase.name)
        self._overhead += self._clock() - ended
        if trouble and error is None:
            raise trouble
        return usage

    def session(self) -> Phase:
        """The whole process so far, loading included; its ``inner`` are all phases that have ended."""
        self._fold()
        session = self._open[0]
        session.usage = self._usage(session, self._clock() - session._started, None)
        return session

    def alive(self) -> Reading | None:
        """What is allocated and reserved now; ``None`` while nothing can be measured."""
        return None if self.broken else self._allocator.read()

    def at_rest(self) -> Reading | None:
        """The same without cuBLAS's workspaces, which come with any matrix product and are soon taken again."""
        if self.alive() is not None:
            self._allocator.drop_workspaces()
        return self.alive()

    def reclaim(self, when: str) -> Reading | None:
        """Collect garbage, give cached memory back, and say what is still there; ``None`` as for :meth:`alive`."""
        if self.alive() is not None:
            gc.collect()
            with suppress(CudaBroken):
                self._touch(self._allocator.settle, when)
        return self.alive()

    def holders(self, besides: frozenset[int] = frozenset()) -> tuple[Holder, ...]:
        """Who holds memory now, biggest first, but for the blocks at the addresses ``besides``."""
        return self._allocator.holders(besides)

    def probe(self, when: str) -> str:
        """Wait for the device; why CUDA refuses to work in this process, empty while it works."""
        if self.alive() is not None:
            with suppress(CudaBroken):
                self._touch(self._allocator.synchronize, when)
        return self.broken

    def _usage(self, phase: Phase, seconds: float, error: BaseException | None) -> Usage:
        name = type(error).__name__ if error is not None else ""
        return phase._finished(seconds, self._allocator.why_not(), self.context, name)

    def _charged(self) -> list[Phase]:
        """The open phases that what happens now is charged to."""
        apart = max((i for i, phase in enumerate(self._open) if phase._apart), default=0)
        return [phase for i, phase in enumerate(self._open) if i >= apart or phase._always]

    def _fold(self) -> Reading | None:
        reading = self._allocator.read()
        if reading is None:
            return None
        process = self.process.read() if self.process else None
        for phase in self._charged():
            phase._fold(reading, process)
        self._allocator.reset_peaks()
        return reading

    def _touch(self, action: Callable[[], None], when: str) -> None:
        try:
            action()
        except RuntimeError as error:
            self.cause = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.broken = f"CUDA broke {when}: {self.cause}"
            raise CudaBroken(f"{self.broken} (every later CUDA call of this process fails too)") from None

    def _keep_history(self, phase: Phase, usage: Usage) -> None:
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


def hold_limit(phase: Phase, limit: int, of: Number) -> Evidence:
    """Hold an ended phase to a limit.

    Args:
        phase: Ended; its number must have been measured.
        limit: Bytes.
        of: Which number the limit bounds.

    Raises:
        CheckFailed: Above the limit. Names phase, number, limit, the highest phase inside and the biggest
            holders.
    """
    usage = phase.usage
    value = usage.number(of) if usage else None
    if usage is None or value is None:
        raise ValueError(f"{phase.name!r} has no measured {of}, so it can be held to no limit")
    judge = Judge("limit_vram", f"{of} stays within {format_bytes(limit)}")
    judge.at_most(
        f"peak {of}",
        value / GiB,
        limit / GiB,
        unit="GiB",
        else_say=(
            f"{_spelled(usage, of)} is {format_bytes(value - limit)} above the limit of "
            f"{format_bytes(limit)} in {usage.name}"
        ),
    )
    judge.note(f"{format_bytes(usage.alive_allocated)} were allocated before it began (fixtures and earlier code)")
    for line in tell_holders(phase) if value > limit else ():
        judge.note(line)
    inner = sorted(phase.inner, key=lambda u: -(u.number(of) or 0))[:_SHOWN_PHASES]
    rows = [*(_row(u.name, u) for u in inner), _row("altogether", usage)]
    return judge.verdict(("phase", "allocated", "reserved", "process", "fit", "seconds"), rows)


def tell_holders(phase: Phase) -> list[str]:
    """The biggest holders at the peak of an ended phase, one line each, or why they are not known."""
    if not phase.holders:
        return ["who held it was not recorded (CUDA was started inside, or the allocator keeps no history)"]
    lines = []
    for holder in phase.holders[:_SHOWN_HOLDERS]:
        blocks = f" in {holder.blocks} blocks" if holder.blocks > 1 else ""
        lines.append(f"at the peak {format_bytes(holder.size)}{blocks} held by {holder.where}")
    return lines


def _spelled(usage: Usage, of: Number) -> str:
    value = format_bytes(usage.number(of) or 0)
    if of == "fit":
        context = format_bytes(usage.context or 0)
        return f"fit {value} (peak reserved {format_bytes(usage.reserved)} + context {context})"
    if of == "process":
        source = "by the driver's process list" if usage.process_source == "process" else "gained by the whole device"
        return f"process {value} ({source})"
    return f"peak {of} {value}"


def _row(name: str, usage: Usage) -> Sequence[str | float]:
    numbers = [usage.number(of) for of in NUMBERS]
    return (name, *("-" if n is None else format_bytes(n) for n in numbers), round(usage.seconds, 3))
