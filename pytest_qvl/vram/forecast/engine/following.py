"""Which storages are on a trace: allocations when they are first seen, frees when the last tensor lets go of them."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from pytest_qvl.vram.forecast.engine.dataless import DatalessTensor, Storage

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from pytest_qvl.vram.forecast.engine.trace import AllocationTrace, Kind


class Following:
    """Storages of tensors with and without data, on the trace of the present run.

    Args:
        trace: Where to record.

    Attributes:
        trace: The same, or the one it was continued on.
        counting: Whether what is seen for the first time is on the device.
    """

    def __init__(self, trace: AllocationTrace) -> None:
        self.trace = trace
        self.counting = True
        # Runs continue a common beginning one after the other.
        self._run = 0
        self._common = 0
        self._numbers: dict[int, int] = {}
        self._watches: dict[int, weakref.ref[Any]] = {}

    def continue_on(self, trace: AllocationTrace, common: int) -> None:
        """As :meth:`~pytest_qvl.vram.forecast.engine.recorder.Recorder.continue_on`."""
        self.trace = trace
        self._run += 1
        self._common = common
        # Over a copy, and without insisting: a garbage collection at any time takes numbers away by itself.
        for key, number in self._numbers.copy().items():
            if number >= common:
                self._numbers.pop(key, None)
                self._watches.pop(key, None)

    def follow(self, storage: Storage, kind: Kind) -> None:
        """Note the allocation of a storage without data, unless that was done."""
        if storage.run == self._run or not self.counting or storage.nbytes == 0 or self._is_followed(storage):
            return
        self._number(storage, self.trace.alloc(storage.nbytes, kind))

    def follow_reserved(self, storage: Storage) -> int:
        """The same for one whose allocation is recorded later; returns its number."""
        number = self.trace.reserve()
        self._number(storage, number)
        return number

    def _number(self, storage: Storage, number: int) -> None:
        storage.number = number
        storage.run = self._run
        storage.released = self._storage_released

    def follow_real(self, storage: Any, kind: Kind) -> None:
        """The same for one of torch's."""
        key = storage._cdata
        if key in self._numbers or not self.counting:
            return
        size = storage.nbytes()
        if size == 0:
            return
        self._numbers[key] = self.trace.alloc(size, kind)
        self._watches[key] = weakref.ref(storage, self._release(key))

    def number_of(self, tensor: torch.Tensor) -> int | None:
        """The allocation of a tensor's storage; ``None`` where it is not followed."""
        if isinstance(tensor, DatalessTensor):
            return tensor.storage_.number if self._is_followed(tensor.storage_) else None
        return self._numbers.get(tensor.untyped_storage()._cdata)

    def _is_followed(self, storage: Storage) -> bool:
        """Whether it is on the trace: followed in this run or in the beginning that all have in common."""
        return storage.run == self._run or 0 <= storage.number < self._common

    def _storage_released(self, storage: Storage) -> None:
        if self._is_followed(storage):
            self.trace.free(storage.number)

    def _release(self, key: int) -> Callable[[Any], None]:
        def released(_: Any) -> None:
            del self._watches[key]
            self.trace.free(self._numbers.pop(key))

        return released
