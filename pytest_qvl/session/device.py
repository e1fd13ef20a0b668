"""The device that models are loaded on: a GPU that works, set up once as the run asked, and put back at its end."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext, suppress
from typing import TYPE_CHECKING

from pytest_qvl.session.errors import UserError

if TYPE_CHECKING:
    from pytest_qvl.options import Settings
    from pytest_qvl.session.gpu_access import GpuAccess
    from pytest_qvl.vram.meter import Meter

BF16_CAPABILITY = (8, 0)  # `is_bf16_supported()` is True on a T4, by emulation at a quarter of the speed


class Device:
    """Prepares the device before the first load and restores it at the end of the session; one per process.

    Args:
        settings: The run's.
        access: The way to the GPU.
        meter: The one meter of this process; is told how much the context of a simulated card takes.
    """

    def __init__(self, settings: Settings, access: GpuAccess, meter: Meter) -> None:
        self._settings, self._access, self._meter = settings, access, meter
        self._is_set_up = False
        self._refused: UserError | None = None
        self._undo = ExitStack()

    def need_cuda(self) -> None:
        """Lease a GPU and start CUDA on it; skip the test, with the reason, where there is none to be had.

        Raises:
            UserError: As :meth:`set_up`.
        """
        self._access.need_cuda()
        self.set_up()

    def set_up(self) -> None:
        """Before the first load on CUDA, simulate ``--qvl-card``, or pin the GPU's own attention kernels; once.

        :meth:`close` undoes it.

        Raises:
            UserError: The card has more memory than the GPU; the same one every time.
        """
        if not self._is_set_up:
            try:
                self._enter()
            except ValueError as error:
                self._refused = UserError(f"{self._settings.source('card')}: {error}")
            self._is_set_up = True
        if self._refused is not None:
            raise self._refused.with_traceback(None)

    def _enter(self) -> None:
        from pytest_qvl.vram.cap import capped, pinned_attention

        card = self._settings.card
        if card is None:
            import torch

            self._undo.enter_context(pinned_attention(torch.cuda.get_device_capability()))
        else:
            self._undo.enter_context(capped(card))
            self._meter.context = card.context_bytes

    def default_dtype(self, device: str) -> str:
        """bfloat16 where the hardware (or the card that it simulates) has it, else float16."""
        if device == "cuda":
            if self._settings.card is not None:
                from pytest_qvl.vram.cap import compute_dtype

                return compute_dtype(self._settings.card)
            import torch

            if torch.cuda.get_device_capability() < BF16_CAPABILITY:
                return "float16"
        return "bfloat16"

    def close(self) -> None:
        """Put the device back as it was, and give the GPU back."""
        with suppress(RuntimeError) if self._access.broken else nullcontext():
            self._undo.close()
        self._access.gpu.release()
