"""A merged checkpoint against its base and the adapter: every value of both files, streamed in pieces.

Tensors that the adapter does not touch have to be the base's bytes. Of one that it adapts, with D = M - W (merged minus
base), every element of ``D - ΔW`` has to be within what rounding may do to it:

- half a step of M, of the coarser dtype of base and merged, for storing the sum;
- ``(4 u + 2 r / 2**24) |s| norm(B[i]) max(norm(A[:, j]))``, u half a step of 1 in that dtype: A, B, their product and
  its scaled copy may each have been rounded to it before, and sums of r products in float32 are off by ``r / 2**24``,
  here and there (Cauchy and Schwarz: no partial sum of ``B A`` is larger than the norms' product);
- with DoRA ``5 u |M|`` besides: norm, quotient, sum and product are rounded each;
- half a step of W of a base that is packed in 4 bits, which is unpacked to that dtype first;
- of an adapter whose start took P out of the base (:mod:`~pytest_qvl.preflight.starts`), half a step of ``W - P``, to
  which it was rounded before, what P may be off, and what float32 leaves of a product of its size, here and there;
- of what is float32 throughout a second half step of M, for the subtraction here.

Where that fails, D is compared with multiples h of ΔW. With ``norm(D - h ΔW)**2 = dd - 2 h du + h**2 uu`` (sums of
squares and products over the whole weight) a multiple fits if that is within the sum of the squared limits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pytest_qvl.preflight.files.values import Reader, pieces
from pytest_qvl.preflight.rounding import BLOCK, half_step

if TYPE_CHECKING:
    import torch

    from pytest_qvl.models.anatomy import Group
    from pytest_qvl.preflight.files.headers import Tensor
    from pytest_qvl.preflight.updates import Factors, Update
    from pytest_qvl.preflight.weights import Weights

AT_ONCE = 2**18  # elements: in float32 a piece and what is made of it stay in the cache
_CACHED = 2**21  # bytes of what is compared as it is stored


class Place(NamedTuple):
    """One tensor of a checkpoint."""

    weights: Weights
    name: str

    @property
    def tensor(self) -> Tensor:
        """By its header."""
        return self.weights[self.name]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Some of its rows, ``(rows, columns)`` float32."""
        return self.weights.rows(self.name, [(start, stop)])[0]


@dataclass(frozen=True)
class Same:
    """How two tensors of one shape compare.

    Attributes:
        name: Of the tensor.
        numel: How many values.
        bytes_equal: Whether they are stored alike, bit for bit.
        changed: How many values differ.
        cast: How many of those differ because the second was rounded to its own dtype: the first, rounded so, is the
            second.
        bad: How many values of the second are NaN or infinite.
    """

    name: str
    numel: int
    bytes_equal: bool
    changed: int = 0
    cast: int = 0
    bad: int = 0


def compare(
    name: str,
    one: Tensor,
    other: Tensor,
    rows: dict[int, torch.Tensor] | None = None,
    through: torch.dtype | None = None,
) -> Same:
    """Compare two tensors value by value.

    Args:
        name: Of the tensor.
        one: What it should be.
        other: What it is, of the same shape.
        rows: Rows that stand in place of those of the first (trained tokens), by number. They were trained in another
            dtype than that of the table that took them up, so rounded to it they are the same rows.
        through: A dtype that the first may have been rounded to on its way, as a trained copy is to its base's.

    Raises:
        ModelSourceError: A file has become shorter.
    """
    import torch

    changed = cast = bad = 0
    same_kind = one.dtype == other.dtype
    bytes_equal = same_kind
    for start, piece, second in _side_by_side(one, other):
        first = _with_rows(piece, second, start, rows) if rows else piece
        if same_kind and not rows and torch.equal(_bits(first), _bits(second)):
            continue
        bytes_equal = False
        differ = first.double() != second.double()
        count = int(differ.sum())
        changed += count
        if second.is_floating_point():
            bad += int((~torch.isfinite(second.float())).sum())
            cast += count - int(_is_foreign(first, second, through).sum()) if count else 0
    return Same(name, one.numel, bytes_equal, changed, cast, bad)


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape have the same values, whatever dtypes hold them; read up to what differs.

    Raises:
        ModelSourceError: A file has become shorter.
    """
    import torch

    same_kind = one.dtype == other.dtype
    return all(
        (same_kind and torch.equal(_bits(first), _bits(second))) or torch.equal(first.double(), second.double())
        for _, first, second in _side_by_side(one, other)
    )


def _side_by_side(one: Tensor, other: Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    columns = max(1, math.prod(one.shape[1:]))
    step = max(1, _CACHED // (columns * max(1, one.nbytes // max(1, one.numel))))
    widths = [step * columns * tensor.nbytes // max(1, tensor.numel) for tensor in (one, other)]
    for (start, first), (_, second) in zip(pieces(one, widths[0]), pieces(other, widths[1]), strict=True):
        yield start, first, second


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Values as whole numbers, as wide as fit."""
    import torch

    flat = values.flatten().view(torch.uint8)
    return flat.view(torch.int64) if flat.numel() % 8 == 0 else flat


