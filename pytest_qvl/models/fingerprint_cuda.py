"""The digest sum of :mod:`pytest_qvl.models.fingerprint` in one kernel over a table of pointers.

A 4-bit 7B model has some 1,700 tensors; launching a dozen kernels for each takes a hundred times longer than reading
them. Here one launch reads them all, each block a stretch of one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK_WORDS = 2048
BLOCKS_PER_PROGRAM = 16
STRETCH = BLOCK_WORDS * BLOCKS_PER_PROGRAM
WORD_BYTES = 8


def usable(tensor: torch.Tensor) -> bool:
    """Whether the kernel can read this tensor: on CUDA, contiguous, aligned to words, with Triton installed."""
    return (
        tensor.is_cuda
        and tensor.numel() > 0
        and tensor.is_contiguous()
        and tensor.data_ptr() % WORD_BYTES == 0
        and find_spec("triton") is not None
    )


def sums(tensors: Sequence[torch.Tensor], step: int, mixers: tuple[int, int]) -> torch.Tensor:
    """``sum over i of mix(word[i] + (i + 1) * step)`` modulo 2**64 of each tensor.

    Args:
        tensors: For all of which :func:`usable` holds, on one device.
        step: Signed 64-bit position step.
        mixers: The two signed 64-bit multipliers of ``mix``.

    Returns:
        ``(len(tensors),)`` int64 on the device. Scratch: 24 bytes per 256 KiB read.
    """
    import torch

    from pytest_qvl.models.fingerprint_kernel import digest_stretch

    device = tensors[0].device
    sizes = torch.tensor([t.numel() * t.element_size() for t in tensors], dtype=torch.int64)
    words = (sizes + WORD_BYTES - 1) // WORD_BYTES
    programs = (words + STRETCH - 1) // STRETCH
    owner = torch.repeat_interleave(torch.arange(len(tensors)), programs)
    first_program = torch.cumsum(programs, 0) - programs
    stretch = torch.arange(len(owner)) - first_program[owner]
    pointers = torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64)
    table = torch.stack([pointers[owner], sizes[owner], stretch * STRETCH], dim=1).contiguous().to(device)
    partial = torch.empty(len(owner), dtype=torch.int64, device=device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        digest_stretch[(len(owner),)](
            table, partial, step, *mixers, BLOCK=BLOCK_WORDS, BLOCKS=BLOCKS_PER_PROGRAM, num_warps=8
        )
    totals = torch.zeros(len(tensors), dtype=torch.int64, device=device)
    return totals.index_add_(0, owner.to(device), partial)
