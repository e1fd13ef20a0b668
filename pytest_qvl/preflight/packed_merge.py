"""A merged checkpoint in 4 bits: how much of ΔW its codes hold, and how it was made.

With R what the base is in 4 bits (unpacked; ``Q(W)`` of a 16-bit base) and M what the merged weight is unpacked,
``D = M - R`` is what the merge changed. Two ways lead to a merge in 4 bits:

- in place, ``M = Q(R + ΔW)``: PEFT's ``merge_and_unload`` of a ``Linear4bit``, where a weight that stands on one of
  NF4's wide steps mostly stays there;
- afterwards, ``M = Q(bf16(W + ΔW))``: a 16-bit merge that was quantized.

Which of them, or neither, is the nearest in squares to M. NF4 is packed here without double quantization, as in
:func:`~pytest_qvl.preflight.rounding.through_nf4`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_qvl.preflight.merged import Place, added_limits, coarser, limits_of, squares, whole_blocks
from pytest_qvl.preflight.rounding import BLOCK, through_nf4

if TYPE_CHECKING:
    import torch

    from pytest_qvl.preflight.updates import Factors, Update

# A value changes its code of 4 bits by a rounding to bfloat16 if it lies that near to the border of two codes: half a
# step of 1, 2**-9, on both sides of each border; where they are densest, codes are 0.0796 of the block's largest apart.
FLIPPED = 2 * 2**-9 / 0.0796
LARGEST = 2**25  # elements of a weight that is packed again to see whether it was before
WAYS = {"in place": "merged into the 4-bit model", "afterwards": "merged in 16 bits and quantized afterwards"}


@dataclass(frozen=True)
class PackedProof:
    """What one merged weight in 4 bits holds of its update; sums over all its elements.

    Attributes:
        module: The module's name.
        numel: How many elements.
        dd: Sum of D**2.
        du: Sum of D * ΔW.
        uu: Sum of ΔW**2.
        apart: Sum of squares of M less what each way of :data:`WAYS` makes.
    """

    module: str
    numel: int
    dd: float
    du: float
    uu: float
    apart: tuple[float, ...]

    @property
    def way(self) -> str:
        """The nearest of :data:`WAYS`; ``"unmerged"`` if the base is nearer."""
        nearest = min(self.apart)
        return "unmerged" if self.dd < nearest else tuple(WAYS)[self.apart.index(nearest)]


def prove_packed(update: Update, factors: Factors, base: Place, merged: Place) -> PackedProof:
    """Compare a merged weight in 4 bits with the base's and with what both ways to merge make.

    Args:
        update: What the adapter adds.
        factors: Its matrices.
        base: The weight in the base, packed in 4 bits or not.
        merged: The weight in the merged checkpoint, packed in 4 bits.

    Raises:
        ModelSourceError: A file has become shorter, or a quantization state is not what bitsandbytes writes.
    """
    import torch

    rows, columns = merged.weights.shape(merged.name)
    packed = base.weights.is_packed(base.name)
    totals = torch.zeros(5, dtype=torch.float64)
    for start, stop in whole_blocks(rows, columns):
        weight, stored = base.rows(start, stop), merged.rows(start, stop)
        reference = weight if packed else through_nf4(weight.bfloat16().float(), torch.float32)
        added = factors.rows(reference if packed else weight, start)
        change = stored - reference
        ways = [through_nf4(reference + added, torch.float32)]
        ways.append(ways[0] if packed else through_nf4((weight + added).bfloat16().float(), torch.float32))
        totals += torch.tensor(
            [_sum(change, change), _sum(change, added), _sum(added, added), *(squares(stored - way) for way in ways)],
            dtype=torch.float64,
        )
    for place in (base, merged):
        place.weights.close(place.name)
    dd, du, uu, *apart = totals.tolist()
    return PackedProof(update.module, rows * columns, dd, du, uu, tuple(apart))


def _sum(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one.flatten().dot(other.flatten()))


def kept(proofs: Sequence[PackedProof]) -> float:
    """The share of ΔW along its direction that all weights hold together."""
    return math.fsum(proof.du for proof in proofs) / math.fsum(proof.uu for proof in proofs)


def packed_before(factors: Factors, base: Place, merged: Place) -> str:
    """How the base was packed before ΔW was added: ``"NF4"`` and so on; empty if it was not, or is too large to try.

    The base's weight is really packed and unpacked by bitsandbytes in each way it knows, and of a merge into the 4-bit
    model the sum with ΔW again.

    Args:
        factors: The update.
        base: The weight in the base, in 16 bits or more.
        merged: The weight in the merged checkpoint, stored as float.

    Raises:
        ModelSourceError: A file has become shorter.
    """
    rows, columns = base.weights.shape(base.name)
    if rows * columns > LARGEST or base.weights.is_packed(base.name):
        return ""
    if factors.magnitude is not None or factors.taken:
        return ""
    dtype = coarser(base, merged)
    weight, stored = base.rows(0, rows).to(dtype), merged.rows(0, rows)
    limit = limits_of(stored, dtype, added_limits(factors, dtype), dora=False)
    fitting: dict[float, str] = {}
    for kind in ("nf4", "fp4"):
        for double in (False, True):
            unpacked = _through(weight, kind, double)
            words = f"{kind.upper()}{' with double quantization' if double else ''}"
            fitting[squares(stored - unpacked)] = f"{words}, without the adapter"
            total = unpacked.addmm(factors.left, factors.right, alpha=factors.scaling)
            fitting[squares(stored - total)] = words
            if any(_is_nearly(stored, _through(each, kind, double), limit) for each in _sums(total, dtype)):
                return f"{words}, packed again with the sum"
    # Of ways that are nearly alike (with and without double quantization) the one that leaves least.
    return fitting[min(fitting)] if min(fitting) <= squares(limit) else ""


def _sums(total: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """What PEFT may have packed: the sum in float32, or where A and B are stored in the weight's dtype, in that."""
    yield total
    yield total.to(dtype)


def _through(values: torch.Tensor, kind: str, double: bool) -> torch.Tensor:
    """Packed and unpacked by bitsandbytes, float32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed = quantize_4bit(values, quant_type=kind, blocksize=BLOCK, compress_statistics=double)
    unpacked: torch.Tensor = dequantize_4bit(*packed).float()
    return unpacked


def _is_nearly(stored: torch.Tensor, made: torch.Tensor, limit: torch.Tensor) -> bool:
    return int(((stored - made).abs() > limit).sum()) <= FLIPPED * stored.numel()
