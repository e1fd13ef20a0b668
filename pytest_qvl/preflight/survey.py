"""A sample of the rows of every adapted weight: how large ΔW is beside W, and what storing leaves of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.preflight.rounding import BLOCK, Estimate, Loss, Sums, ratio, sums, through_nf4
from pytest_qvl.preflight.timing import each_in_a_thread

if TYPE_CHECKING:
    import torch

    from pytest_qvl.models.anatomy import Group
    from pytest_qvl.preflight.subject import Subject
    from pytest_qvl.preflight.updates import Factors, Update
    from pytest_qvl.preflight.weights import Weights

# Of a weight so many values are looked at, in so many parts at least.
VALUES = 2**17
PARTS = 16
WHOLE = 2**18  # values of a weight that is looked at whole
MOST_VALUES = 2**22  # of one part: rows of which only many together end with a block of NF4 may be long
AT_ONCE = 2**16  # values that are rounded at once, so that they stay in the cache
METHODS = ("bf16", "nf4-after-bf16", "nf4-in-place")


@dataclass(frozen=True)
class Surveyed:
    """What a sample of one weight's rows says.

    Attributes:
        module: The module's name.
        group: The part of the model it belongs to.
        packed: Whether the base holds it in 4 bits.
        strength: ``norm(ΔW) / norm(W)``; NaN where W is zero.
        update: Sum of squares of ΔW in all rows, estimated.
        losses: By the names in :data:`METHODS`; none where ΔW is zero, infinite or NaN, or a merge was given.
        share: Share of the rows that were looked at.
    """

    module: str
    group: Group
    packed: bool
    strength: Estimate
    update: float
    losses: Mapping[str, Loss]
    share: float


def survey(subject: Subject) -> dict[str, Surveyed]:
    """Every adapted weight that the base has here, by the module's name.

    Where a merge was given, what it kept is proved of every value (question 7), and no loss is forecast.

    Raises:
        ModelSourceError: A file has become shorter, or a quantization state is not what bitsandbytes writes.
    """
    weights, forecast = subject.weights, subject.asked.merged is None

    def look(place: tuple[str, Update]) -> Surveyed:
        name, update = place
        surveyed = _of_weight(weights, name, update, update.factors(), forecast=forecast)
        weights.close(name)
        return surveyed

    names = {module: weight_name(subject, module) for module in subject.updates.pairs}
    here = [
        (names[module], update)
        for module, update in subject.updates.pairs.items()
        if (name := names[module]) and weights.is_numeric(name) and weights.shape(name) == update.shape
        if not update.not_at_hand
    ]
    return {surveyed.module: surveyed for surveyed in each_in_a_thread(look, here)}


def weight_name(subject: Subject, module: str) -> str:
    """The base's tensor of a module's weight; that of the embeddings for a tied head, empty if it is not here."""
    roots = subject.parts.roots
    names = [f"{module}.weight", *([f"{roots['embeddings']}.weight"] if module == roots["lm_head"] else [])]
    return next((name for name in names if name in subject.weights), "")


def _of_weight(weights: Weights, name: str, update: Update, factors: Factors, *, forecast: bool = True) -> Surveyed:
    import torch

    packed, shape = weights.is_packed(name), weights.shape(name)
    sample = sample_of(name, shape, _energies(factors))
    found: list[Sums] = []
    order: list[int] = []  # of the sums, as the parts are in the sample
    step = max(1, AT_ONCE // (sample.rows * shape[1]))
    for first in range(0, len(sample.starts), step):
        starts = sample.starts[first : first + step]
        runs = [(start, min(shape[0], start + sample.rows)) for start in starts]
        if sample.whole:  # neighbours, read and multiplied at once
            runs = [(runs[0][0], runs[-1][1])]
        read = weights.rows(name, runs)
        updates = [factors.rows(run, start) for run, (start, _) in zip(read, runs, strict=True)]
        parts, added = ([part for run in each for part in torch.split(run, sample.rows)] for each in (read, updates))
        whole_rows = [len(part) for part in parts]
        for size in sorted(set(whole_rows), reverse=True):  # the last part of a weight may be shorter
            chosen = [i for i, rows in enumerate(whole_rows) if rows == size]
            weight, change = (torch.stack([each[i].flatten() for i in chosen]) for each in (parts, added))
            found.append(part_sums(weight, change, packed=packed) if forecast else sums(weight, change, ()))
            order += [first + i for i in chosen]
    whole = Sums(*(_in_order([getattr(each, field) for each in found], order) for field in Sums._fields))
    return _surveyed(update, packed, whole, sample, shape)


def _in_order(found: Sequence[Any], order: Sequence[int]) -> Any:
    """Numbers of parts, or tuples of them, put together in the order of the parts."""
    import torch

    if isinstance(found[0], tuple):
        return tuple(_in_order(of_method, order) for of_method in zip(*found, strict=True))
    return torch.cat(list(found))[torch.tensor(order).argsort()]


def _energies(factors: Factors) -> torch.Tensor:
    """The squared norm of each row of ``scaling * left @ right``, ``(rows,)`` float64."""
    left, right = factors.left.double(), factors.right.double()
    return ((left @ (right @ right.T)) * left).sum(1).clamp_(min=0) * factors.scaling**2


@dataclass(frozen=True)
class Sample:
    """Parts of a weight: runs of whole rows.

    Attributes:
        starts: First row of each part that was drawn, in the order of its energy; one drawn twice is there twice.
        rows: Rows of a part.
        chances: With which probability each was drawn, times the number of draws; ``(parts,)`` float64.
        whole: Whether these are all parts there are.
    """

    starts: list[int]
    rows: int
    chances: torch.Tensor
    whole: bool


def sample_of(name: str, shape: tuple[int, int], energies: torch.Tensor) -> Sample:
    """Parts of a weight to look at, the same for a name every time.

    Every part but the last begins and ends with a block of NF4, so that its blocks are those of the whole weight. Parts
    are drawn systematically from all in the order of ΔW's energy in them, half of the probability in proportion to that
    energy and half the same for each: the first for sums of ``D * ΔW``, the second for sums of squares of W.

    Args:
        name: Of the weight; where the first is drawn depends on it.
        shape: Rows and columns.
        energies: Squared norm of each row of ΔW, ``(rows,)`` float64.
    """
    import torch

    rows, columns = shape
    step = BLOCK // math.gcd(BLOCK, columns)
    count = -(-rows // step)
    draws = max(PARTS, VALUES // (step * columns))
    if rows * columns <= WHOLE or count <= draws or step * columns > MOST_VALUES:
        return Sample(list(range(0, rows, step)), step, torch.ones(count, dtype=torch.float64), True)
    energy = torch.nn.functional.pad(energies, (0, count * step - rows)).view(count, step).sum(1)
    order = energy.argsort()
    total = float(energy.sum())
    even = 1 / count
    chances = (energy[order] / total + even) / 2 if 0 < total < math.inf else torch.full_like(energy, even)
    first = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little") / 2**48
    points = (torch.arange(draws, dtype=torch.float64) + first) / draws
    drawn = torch.searchsorted(chances.cumsum(0), points).clamp_(max=count - 1)
    return Sample((order[drawn] * step).tolist(), step, chances[drawn] * draws, False)


def part_sums(weight: torch.Tensor, update: torch.Tensor, *, packed: bool) -> Sums:
    """Sums for each of :data:`METHODS`, all against the weights that the base has in that form.

    - ``bf16``: ``bf16(W + ΔW) - bf16(W)``.
    - ``nf4-after-bf16``: ``Q(bf16(W + ΔW)) - Q(bf16(W))``, a 16-bit merge that is quantized afterwards.
    - ``nf4-in-place``: ``Q(Q(W) + ΔW) - Q(W)``, PEFT's merge into a 4-bit layer, in float32. W of a packed base is
      Q(W) already.

    Args:
        weight: Parts of W, ``(parts, values)`` float32, each of whole blocks of NF4.
        update: The same parts of ΔW.
        packed: Whether the base is stored in 4 bits.
    """
    import torch

    def bf16(values: torch.Tensor) -> torch.Tensor:
        return values.bfloat16().float()

    def nf4(values: torch.Tensor) -> torch.Tensor:
        # A part that ends a weight may end within a block.
        return (
            torch.stack([through_nf4(part, torch.bfloat16) for part in values])
            if odd
            else through_nf4(values, torch.bfloat16)
        )

    odd = weight.shape[1] % BLOCK != 0
    plain = bf16(weight)
    merged = bf16(weight + update)
    quantized = plain if packed else nf4(plain)
    changes = [
        merged - plain,
        torch.zeros_like(update) if packed else nf4(merged) - quantized,
        nf4(quantized + update) - quantized,
    ]
    return sums(weight, update, changes)


def _surveyed(update: Update, packed: bool, found: Sums, sample: Sample, shape: tuple[int, int]) -> Surveyed:
    energy = found.update / sample.chances
    strength = _root(ratio(energy, found.weight / sample.chances, sample.whole))
    total = float(energy.sum())
    losses: dict[str, Loss] = {}
    by_method = zip(METHODS, found.along, found.apart, found.changed, strict=False)  # none without a forecast
    for method, along, apart, change in by_method if 0 < total < math.inf else ():
        if packed and method == "nf4-after-bf16":
            continue
        kept = ratio(along / sample.chances, energy, sample.whole)
        error = _root(ratio(apart / sample.chances, energy, sample.whole))
        changed = ratio(change / sample.chances, 1 / sample.chances, sample.whole)
        losses[method] = Loss(*kept, *error, changed.value)
    looked = len(set(sample.starts)) * sample.rows / shape[0]
    return Surveyed(update.module, update.group, packed, strength, total, losses, min(1.0, looked))


def _root(square: Estimate) -> Estimate:
    """The square root of an estimate; its error follows from ``d sqrt(x) = dx / (2 sqrt(x))``."""
    value = math.sqrt(square.value) if square.value >= 0 else math.nan
    return Estimate(value, square.error / (2 * value) if value else 0.0)


def pooled(surveyed: Sequence[Surveyed], method: str) -> Loss:
    """What a method leaves of all updates together: weighted by their squared norms, errors added as independent."""
    have = [(each, each.losses[method]) for each in surveyed if method in each.losses]
    total = math.fsum(each.update for each, _ in have)
    shares = [each.update / total for each, _ in have]
    kept = math.fsum(share * loss.kept for share, (_, loss) in zip(shares, have, strict=True))
    kept_error = math.hypot(*(share * loss.kept_error for share, (_, loss) in zip(shares, have, strict=True)))
    squared = math.fsum(share * loss.error**2 for share, (_, loss) in zip(shares, have, strict=True))
    error = math.sqrt(squared)
    spread = math.hypot(
        *(share * 2 * loss.error * loss.error_error for share, (_, loss) in zip(shares, have, strict=True))
    )
    changed = math.fsum(loss.changed for _, loss in have) / len(have)
    return Loss(kept, kept_error, error, spread / (2 * error) if error else 0.0, changed)
