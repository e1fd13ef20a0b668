"""What happened to device memory, in order: allocations, frees, phases. And its replay through the allocator.

Recording and replaying are apart on purpose: one recorded run answers "how much at the peak?", "how much is
reserved?" and "does it fit into so many bytes?" by replays, without running the model again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from pytest_qvl.vram.forecast.engine.allocator import CachingAllocator, CardFullError, ExpandableAllocator

Kind = Literal[
    "weights",
    "adapters",
    "optimizer",
    "gradients",
    "inputs",
    "activations",
    "logits",
    "cache",
    "workspace",
]
KINDS: tuple[Kind, ...] = (
    "weights",
    "adapters",
    "optimizer",
    "gradients",
    "cache",
    "inputs",
    "activations",
    "logits",
    "workspace",
)
_INDEX = {kind: index for index, kind in enumerate(KINDS)}
# Of what libraries keep for themselves, as it stands in an event.
OF_LIBRARIES = _INDEX["workspace"]

ALLOC, FREE, RELABEL, _PHASE, _EMPTY_CACHE = range(5)
_CACHE_EMPTIED = (_EMPTY_CACHE, -1, 0, 0)


# What happened; the number of the allocation or the index of the phase; the bytes of an allocation; its kind.
Event = tuple[int, int, int, int]


def is_own(event: Event) -> bool:
    """Whether it is an allocation of the model rather than of a library, which makes one for all of it."""
    return event[0] == ALLOC and event[3] != OF_LIBRARIES


def over_within(events: Sequence[Event]) -> set[int]:
    """Numbers of allocations that begin and end among those events: another run of them can have the same numbers."""
    begun: set[int] = set()
    alive: set[int] = set()
    for code, number, _, _ in events:
        if code == ALLOC:
            begun.add(number)
            alive.add(number)
        elif code == FREE:
            alive.discard(number)
    return begun - alive


class AllocationTrace:
    """Events of one run; every allocation gets the next number, starting at 0, or one whose allocation is over.

    Args:
        expandable: Whether the process has set ``expandable_segments:True``.

    Attributes:
        expandable: As given.
        events: What happened, in order.
        phases: Names of phases.
        twins: Allocations of what did not run, each list freed with the allocation that stands for it; ``None`` while
            what stands for others runs.
    """

    def __init__(self, *, expandable: bool = False) -> None:
        self.expandable = expandable
        self.events: list[Event] = []
        self.phases: list[str] = []
        self._allocations = 0
        self._closed = False
        self.twins: dict[int, list[int]] | None = {}

    def alloc(self, size: int, kind: Kind) -> int:
        """Record an allocation of ``size`` bytes; returns its number."""
        number = self.reserve()
        self.events.append((ALLOC, number, size, _INDEX[kind]))
        return number

    def reserve(self) -> int:
        """The number of an allocation that is recorded later."""
        self._allocations += 1
        return self._allocations - 1

    def free(self, number: int) -> None:
        """Record that allocation ``number`` was freed."""
        if not self._closed:
            self.events.append((FREE, number, 0, 0))
            if self.twins:
                self.events.extend((FREE, twin, 0, 0) for twin in self.twins.pop(number, ()))

    @property
    def allocations(self) -> int:
        """How many allocations were recorded."""
        return self._allocations

    def fork(self) -> AllocationTrace:
        """An independent copy to which another continuation can be recorded."""
        copy = AllocationTrace(expandable=self.expandable)
        copy.events = list(self.events)
        copy.phases = list(self.phases)
        copy._allocations = self._allocations
        return copy

    def close(self) -> None:
        """The run is over; what Python frees from now on does not belong to it."""
        self._closed = True

    def relabel(self, number: int, kind: Kind) -> None:
        """From here on, allocation ``number`` counts as ``kind`` (a gradient kept, a KV cache)."""
        self.events.append((RELABEL, number, 0, _INDEX[kind]))

    def phase(self, name: str) -> None:
        """Everything from here on belongs to phase ``name``; a name may come back later."""
        self.events.append((_PHASE, self._phase_index(name), 0, 0))

    def empty_cache(self) -> None:
        """Record a ``torch.cuda.empty_cache()``."""
        self.events.append(_CACHE_EMPTIED)

    def empty_cache_before(self, phase: str) -> None:
        """The same, where a phase first begins: what a measurement does that builds one model for several runs.

        Raises:
            ValueError: There is no such phase.
        """
        begins = self.events.index((_PHASE, self.phases.index(phase), 0, 0))
        self.events.insert(begins, _CACHE_EMPTIED)

    def take_step(self, start: int, renamed: Mapping[str, str]) -> Step:
        """What happened since ``start`` as a step that :meth:`repeat` can make again, without what stays of it.

        Args:
            start: How many events there were when it began.
            renamed: Other names for the phases of this first one.
        """
        with without_collector():
            over = over_within(self.events[start:])
            events = tuple(event for event in self.events[start:] if event[0] == _PHASE or event[1] in over)
        names = dict(enumerate(self.phases))
        for index in range(start, len(self.events)):
            code, number, size, _ = self.events[index]
            if code == _PHASE and names[number] in renamed:
                # What it is called in the step that repeats stays known, for :class:`Failure`.
                self.events[index] = (code, self._phase_index(renamed[names[number]]), size, number + 1)
        return Step(events)

    def repeat(self, step: Step) -> None:
        """The events of a step once more: its allocations are over, so that they can have the same numbers."""
        self.events += step.events

    def most_alive(self) -> int:
        """Most bytes that are alive at once: no allocator can do with less."""
        sizes = [0] * self._allocations
        alive = most = 0
        for code, number, size, _ in self.events:
            if code == ALLOC:
                sizes[number] = size
                alive += size
                most = max(most, alive)
            elif code == FREE:
                alive -= sizes[number]
        return most

    def _phase_index(self, name: str) -> int:
        if name not in self.phases:
            self.phases.append(name)
        return self.phases.index(name)


@dataclass(frozen=True)
class Step:
    """A step to be repeated: what begins and ends within it, and phases."""

    events: tuple[Event, ...]


@dataclass
class PhaseBytes:
    """Device memory of one phase, in bytes.

    Attributes:
        name: The phase.
        peak_allocated: Highest ``memory_allocated`` while the phase ran, what was already live included.
        peak_reserved: Highest ``memory_reserved`` while it ran, starting from an emptied cache.
        by_kind: What was live at the allocated peak; sums to :attr:`peak_allocated`.
        start_allocated: Bytes live when the phase began.
        end_allocated: Bytes live when the phase (last) ended.
    """

    name: str
    peak_allocated: int = -1
    peak_reserved: int = 0
    by_kind: dict[Kind, int] = field(default_factory=dict)
    start_allocated: int = 0
    end_allocated: int = 0


@dataclass(frozen=True)
class Failure:
    """Where a run with a limit ran out of memory.

    Attributes:
        phase: The phase that failed; of a first step by its name in the one that repeats.
        requested: Bytes of the allocation that failed.
    """

    phase: str
    requested: int


@dataclass
class Replay:
    """A trace run through the caching allocator.

    Attributes:
        phases: Bytes per phase, in order of first appearance.
        failure: Where it ran out of memory under the limit; ``None`` if it fitted.
        met_limit: Whether cached segments had to be given back for the limit: without one, the phases differ.
    """

    phases: dict[str, PhaseBytes]
    failure: Failure | None = None
    met_limit: bool = False


Watcher = Callable[[str, tuple[int, ...]], None]


def replay(
    trace: AllocationTrace,
    *,
    limit: int | None = None,
    watch: Watcher | None = None,
    watched: Collection[str] | None = None,
) -> Replay:
    """Run ``trace`` through a caching allocator.

    Args:
        trace: The recorded run.
        limit: Bytes the process may reserve.
        watch: Called after every event that changed the live bytes, with the phase's name and the live bytes
            by kind (in the order of :data:`KINDS`).
        watched: Phases whose events it is called for; by default every one.
    """
    with without_collector():
        return _replay(trace, limit, watch, watched)


@contextmanager
def without_collector() -> Iterator[None]:
    """Hundreds of thousands of objects are made inside and no garbage: looking for some takes a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _replay(
    trace: AllocationTrace, limit: int | None, watch: Watcher | None, watched: Collection[str] | None
) -> Replay:
    allocator = (ExpandableAllocator if trace.expandable else CachingAllocator)(limit)
    blocks: list[Any] = [None] * trace.allocations
    kinds = [0] * trace.allocations
    live = [0] * len(KINDS)
    phases: dict[str, PhaseBytes] = {}
    # What was live at the highest point of each phase.
    highest: dict[str, tuple[int, ...]] = {}
    now, own_name = PhaseBytes(""), ""
    watching: Watcher | None = None
    failure: Failure | None = None
    for code, number, asked, kind in trace.events:
        if code == FREE:
            block = blocks[number]
            live[kinds[number]] -= block.size
            allocator.free(block)
        elif code == RELABEL:
            live[kinds[number]] -= blocks[number].size
            live[kind] += blocks[number].size
            kinds[number] = kind
        elif code == _EMPTY_CACHE:
            allocator.empty_cache()
            continue
        else:  # all that a peak can come with: a phase begins with what the one before left
            if code == ALLOC:
                try:
                    block = allocator.malloc(asked)
                except CardFullError as error:
                    failure = Failure(own_name, error.requested)
                    break
                blocks[number], kinds[number] = block, kind
                live[kind] += block.size
            else:
                name = trace.phases[number]
                own_name = trace.phases[kind - 1] if kind else name
                now.end_allocated = allocator.allocated
                now = phases.setdefault(name, PhaseBytes(name, start_allocated=allocator.allocated))
                watching = watch if watched is None or name in watched else None
            if allocator.allocated > now.peak_allocated:
                now.peak_allocated = allocator.allocated
                highest[now.name] = tuple(live)
            now.peak_reserved = max(now.peak_reserved, allocator.reserved)
        if watching is not None:
            watching(now.name, tuple(live))
    now.end_allocated = allocator.allocated
    for name, phase in phases.items():
        phase.by_kind = dict(zip(KINDS, highest[name], strict=True))
    return Replay(phases, failure, allocator.met_limit)
