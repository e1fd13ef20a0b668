"""The allocator whose peaks are measured, behind a contract small enough for a scripted one in a test."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pytest_qvl.vram.survivors import tensors_alive

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pytest_qvl.vram.holders import Holder

# Ring buffer of the allocation history: about ten 7B training steps, and some 100 MB of host memory at most.
HISTORY_EVENTS = 100_000


@dataclass(frozen=True)
class Reading:
    """Bytes now, and their peaks since the peaks were last reset."""

    allocated: int
    reserved: int
    peak_allocated: int
    peak_reserved: int


@dataclass(frozen=True)
class Event:
    """One line of the allocation history.

    Attributes:
        action: Whether a block was taken or given back.
        address: Names the block between the two.
        size: Bytes.
        time: Microseconds since the epoch.
        where: The line that asked for it, ``package/module.py:12 function``; empty where none was recorded.
    """

    action: Literal["take", "free"]
    address: int
    size: int
    time: float
    where: str = ""


@dataclass(frozen=True)
class History:
    """What was allocated and freed, and the allocator's own snapshot.

    Attributes:
        events: Oldest first.
        snapshot: What ``pickle`` writes for the viewer at https://docs.pytorch.org/memory_viz; ``None``
            without one.
    """

    events: tuple[Event, ...]
    snapshot: Any = None


class Allocator(Protocol):
    """An allocator with peaks that one owner resets."""

    def read(self) -> Reading | None:
        """Bytes now and their peaks; ``None`` while nothing can be measured."""

    def why_not(self) -> str:
        """Why nothing can be measured, in a few words; empty when it can."""

    def reset_peaks(self) -> None:
        """Let peaks start again from what is allocated now."""

    def synchronize(self) -> None:
        """Wait for the device.

        Raises:
            RuntimeError: The device reports an error of earlier work.
        """

    def release_cached(self) -> None:
        """Give cached memory back, so that what is reserved does not depend on what ran before.

        Raises:
            RuntimeError: The device reports an error of earlier work.
        """

    def drop_workspaces(self) -> None:
        """Let go of what libraries keep for their next call."""

    def holders(self, besides: frozenset[int]) -> tuple[Holder, ...]:
        """Who holds memory now, biggest first, but for the blocks at the addresses ``besides``."""

    def start_history(self) -> bool:
        """Record allocations; ``False`` where somebody else records already, whose history is then used."""

    def stop_history(self) -> None:
        """Stop recording and drop what was recorded."""

    def history(self) -> History | None:
        """The recorded history; ``None`` where the allocator keeps none."""


class TorchAllocator:
    """Torch's caching allocator on one CUDA device.

    Neither imports torch nor starts CUDA: before somebody else has done both, there is nothing to measure.

    Args:
        device: Index among the devices of this process (a lease shows it exactly one).
    """

    def __init__(self, device: int = 0) -> None:
        self._device = device

    def read(self) -> Reading | None:
        """See :class:`Allocator`."""
        torch = _torch_on_cuda()
        if torch is None:
            return None
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)
        allocated, reserved = stats["allocated_bytes"]["all"], stats["reserved_bytes"]["all"]
        return Reading(allocated["current"], reserved["current"], allocated["peak"], reserved["peak"])

    def why_not(self) -> str:
        """See :class:`Allocator`."""
        torch = sys.modules.get("torch")
        if torch is None:
            return "torch was never imported"
        if torch.version.cuda is None:
            return "no CUDA: this torch is built without it"
        return "" if torch.cuda.is_initialized() else "CUDA was never used"

    def reset_peaks(self) -> None:
        """See :class:`Allocator`."""
        sys.modules["torch"].cuda.reset_peak_memory_stats(self._device)

    def synchronize(self) -> None:
        """See :class:`Allocator`."""
        sys.modules["torch"].cuda.synchronize(self._device)

    def release_cached(self) -> None:
        """See :class:`Allocator`."""
        self.drop_workspaces()
        sys.modules["torch"].cuda.empty_cache()

    def drop_workspaces(self) -> None:
        """See :class:`Allocator`."""
        # cuBLAS keeps a workspace (32 MiB on Hopper) from the first matrix product on: left alone, it would
        # be charged to whichever test came first.
        clear: Any = getattr(sys.modules["torch"]._C, "_cuda_clearCublasWorkspaces", None)
        if clear:
            clear()

    def holders(self, besides: frozenset[int]) -> tuple[Holder, ...]:
        """See :class:`Allocator`; the tensors that Python knows."""
        return tensors_alive(sys.modules["torch"], "cuda", besides)

    def start_history(self) -> bool:
        """See :class:`Allocator`."""
        torch = _torch_on_cuda()
        if torch is None or self._recorded_already(torch):
            return False
        torch.cuda.memory._record_memory_history(
            "all", context="alloc", stacks="python", max_entries=HISTORY_EVENTS, device=self._device
        )
        return True

    def stop_history(self) -> None:
        """See :class:`Allocator`."""
        sys.modules["torch"].cuda.memory._record_memory_history(None, device=self._device)

    def history(self) -> History | None:
        """See :class:`Allocator`."""
        torch = _torch_on_cuda()
        if torch is None:
            return None
        try:
            snapshot = torch.cuda.memory._snapshot(self._device)
        except RuntimeError:  # cudaMallocAsync keeps none
            return None
        trace = snapshot["device_traces"][self._device]
        return History(tuple(_events(trace, str(Path(torch.__file__).parent))), snapshot)

    @staticmethod
    def _recorded_already(torch: Any) -> bool:
        asked: Any = getattr(torch._C, "_cuda_isHistoryEnabled", None)
        return bool(asked and asked())


def _torch_on_cuda() -> Any:
    torch = sys.modules.get("torch")
    return torch if torch and hasattr(torch, "cuda") and torch.cuda.is_initialized() else None


# Statistics count a block as freed when its owner lets go, not when the last stream is through with it.
_ACTIONS: dict[str, Literal["take", "free"]] = {"alloc": "take", "free_requested": "free"}


def _events(trace: list[dict[str, Any]], torch_folder: str) -> Iterator[Event]:
    for entry in trace:
        action = _ACTIONS.get(entry["action"])
        if action:
            where = blame(entry.get("frames", ()), torch_folder)
            yield Event(action, entry["addr"], entry["size"], entry["time_us"], where)


def blame(frames: Sequence[Mapping[str, Any]], torch_folder: str) -> str:
    """The innermost line outside torch, which asked torch for memory; torch's own where all are inside.

    Args:
        frames: With ``filename``, ``line`` and ``name``, innermost first.
        torch_folder: Where torch is installed.
    """
    if not frames:
        return ""
    frame = next((f for f in frames if not f["filename"].startswith(torch_folder)), frames[0])
    return f"{'/'.join(Path(frame['filename']).parts[-2:])}:{frame['line']} {frame['name']}"
