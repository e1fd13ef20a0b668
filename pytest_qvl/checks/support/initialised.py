"""Whether a layer's weights are as they were drawn: a checkpoint of which a part was never trained.

Such a part loads without a word, since every tensor is there. Trained matrices have rows and columns of different
size; independent draws from one distribution do not.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from pytest_qvl.models.sources.stored import Stored

SMALLEST = 48  # rows and columns; below, the dispersion says little
DEVIATIONS = 6.0
_UNIT = re.compile(r"^(.*\.(?:layers|blocks|deepstack_merger_list)\.\d+|.*\.merger)\.")


class Units(NamedTuple):
    """Layers, blocks and mergers of a checkpoint.

    Attributes:
        drawn: Those whose every matrix is as it was drawn, of at least two matrices.
        others: The rest.
    """

    drawn: list[str]
    others: list[str]


def unit_of(name: str) -> str:
    """The layer, block or merger that a tensor belongs to; empty for one of its own."""
    match = _UNIT.match(name)
    return match[1] if match else ""


def looks_drawn(matrix: torch.Tensor) -> bool:
    """Whether the elements of a matrix are independent draws from one distribution, as far as its norms tell.

    The squares of n such elements have a mean whose variance is ``(k - 1) / n`` of its square, k the kurtosis. The
    variance of r row means, in units of that, is chi-squared with r - 1 degrees of freedom, mean 1 and deviation
    ``sqrt(2 / (r - 1))``; the same of columns. Both within six deviations: beyond, by the normal limit, once in 1e9
    matrices that are drawn. The kurtosis of what is drawn is between 1.8 (uniform) and 3 (normal), within six
    deviations ``sqrt(24 / elements)``, the normal's, which is the larger. It is 1 where every element has one
    magnitude (a constant, signs): no initialisation draws such, and their squares have no variance to divide by.
    """
    values = matrix.double()
    squares = values.square()
    mean = float(squares.mean())
    if not math.isfinite(mean) or mean == 0:
        return False
    kurtosis = float(squares.square().mean()) / mean**2
    spread = DEVIATIONS * math.sqrt(24 / values.numel())
    if not max(1.0, 1.8 - spread) < kurtosis <= 3 + spread:
        return False
    for axis in (0, 1):
        means = squares.mean(dim=axis) / mean
        dispersion = float(means.var()) * values.shape[axis] / (kurtosis - 1)
        if abs(dispersion - 1) > DEVIATIONS * math.sqrt(2 / (len(means) - 1)):
            return False
    return True


def drawn_units(stored: Stored, names: list[str]) -> Units:
    """Which layers, blocks and mergers were never trained, by the first rows of each stored matrix.

    Args:
        stored: The checkpoint.
        names: Its tensors to look at; 4-bit ones are left out.
    """
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for name in names:
        unit = unit_of(name)
        shape = stored.shape(name)
        if not unit or len(shape) < 2 or verdicts[unit][-1:] == [False]:
            continue
        width = math.prod(shape[1:])
        rows = next(stored.pieces(name, width)).values.reshape(-1, width)[: max(SMALLEST, 2**20 // width)]
        if min(rows.shape) >= SMALLEST:
            verdicts[unit].append(looks_drawn(rows))
    drawn = [unit for unit, each in verdicts.items() if len(each) > 1 and all(each)]
    return Units(drawn, [unit for unit, each in verdicts.items() if each and unit not in drawn])
