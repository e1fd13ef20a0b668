"""An allocator that does what a test tells it, to try VRAM limits and meters without a GPU."""

from __future__ import annotations

import itertools
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pytest_qvl.gpu.nvml import ProcessReading
from pytest_qvl.vram.allocator import Event, History, Reading
from pytest_qvl.vram.holders import Holder

if TYPE_CHECKING:
    from collections.abc import Iterator


class ScriptedAllocator:
    """Takes and frees bytes as told; caches what is freed, as torch's allocator does.

    Args:
        started: Whether CUDA is in use from the beginning; :meth:`take` starts it.
        reason: Why nothing can be measured until then.

    Attributes:
        trouble: When set, what the device answers to everything that waits for it.
        settled: How often cached memory was given back.
        workspaces: Addresses of blocks that a library keeps for its next call.
    """

    def __init__(self, *, started: bool = True, reason: str = "CUDA was never used") -> None:
        self.started, self.reason = started, reason
        self.trouble = ""
        self.settled = 0
        self.workspaces: list[int] = []
        self._blocks: dict[int, int] = {}
        self._names: dict[int, str] = {}
        self._addresses = itertools.count(1)
        self._allocated = self._reserved = self._peak_allocated = self._peak_reserved = 0
        self._events: list[Event] | None = None

    def take(self, size: int, where: str = "body") -> int:
        """Allocate ``size`` bytes; the address is what :meth:`free` wants back.

        Args:
            size: Bytes.
            where: Function that the history names.
        """
        self.started = True
        address = next(self._addresses)
        self._blocks[address], self._names[address] = size, where
        self._allocated += size
        self._reserved = max(self._reserved, self._allocated)
        self._peak_allocated = max(self._peak_allocated, self._allocated)
        self._peak_reserved = max(self._peak_reserved, self._reserved)
        self._record(Event("take", address, size, time.time() * 1e6, f"scripted/model.py:{size} {where}"))
        return address

    def free(self, address: int) -> None:
        """Give a block back to the cache."""
        size = self._blocks.pop(address)
        self._allocated -= size
        self._record(Event("free", address, size, time.time() * 1e6))

    @contextmanager
    def taken(self, size: int, where: str = "body") -> Iterator[None]:
        """Hold ``size`` bytes for a block."""
        address = self.take(size, where)
        try:
            yield
        finally:
            self.free(address)

    def read(self) -> Reading | None:
        """See :class:`pytest_qvl.vram.allocator.Allocator`."""
        if not self.started:
            return None
        return Reading(self._allocated, self._reserved, self._peak_allocated, self._peak_reserved)

    def why_not(self) -> str:
        """See :class:`pytest_qvl.vram.allocator.Allocator`."""
        return "" if self.started else self.reason

    def reset_peaks(self) -> None:
        """See :class:`pytest_qvl.vram.allocator.Allocator`."""
        self._peak_allocated, self._peak_reserved = self._allocated, self._reserved

    def synchronize(self) -> None:
        """See :class:`pytest_qvl.vram.allocator.Allocator`."""
        if self.trouble:
            raise RuntimeError(self.trouble)

    def release_cached(self) -> None:
        """See :class:`pytest_qvl.vram.allocator.Allocator`."""
        self.synchronize()
        self.drop_workspaces()
        self.settled += 1
        self._reserved = self._allocated

    def drop_workspaces(self) -> None:
        """See :class:`pytest_qvl.vram.allocator.Allocator`."""
        while self.workspaces:
            self.free(self.workspaces.pop())

    def holders(self, besides: frozenset[int]) -> tuple[Holder, ...]:
        """See :class:`pytest_qvl.vram.allocator.Allocator`."""
        left = [Holder(self._names[a], size, 1) for a, size in self._blocks.items() if a not in besides]
        return tuple(sorted(left, key=lambda holder: -holder.size))

    def start_history(self) -> bool:
        """See :class:`pytest_qvl.vram.allocator.Allocator`."""
        if not self.started or self._events is not None:
            return False
        self._events = []
        return True

    def stop_history(self) -> None:
        """See :class:`pytest_qvl.vram.allocator.Allocator`."""
        self._events = None

    def history(self) -> History | None:
        """See :class:`pytest_qvl.vram.allocator.Allocator`."""
        return None if self._events is None else History(tuple(self._events), {"scripted": len(self._events)})

    def _record(self, event: Event) -> None:
        if self._events is not None:
            self._events.append(event)


class ScriptedProcess:
    """A process that holds a CUDA context beside what the allocator reserved.

    Args:
        allocator: The allocator.
        context: Bytes of the context.
        source: What the reading claims to be.
    """

    def __init__(self, allocator: ScriptedAllocator, context: int, source: str = "process") -> None:
        self._allocator, self.context, self._device = allocator, context, source == "device"

    def read(self) -> ProcessReading | None:
        """Reserved bytes and the context; ``None`` before CUDA is in use."""
        reading = self._allocator.read()
        if reading is None:
            return None
        return ProcessReading(reading.reserved + self.context, "device" if self._device else "process")
