"""The GPU of this process: leased when its first GPU test is about to run, given back when the session ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qvl.gpu.errors import LeaseError
from pytest_qvl.vram.units import MiB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_qvl.gpu.lease import Lease
    from pytest_qvl.gpu.nvml import GpuProcess
    from pytest_qvl.report.process_results import LeasedGpu

# Less than any CUDA context, more than what a driver keeps on an idle card.
NOTEWORTHY = 64 * MiB
_SHOWN = 5


@dataclass
class ProcessGpu:
    """The one GPU that this process may use.

    Args:
        patience: Seconds to wait behind other runs.
        say: Called with a line to show while waiting.

    Attributes:
        lease: Held, once :meth:`take` has returned.
        busy: Who held memory of the GPU when it was leased; empty where nobody did.
    """

    patience: float
    say: Callable[[str], None]
    lease: Lease | None = None
    busy: str = ""
    _refused: LeaseError | None = None
    _verified: bool = field(default=False, repr=False)

    def take(self) -> Lease:
        """The lease, waiting for it the first time; a refusal comes again at once.

        Raises:
            NoGpu: Nothing is allowed, or there is none; says which.
            LeaseError: None can be had; a :class:`pytest_qvl.gpu.errors.LeaseTimeout` names who has them.
        """
        from pytest_qvl.gpu.lease import acquire
        from pytest_qvl.gpu.visible import VisibleDevicesError, visible_gpus

        if self._refused is not None:
            raise self._refused.with_traceback(None)
        if self.lease is None:
            try:
                self.lease = acquire(visible_gpus(), patience=self.patience, say=self.say)
            except (LeaseError, VisibleDevicesError) as error:
                self._refused = error if isinstance(error, LeaseError) else LeaseError(str(error))
                raise self._refused from None
            self.busy = "" if self.lease.inherited else others_on(self.lease.gpu.uuid)
        return self.lease

    def verify(self) -> None:
        """Once CUDA has started, see that it computes on the leased GPU; if not, lease the one it computes on.

        It does not where something had asked CUDA for its devices before the lease was taken: it then sees all
        that the caller allows, and its first one is the caller's first.

        Raises:
            LeaseError: That one cannot be had.
        """
        if self.lease is None or self._verified:
            return
        from pytest_qvl.gpu.lease import cuda_started

        if not cuda_started():
            return
        try:
            self.lease.verify()
        except LeaseError as error:
            self.say(f"{error}; leasing that one instead")
            self.release()
            self.take()
        self._verified = True

    def release(self) -> None:
        """Give the lease back, so that another process can take the GPU."""
        if self.lease is not None:
            self.lease.release()
            self.lease = None

    def uuid(self) -> str | None:
        """The leased GPU; without a lease the first that is allowed."""
        from pytest_qvl.gpu.visible import VisibleDevicesError, visible_gpus

        if self.lease is not None:
            return self.lease.gpu.uuid
        try:
            gpus = visible_gpus().gpus
        except VisibleDevicesError:
            return None
        return gpus[0].uuid if gpus else None

    def leased(self) -> LeasedGpu | None:
        """What summary and record say of the lease; ``None`` without one."""
        if self.lease is None:
            return None
        from pytest_qvl.report.process_results import LeasedGpu

        gpu = self.lease.gpu
        return LeasedGpu(str(gpu), gpu.name, gpu.index, round(self.lease.waited, 1), self.busy)


def others_on(uuid: str) -> str:
    """Who else holds memory of a GPU, by name, number and size; empty where nobody does or the driver hides it."""
    from pytest_qvl.gpu.lease import cuda_started
    from pytest_qvl.gpu.nvml import driver

    holdings = driver().holdings(uuid)
    if holdings is None:
        return ""
    parts = [_describe_process(process) for process in holdings.others[:_SHOWN]]
    if len(holdings.others) > _SHOWN:
        parts.append(f"{len(holdings.others) - _SHOWN} more")
    if holdings.unlisted >= NOTEWORTHY:
        parts.append(f"{format_bytes(holdings.unlisted)} by processes that the driver does not list")
    if parts and holdings.own is None and cuda_started():
        parts.append("this process among them, which the driver does not tell apart")
    return ", ".join(parts)


def _describe_process(process: GpuProcess) -> str:
    size = "an unknown amount" if process.used is None else format_bytes(process.used)
    # The driver gives the path of the program; it comes from a stranger and is shown on a terminal.
    name = "".join(c if c.isprintable() else "?" for c in Path(process.name).name)[:80]
    return f"{size} by {name}" if name == f"pid {process.pid}" else f"{size} by {name} (pid {process.pid})"
