"""Starts of an adapter that take their part out of the base: what is added then is ``s B A`` less what was taken.

PEFT's ``update_layer`` replaces a base weight W by ``W - P`` when it puts such an adapter on, in training and again
with every load of the adapter as ``save_pretrained`` wrote it (``peft/tuners/lora/layer.py``: ``pissa_init``,
``olora_init``). With A and B from the file the layer's weight is then ``W - P + s B A``:

- PiSSA (Meng et al. 2024, arXiv:2404.02948): P is the best approximation of W of rank r, of its r largest
  singular values;
- OLoRA (Buyukakyuz 2024, arXiv:2406.01775): P is ``s Q R``, the first r columns and rows of ``W = Q R``.

Saved with ``path_initial_model_for_weight_conversion``, both are plain LoRA of twice the rank, whose configuration says
``init_lora_weights: true``: nothing is taken out for that.

PEFT works P out in float32, so it is off here and there by what its factorization may be off:

- of P of a singular value decomposition, ``e (1 + 2 s1 / (s[r] - s[r+1]))``, with ``e = sqrt(n) u s1`` for the backward
  error (LAPACK Users' Guide, section 4.9, with the square root of the shorter side n for its modest function of n) and
  the angle by which e turns the r leading vectors (Wedin);
- of P of QR, column j by ``2 e norm(W[:, j]) / smin``, with ``e = sqrt(m r) u norm(W[:, :r])`` for m rows (Higham,
  *Accuracy and Stability of Numerical Algorithms*, theorem 19.4; the square root, since errors of rounding are
  independent), and smin the smallest singular value of the first r columns, whose span e turns by ``e / smin``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from pytest_qvl.preflight.weights import Weights

# Values of a weight that is factorized: a singular value decomposition of 1024 x 1024 takes half a second.
SMALL = 2**20
UNIT = 2.0**-24  # half a step of 1 in float32
CONVERT = "save it with path_initial_model_for_weight_conversion, which makes plain LoRA of it"
LARGE_START = "its start took a part out of the base that takes the whole weight to work out: --merged does"
_RANDOM = "PEFT draws its start at random with every load, so no two loads have the same weights"


class Taken(NamedTuple):
    """What a start takes out of a weight, ``left @ right``.

    Attributes:
        left: ``(rows, rank)`` float32.
        right: ``(rank, columns)`` float32.
        error: How far an element may be off when PEFT works it out.
    """

    left: torch.Tensor
    right: torch.Tensor
    error: float


@dataclass(frozen=True)
class Start:
    """The start of one module's adapter.

    Attributes:
        kind: ``"pissa"`` or ``"olora"``.
        weights: Those of the base.
        name: The weight's.
        rank: Of the adapter.
        scaling: Of the adapter.
    """

    kind: str
    weights: Weights
    name: str
    rank: int
    scaling: float

    @property
    def is_small(self) -> bool:
        """Whether it may be worked out for a forecast; the others only where the whole weight is read anyway."""
        return math.prod(self.weights.shape(self.name)) <= SMALL

    @cached_property
    def taken(self) -> Taken:
        """What is taken out; the weight is read whole.

        Raises:
            ModelSourceError: The file has become shorter.
        """
        return self._of_values() if self.kind == "pissa" else self._of_columns()

    def _of_values(self) -> Taken:
        import torch

        weight = self.weights.rows(self.name, [(0, self.weights.shape(self.name)[0])])[0].double()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        largest, rest = float(values[0]), values[self.rank :]
        gap = float(values[self.rank - 1] - rest[0]) if len(rest) else math.inf
        off = math.sqrt(min(weight.shape)) * UNIT * largest
        error = off * (1 + 2 * largest / gap) if gap else math.inf
        return Taken((left[:, : self.rank] * values[: self.rank]).float(), right[: self.rank].float(), error)

    def _of_columns(self) -> Taken:
        """From the first r columns alone: the first r rows of R are ``Q.T @ W``. W is read in pieces, twice."""
        import torch

        rows, columns = self.weights.shape(self.name)
        step = max(1, 2**22 // columns)
        runs = [(start, min(rows, start + step)) for start in range(0, rows, step)]
        first = torch.cat([self.weights.rows(self.name, [run])[0][:, : self.rank] for run in runs]).double()
        basis = torch.linalg.qr(first)[0]
        right, squares = torch.zeros(self.rank, columns, dtype=torch.float64), torch.zeros(columns, dtype=torch.float64)
        for start, stop in runs:
            piece = self.weights.rows(self.name, [(start, stop)])[0].double()
            right += basis[start:stop].T @ piece
            squares += piece.square().sum(0)
        smallest = float(torch.linalg.svdvals(first)[-1])
        off = math.sqrt(rows * self.rank) * UNIT * float(first.norm())
        error = 2 * off * math.sqrt(float(squares.max())) / smallest if smallest else math.inf
        return Taken((basis * self.scaling).float(), right.float(), error * abs(self.scaling))


def start_of(init: str, place: tuple[Weights, str], module: Any, rank: int, scaling: float) -> Start | str:
    """How a module's adapter started that took its part out of the base; or why that cannot be worked out.

    Args:
        init: ``init_lora_weights``, as it stands in ``adapter_config.json``.
        place: The base's weights, and the name of the module's in them; empty if it is not here.
        module: The module.
        rank: Of its adapter.
        scaling: Of its adapter.
    """
    from torch import nn

    (weights, name), kind = place, taking(init) or ""
    said = f"init_lora_weights is {init[:40]!r}, which takes a part out of the base: "
    if kind not in ("pissa", "olora"):
        return said + _WHY_NOT.get(kind, _RANDOM)
    if not isinstance(module, nn.Linear) or not 0 < rank <= min(module.weight.shape) or not scaling > 0:
        return said + "PEFT starts linear layers so, with a rank and a scaling above zero"
    if not name:
        return said + "base weights are not here"
    if weights.is_packed(name) or not weights.is_numeric(name):
        return said + "the base's weight is quantized"
    start = Start(kind, weights, name, rank, scaling)
    return start if kind == "olora" or start.is_small else said + "the singular values of so large a weight take hours"


_WHY_NOT = {
    "corda": "of data that is not in the files, and PEFT does not load it without preprocess_corda",
    "loftq": "PEFT quantizes the base's weights with every load",
}


def taking(init: Any) -> str | None:
    """The kind of a start that takes its part out of the base, by ``init_lora_weights``; ``None`` for all others."""
    text = init.lower() if isinstance(init, str) else ""
    return next((kind for kind in ("pissa_niter", "pissa", "olora", "corda", "loftq") if text.startswith(kind)), None)
