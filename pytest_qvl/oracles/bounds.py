"""How far a healthy result may lie from an exact one: rounding errors, added up as the operation adds them up.

The model of floating-point arithmetic is the standard one (Higham, *Accuracy and Stability of Numerical Algorithms*,
section 2.2): one operation returns the exact result times ``1 + d``, ``|d| <= u``, ``u`` half a step of the dtype.

A sum of n products is rounded n times in float32, whatever the dtype of what is multiplied (16-bit products are exact
there). With errors that are independent and uniform within ``±u``, whose variance proxy is ``u**2 / 3``, Hoeffding's
inequality bounds their sum by ``TAIL * u / sqrt(3) * sqrt(sum of the squared partial sums)`` in all but
``2 * exp(-TAIL**2 / 2)`` of all cases (Higham and Mary, SIAM J. Sci. Comput. 41, 2019, theorem 2.4, whose constant
is this one without the 3). No partial sum exceeds ``norm(x) * norm(w)`` (Cauchy and Schwarz). ``TAIL = 9`` is exceeded
once in 4e17 sums: never in a model of 1e11 numbers. For few terms the worst case, ``n * u``, is smaller.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

TAIL = 9.0
# Half a step of float32, in which sums are kept.
SINGLE = 2.0**-24
# Units in the last place by which exp, erf, sin or cos of a fast kernel may be off: the coarsest that torch uses is
# ``exp_u20`` of its fused attention on the CPU.
FUNCTION = 20


class Claim(NamedTuple):
    """What an operation has to give.

    Attributes:
        value: The result in float32.
        limit: How far a healthy result may be from it, element by element; of a shape that broadcasts to it.
    """

    value: torch.Tensor
    limit: torch.Tensor


def unit(dtype: torch.dtype) -> float:
    """Half a step of a dtype: the largest relative error of one rounding to it (2**-8 for bfloat16)."""
    import torch

    return torch.finfo(dtype).eps / 2


def underflow(dtype: torch.dtype) -> float:
    """The largest absolute error of a rounding below the smallest normal number, which some kernels flush to zero."""
    import torch

    return torch.finfo(dtype).tiny


def subnormal(dtype: torch.dtype) -> float:
    """Half the smallest number above 0: the same for kernels that flush nothing."""
    import torch

    return unit(dtype) * torch.finfo(dtype).tiny


def summed(terms: int) -> float:
    """Relative to ``norm(x) * norm(w)``, the error of a float32 sum of so many products; see the module."""
    return SINGLE * min(terms, TAIL * math.sqrt(terms / 3))
