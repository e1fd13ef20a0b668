"""The digest sums of :mod:`pytest_qvl.models.fingerprint.digests` in one kernel over a table of pointers.

A 4-bit 7B model has some 1,700 tensors; launching a dozen kernels for each takes a hundred times longer than reading
them, and so does making the table. Here the table stays on the device, and a read is one launch and one transfer of
eight bytes per tensor.

What bounds the read is memory, not arithmetic. Compiled for compute capability 9.0, the inner loop is 20 instructions
of 32-bit integers per word of eight bytes, address and position included, three of them wide products at half the rate:
23 slots. 132 SMs x 64 lanes x 1.75 GHz start 14.8e12 of those a second (H100, H200), enough for 5.1 TB/s, while memory
moves 3.4 to 4.8 TB/s. Reading at half of the memory's speed leaves the lanes idle half of the time and more.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK_WORDS = 2048
BLOCKS_PER_PROGRAM = 16
STRETCH = BLOCK_WORDS * BLOCKS_PER_PROGRAM
WARPS = 8
WORD_BYTES = 8
ALIGNMENT = 16  # of two words, which one lane loads at once


def usable(tensor: torch.Tensor) -> bool:
    """Whether the kernel can read this tensor: on CUDA, plain, contiguous and aligned, with Triton installed."""
    return (
        tensor.is_cuda
        and tensor.numel() > 0
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
        and tensor.data_ptr() % ALIGNMENT == 0
        and _has_triton()
    )


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


class PointerTable:
    """Where some tensors lie, on their device, cut into stretches of 256 KiB that a program of the kernel reads each.

    Holds addresses, not tensors: whoever reads makes sure with :meth:`points_to` that the tensors still lie there.

    Args:
        tensors: For all of which :func:`usable` holds, on one device.
        step: Signed 64-bit position step.
        mixers: The two signed 64-bit multipliers of ``mix``.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], step: int, mixers: tuple[int, int]) -> None:
        import torch

        self._places = _places(tensors)
        self._constants = (step, *mixers)
        self._device = tensors[0].device
        addresses, sizes = torch.tensor(self._places, dtype=torch.int64).unbind(1)
        words = (sizes + WORD_BYTES - 1) // WORD_BYTES
        programs = (words + STRETCH - 1) // STRETCH
        owners = torch.repeat_interleave(torch.arange(len(tensors)), programs)
        stretches = torch.arange(len(owners)) - (programs.cumsum(0) - programs)[owners]
        rows = (addresses[owners], sizes[owners], stretches * STRETCH, owners)
        self._rows = torch.stack(rows, dim=1).contiguous().to(self._device)

    def points_to(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the tensors lie where those of the table lay."""
        return _places(tensors) == self._places

    def sums(self) -> torch.Tensor:
        """``sum over i of mix(word[i] + (i + 1) * step)`` modulo 2**64 of each tensor: int64 on the device."""
        import torch

        from pytest_qvl.models.fingerprint.kernel import digest_stretch

        totals = torch.zeros(len(self._places), dtype=torch.int64, device=self._device)
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            digest_stretch[(len(self._rows),)](
                self._rows, totals, *self._constants, BLOCK=BLOCK_WORDS, BLOCKS=BLOCKS_PER_PROGRAM, num_warps=WARPS
            )
        return totals


def _places(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    return [(tensor.data_ptr(), tensor.numel() * tensor.element_size()) for tensor in tensors]