def _is_foreign(first: torch.Tensor, second: torch.Tensor, through: torch.dtype | None) -> torch.Tensor:
    """Which values of the second the first does not have when it is rounded to the second's dtype."""
    foreign: torch.Tensor = first.to(second.dtype) != second
    return foreign if through is None else foreign & (first.to(through).to(second.dtype) != second)


def _with_rows(piece: torch.Tensor, second: torch.Tensor, start: int, rows: dict[int, torch.Tensor]) -> torch.Tensor:
    """A piece of a table with trained rows in it: as the second has them, where rounding made those of them."""
    made = piece.double()
    for number, values in rows.items():
        if start <= number < start + len(made):
            found, dtypes = second[number - start].double(), {piece.dtype, second.dtype}
            fits = any(values.to(dtype).double().equal(found) for dtype in dtypes)
            made[number - start] = found if fits else values.double()
    return made


@dataclass(frozen=True)
class Proof:
    """What a merged weight holds of its update; sums over all its elements.

    Attributes:
        module: The module's name.
        group: The part of the model it belongs to.
        numel: How many elements.
        outside: How many are further from ``W + ΔW`` than rounding may take them.
        dd: Sum of D**2.
        du: Sum of D * ΔW.
        uu: Sum of ΔW**2.
        limits: Sum of the squared limits.
        bad: How many elements of M are NaN or infinite.
    """

    module: str
    group: Group
    numel: int
    outside: int
    dd: float
    du: float
    uu: float
    limits: float
    bad: int

    @property
    def is_unchanged(self) -> bool:
        """Whether every element has the base's value."""
        return self.dd == 0

    @property
    def kept(self) -> float:
        """The multiple of ΔW that D holds along its direction."""
        return self.du / self.uu if self.uu else math.nan

    @property
    def apart(self) -> float:
        """Sum of ``(D - ΔW)**2``."""
        return self.apart_from(1.0)

    def apart_from(self, multiple: float) -> float:
        """Sum of ``(D - multiple * ΔW)**2``."""
        return max(0.0, self.dd - 2 * multiple * self.du + multiple**2 * self.uu)

    def is_multiple(self, multiple: float) -> bool:
        """Whether D is that multiple of ΔW, within what rounding may do."""
        return not self.bad and self.apart_from(multiple) <= self.limits


