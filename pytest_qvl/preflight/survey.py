"""A sample of the rows of every adapted weight: how large ΔW is beside W, and what storing leaves of it."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_qvl.preflight.rounding import BLOCK, Estimate, Loss, Sums, ratio, sums, through_nf4

if TYPE_CHECKING:
    import torch

    from pytest_qvl.models.anatomy import Group
    from pytest_qvl.preflight.subject import Subject
    from pytest_qvl.preflight.updates import Factors, Update
    from pytest_qvl.preflight.weights import Weights

# Of a weight so many parts of rows are looked at, of at least so many values each.
PARTS = 24
PART_VALUES = 2**13
WHOLE = 2**18  # values of a weight that is looked at whole
MOST_VALUES = 2**24  # of one part: rows of NF4 blocks that end with no row below may be long
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
        losses: By the names in :data:`METHODS`; none where ΔW is zero, infinite or NaN.
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

    Raises:
        ModelSourceError: A file has become shorter, or a quantization state is not what bitsandbytes writes.
    """
    import torch

    found = {}
    with torch.no_grad():
        for module, update in subject.updates.pairs.items():
            name = weight_name(subject, module)
            weights = subject.weights
            if name and weights.is_numeric(name) and weights.shape(name) == update.shape:
                found[module] = _of_weight(weights, name, update, update.factors())
                weights.close(name)
    return found


def weight_name(subject: Subject, module: str) -> str:
    """The base's tensor of a module's weight; that of the embeddings for a tied head, empty if it is not here."""
    roots = subject.parts.roots
    names = [f"{module}.weight", *([f"{roots['embeddings']}.weight"] if module == roots["lm_head"] else [])]
    return next((name for name in names if name in subject.weights), "")


def _of_weight(weights: Weights, name: str, update: Update, factors: Factors) -> Surveyed:
    runs, whole = sample_of(name, weights.shape(name))
    parts = [
        part_sums(weight, factors.rows(weight, start), packed=weights.is_packed(name))
        for start, weight in _rows(weights, name, runs)
    ]
    squared = ratio([part.update for part in parts], [part.weight for part in parts], whole)
    value = math.sqrt(squared.value) if squared.value >= 0 else math.nan
    strength = Estimate(value, squared.error / (2 * value) if value else 0.0)  # d sqrt(x) = dx / (2 sqrt(x))
    total = math.fsum(part.update for part in parts) * whole / len(parts)
    sound = 0 < total < math.inf
    losses = {method: _loss(parts, i, whole) for i, method in enumerate(METHODS)} if sound else {}
    losses = {method: loss for method, loss in losses.items() if method not in _not_of(weights.is_packed(name))}
    share = sum(stop - start for start, stop in runs) / weights.shape(name)[0]
    return Surveyed(update.module, update.group, weights.is_packed(name), strength, total, losses, share)


def _not_of(packed: bool) -> tuple[str, ...]:
    return ("nf4-after-bf16",) if packed else ()


def _rows(weights: Weights, name: str, runs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, torch.Tensor]]:
    yield from ((start, rows) for (start, _), rows in zip(runs, weights.rows(name, runs), strict=True))


def sample_of(name: str, shape: tuple[int, int]) -> tuple[list[tuple[int, int]], int]:
    """Runs of rows to look at, and how many such runs there are: a random sample, the same for a name every time.

    Every run but the last begins and ends with a block of NF4, so that its blocks are those of the whole weight.
    """
    rows, columns = shape
    step = BLOCK // math.gcd(BLOCK, columns)
    step *= max(1, PART_VALUES // (step * columns))
    starts = list(range(0, rows, step))
    chosen = range(len(starts))
    if rows * columns > WHOLE and len(starts) > PARTS and step * columns <= MOST_VALUES:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        chosen = sorted(random.Random(seed).sample(chosen, PARTS))  # type: ignore[assignment]
    return [(starts[i], min(rows, starts[i] + step)) for i in chosen], len(starts)


def part_sums(weight: torch.Tensor, update: torch.Tensor, *, packed: bool) -> Sums:
    """Sums for each of :data:`METHODS`, all against the weights that the base has in that form.

    - ``bf16``: ``bf16(W + ΔW) - bf16(W)``.
    - ``nf4-after-bf16``: ``Q(bf16(W + ΔW)) - Q(bf16(W))``, a 16-bit merge that is quantized afterwards.
    - ``nf4-in-place``: ``Q(Q(W) + ΔW) - Q(W)``, PEFT's merge into a 4-bit layer. Of a packed base W is Q(W) already.

    Args:
        weight: Rows of W in float32, whole blocks of NF4.
        update: The same rows of ΔW.
        packed: Whether the base is stored in 4 bits.
    """
    import torch

    def bf16(values: torch.Tensor) -> torch.Tensor:
        return values.bfloat16().float()

    plain = bf16(weight)
    merged = bf16(weight + update)
    quantized = plain if packed else through_nf4(plain, torch.bfloat16)
    changes = [
        merged - plain,
        torch.zeros_like(update) if packed else through_nf4(merged, torch.bfloat16) - quantized,
        through_nf4(bf16(quantized + update), torch.bfloat16) - quantized,
    ]
    return sums(weight, update, changes)


def _loss(parts: Sequence[Sums], i: int, whole: int) -> Loss:
    updates = [part.update for part in parts]
    kept = ratio([part.along[i] for part in parts], updates, whole)
    squared = ratio([part.apart[i] for part in parts], updates, whole)
    error = math.sqrt(squared.value)
    changed = sum(part.changed[i] for part in parts) / sum(part.numel for part in parts)
    return Loss(kept.value, kept.error, error, squared.error / (2 * error) if error else 0.0, changed)


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
