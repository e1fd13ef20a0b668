"""NF4 weights out of packed bytes, as QLoRA defines them (Dettmers et al. 2023, section 3 and appendix E)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

# Appendix E: the quantiles of the normal distribution that NF4's sixteen numbers are.
CODE_BOOK = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class Packed(NamedTuple):
    """A matrix as NF4 stores it.

    Attributes:
        data: Two weights a byte, the first in the high half; any dtype that holds the bytes.
        shape: Rows and columns of the matrix.
        absmax: Per block of weights its largest magnitude: float32, or uint8 indices where those are quantized too.
        blocksize: Weights per block.
        outer_code: The 256 values that `absmax` indexes; None without double quantization.
        outer_absmax: Per block of 256 (`outer_blocksize`) absmax values their largest magnitude.
        outer_blocksize: absmax values per block of their own.
        offset: What was taken off the absmax values before they were quantized.
    """

    data: torch.Tensor
    shape: tuple[int, int]
    absmax: torch.Tensor
    blocksize: int
    outer_code: torch.Tensor | None = None
    outer_absmax: torch.Tensor | None = None
    outer_blocksize: int = 256
    offset: torch.Tensor | None = None


def block_scales(packed: Packed, blocks: torch.Tensor, *, fused: bool = False) -> torch.Tensor:
    """The largest magnitudes of some blocks, float32: ``outer_code[absmax] * outer_absmax + offset``.

    Args:
        packed: The matrix.
        blocks: Numbers of the blocks.
        fused: Round once, after the sum, as a GPU's multiply-add does; else the product is rounded as well.
    """
    if packed.outer_code is None or packed.outer_absmax is None:
        return packed.absmax.flatten()[blocks].float()
    codes = packed.absmax.flatten()[blocks].long()
    outer = packed.outer_absmax.flatten()[blocks // packed.outer_blocksize].float()
    code = packed.outer_code.float()[codes]
    if packed.offset is None:
        return code * outer
    if fused:
        # A product of two float32 numbers is exact in float64.
        return (code.double() * outer.double() + packed.offset.double()).float()
    return code * outer + packed.offset.float()


def rows(
    packed: Packed, start: int, stop: int, *, fused: bool = False, rounded: torch.dtype | None = None
) -> torch.Tensor:
    """Rows ``start`` to ``stop`` of the matrix, ``(stop - start, columns)``.

    Args:
        packed: The matrix.
        start: First row.
        stop: Row after the last.
        fused: Of :func:`block_scales`.
        rounded: Round code book and scales to this dtype before they are multiplied in it, as bitsandbytes' kernel for
            few rows does; else both are multiplied in float32, and returned so.
    """
    import torch

    columns = packed.shape[1]
    first, last = start * columns, stop * columns
    data = packed.data.detach().contiguous().view(torch.uint8).flatten()[first // 2 : (last + 1) // 2]
    halves = torch.stack((data >> 4, data & 15), dim=-1).flatten()[first % 2 : first % 2 + last - first]
    book = torch.tensor(CODE_BOOK, dtype=torch.float32, device=data.device)
    first_block = first // packed.blocksize
    blocks = torch.arange(first_block, (last - 1) // packed.blocksize + 1, device=data.device)
    scales = block_scales(packed, blocks, fused=fused)
    if rounded is not None:
        book, scales = book.to(rounded), scales.to(rounded)
    within = first - first_block * packed.blocksize
    scales = scales.repeat_interleave(packed.blocksize)[within : within + last - first]
    made: torch.Tensor = book.index_select(0, halves.int()) * scales
    return made.view(stop - start, columns)