def prove(update: Update, factors: Factors, base: Place, merged: Place) -> Proof:
    """Compare a merged weight with the base's and the update, element by element.

    Args:
        update: What the adapter adds.
        factors: Its matrices.
        base: The weight in the base, packed in 4 bits or not.
        merged: The weight in the merged checkpoint, stored as float.

    Raises:
        ModelSourceError: A file has become shorter.
    """
    import torch

    rows, columns = base.weights.shape(base.name)
    coarse = coarser(base, merged)
    added = added_limits(factors, coarse)
    step = min(rows, max(1, AT_ONCE // columns))
    desk = _Desk(step, columns)
    totals = torch.zeros(5, dtype=torch.float64)
    outside = 0
    packed = base.weights.is_packed(base.name)
    with Reader(merged.tensor) as after, nullcontext() if packed else Reader(base.tensor) as before:
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            size = stop - start
            weight = base.rows(start, stop) if before is None else desk.read(before, start, stop)
            stored = after.into(desk.raw, start * columns, stop * columns).view(size, columns)
            change = torch.sub(desk.values[:size].copy_(stored), weight, out=desk.change[:size])
            if factors.magnitude is None:
                rest = desk.rest[:size]
                torch.addmm(change, factors.left[start:stop], factors.right, alpha=-factors.scaling, out=rest)
                squared = 0.0  # of the whole, below
            else:
                rest = change - (update_rows := factors.rows(weight, start))
                squared = squares(update_rows)
            limit = limits_of(
                stored, coarse, added[start:stop], dora=factors.magnitude is not None, out=desk.limit[:size]
            )
            if packed:
                limit += half_step(weight.to(coarse))  # unpacked to that dtype before the sum
            if factors.taken:
                limit += _taken_limits(factors, weight, start, coarse)
            sums = [squares(change), squares(rest), squared, squares(limit)]
            over = rest.abs_().sub_(limit)
            worst, bad = float(over.amax()), 0
            if not worst <= 0:  # NaN is outside too
                outside += over.numel() - int((over <= 0).sum())
                bad = 0 if math.isfinite(worst) else int((~torch.isfinite(stored)).sum())
            totals += torch.tensor([*sums, bad], dtype=torch.float64)
    base.weights.close(base.name)
    dd, ee, uu, limits, bad = totals.tolist()
    uu = uu if factors.magnitude is not None else factors.squared_norm
    du = (dd + uu - ee) / 2  # since norm(D - ΔW)**2 = dd - 2 du + uu
    return Proof(update.module, update.group, rows * columns, outside, dd, du, uu, limits, int(bad))


class _Desk:
    """Memory that all pieces of one weight use in turn: fresh memory for each would take several times as long."""

    def __init__(self, rows: int, columns: int) -> None:
        import torch

        self.raw = torch.empty(rows * columns * 8, dtype=torch.uint8)
        self.weight, self.values, self.change, self.rest, self.limit = torch.empty(5, rows, columns)

    def read(self, reader: Reader, start: int, stop: int) -> torch.Tensor:
        """Rows of the base's weight in float32."""
        columns = self.weight.shape[1]
        stored = reader.into(self.raw, start * columns, stop * columns)
        weight: torch.Tensor = self.weight[: stop - start].copy_(stored.view(-1, columns))
        return weight


def limits_of(
    stored: torch.Tensor, coarse: torch.dtype, added: torch.Tensor, *, dora: bool, out: torch.Tensor | None = None
) -> torch.Tensor:
    """How far each element may be from ``W + ΔW``; see the module."""
    import torch

    limit = half_step(stored.to(coarse), out)
    if coarse == torch.float32:
        limit.mul_(2)
    if dora:
        limit.add_(stored.float().abs(), alpha=5 * torch.finfo(coarse).eps / 2)
    return limit.add_(added[:, None])


def squares(values: torch.Tensor) -> float:
    """Sum of squares."""
    flat = values.flatten()
    return float(flat.dot(flat))


def coarser(one: Place, other: Place) -> torch.dtype:
    """The dtype of two tensors that has the wider steps; of a packed one that of the other."""
    import torch

    order = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float32}
    names = [place.tensor.dtype for place in (one, other) if not place.weights.is_packed(place.name)]
    return next(dtype for name, dtype in order.items() if name in names)


def added_limits(factors: Factors, dtype: torch.dtype) -> torch.Tensor:
    """What rounding A, B and their product to a dtype may add to each row's limits, ``(rows,)``; see the module."""
    import torch

    left, right = factors.own
    unit = 4 * torch.finfo(dtype).eps / 2 + 2 * len(right) * 2.0**-24
    return _lengths(left, right) * (unit * abs(factors.scaling))


def _lengths(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """What no element of a row of ``left @ right`` is above, nor any partial sum of it."""
    import torch

    widest = float(torch.linalg.vector_norm(right, dim=0).max())
    lengths: torch.Tensor = torch.linalg.vector_norm(left, dim=1)
    return lengths * widest


def _taken_limits(factors: Factors, weight: torch.Tensor, start: int, coarse: torch.dtype) -> torch.Tensor:
    """What the start adds to the limits: ``W - P`` is rounded, and P is worked out in float32."""
    rows = slice(start, start + len(weight))
    left, right = factors.left[rows, -factors.taken :] * factors.scaling, factors.right[-factors.taken :]
    limit = half_step((weight + left @ right).to(coarse))
    return limit.add_((_lengths(left, right) * (2 * 2 * factors.taken * 2.0**-24) + factors.taken_error)[:, None])


def whole_blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Runs of rows of a weight, each from the start of a block of NF4, as many as stay in the cache."""
    aligned = BLOCK // math.gcd(BLOCK, columns)
    step = aligned * max(1, AT_ONCE // (aligned * columns))
    yield from ((start, min(rows, start + step)) for start in range(0, rows, step))


def outside_cells(factors: Factors | None, base: Place, merged: Place) -> int:
    """How many elements of ``M - ΔW`` would be packed into other codes than the 4-bit base has, whatever rounding did.

    None of a merge into the 16-bit weights that the base was packed from.

    Args:
        factors: The update, without DoRA; ``None`` for a weight that the adapter does not touch.
        base: The weight in the base, packed.
        merged: The weight in the merged checkpoint, stored as float.

    Raises:
        ModelSourceError: A file has become shorter.
    """
    import torch

    rows, columns = base.weights.shape(base.name)
    coarse = coarser(base, merged)
    added = torch.zeros(rows) if factors is None else added_limits(factors, coarse)
    outside = 0
    for start, stop in whole_blocks(rows, columns):
        stored = merged.rows(start, stop)
        limit = limits_of(stored, coarse, added[start:stop], dora=False)
        if factors is not None:
            stored = stored - (factors.left[start:stop] * factors.scaling) @ factors.right
        least, most = base.weights.cells(base.name, start, stop)
        outside += stored.numel() - int(((stored >= least - limit) & (stored <= most + limit)).sum())
    base.weights.close(base.name)
    return outside


def total(proofs: list[Proof]) -> tuple[float, float]:
    """What all merged weights keep of ΔW together, and the error relative to it (see ``rounding``)."""
    uu = math.fsum(proof.uu for proof in proofs)
    kept = math.fsum(proof.du for proof in proofs) / uu
    return kept, math.sqrt(math.fsum(proof.apart for proof in proofs) / uu)
