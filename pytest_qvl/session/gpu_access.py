"""What a GPU test gets before it runs: a leased GPU on which CUDA works, or one line that says why not."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import pytest

from pytest_qvl.gpu.errors import LeaseError, LeaseTimeout, NoGpu
from pytest_qvl.session.errors import CudaUnusable, UserError
from pytest_qvl.session.mark_expressions import asks_for_gpus
from pytest_qvl.session.process_gpu import ProcessGpu
from pytest_qvl.session.targets import NEEDS_CUDA, on_cuda

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_qvl.options import Settings
    from pytest_qvl.vram.meter import Meter
    from pytest_qvl.vram.usage import Usage


def is_gpu(item: pytest.Item) -> bool:
    """Whether a test executes on CUDA."""
    return item.get_closest_marker("gpu") is not None


class GpuAccess:
    """Gives a GPU test its GPU, or the reason why there is none; one per process.

    Args:
        config: pytest's configuration.
        settings: The run's.
        meter: The one meter of this process.
        say: Shows a line to whoever waits.

    Attributes:
        gpu: The GPU of this process.
        breaker: The test that broke CUDA in this process.
    """

    def __init__(self, config: pytest.Config, settings: Settings, meter: Meter, say: Callable[[str], None]) -> None:
        self._config, self._settings, self._meter = config, settings, meter
        self.gpu = ProcessGpu(settings.gpu_patience, say)
        self.breaker = ""
        self._refused_at = ""

    @property
    def broken(self) -> str:
        """Why CUDA refuses to work in this process; empty while it works."""
        return self._meter.cause

    def enter(self, item: pytest.Item) -> None:
        """Lease a GPU for a GPU test before its fixtures are set up; do nothing for any other test.

        Raises:
            CudaUnusable: Work before it broke CUDA in this process.
            UserError: There are GPUs, and this run does not get one.
        """
        if not is_gpu(item) or getattr(self._config.option, "setupplan", False):
            return
        if self.note_broken("work outside of GPU tests", "before a GPU test"):
            raise CudaUnusable(self.breaker, self.broken)
        try:
            if on_cuda(item):
                self.need_cuda()
            elif self._concerns(item.session):
                self._lease_for_own_test()
        except LeaseError as error:
            first, self._refused_at = self._refused_at, self._refused_at or item.nodeid
            hint = " (--qvl-gpu-patience)" if isinstance(error, LeaseTimeout) else ""
            raise UserError(f"not run: see the error of {first}" if first else f"{error}{hint}") from None

    def need_cuda(self) -> None:
        """Lease a GPU and start CUDA on it; skip the test, with the reason, where there is none to be had.

        Raises:
            LeaseError: There are GPUs, and this run does not get one.
        """
        import torch

        from pytest_qvl.gpu.nvml import ProcessMemory

        if torch.version.cuda is None:
            pytest.skip(f"{NEEDS_CUDA}this PyTorch is a CPU build")
        try:
            lease = self.gpu.take()
        except NoGpu as nothing:
            hint = "; CUDA works all the same, so name its GPU by UUID in CUDA_VISIBLE_DEVICES"
            pytest.skip(f"{NEEDS_CUDA}{nothing}{hint if torch.cuda.is_available() else ''}")
        if self._meter.process is None:
            # From before CUDA starts on, so that it sees the context come.
            self._meter.process = ProcessMemory(lease.gpu.uuid)
        if not torch.cuda.is_available():
            pytest.skip(f"{NEEDS_CUDA}the driver shows {lease.gpu}, but CUDA does not start on it")
        cast("Any", torch.cuda).init()
        self.gpu.verify()
        if self.gpu.take() is not lease:
            self._meter.process = ProcessMemory(self.gpu.take().gpu.uuid)

    def verify(self) -> None:
        """Make sure, once CUDA has started anywhere in this process, that it computes on the leased GPU.

        Raises:
            UserError: It computes on another, which cannot be had.
        """
        try:
            self.gpu.verify()
        except LeaseError as error:
            raise UserError(str(error)) from None

    def note_broken(self, by: str, when: str) -> bool:
        """Ask the device whether CUDA is broken; if so, and nobody has been found out before, ``by`` has done it."""
        if self._meter.probe(when):
            self.breaker = self.breaker or by
        return bool(self.breaker)

    def vram(self) -> tuple[Usage, tuple[Usage, ...]]:
        """Peak VRAM of this process, as a whole and by phase."""
        session = self._meter.session()
        assert session.usage is not None
        return session.usage, tuple(session.inner)

    def _concerns(self, session: pytest.Session) -> bool:
        # A mark named gpu is not ours alone: where nothing else of the run is about us, it is left in peace.
        return asks_for_gpus(self._config, self._settings) or any(map(on_cuda, session.items))

    def _lease_for_own_test(self) -> None:
        """Lease a GPU for a test that is marked gpu and uses no model; without one, the test has to cope."""
        torch = sys.modules.get("torch")
        if torch is None or torch.version.cuda is not None:
            with suppress(NoGpu):
                self.gpu.take()
            self.gpu.verify()
