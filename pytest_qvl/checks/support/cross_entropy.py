"""Cross-entropy from its definition, token by token in float64, and the usual ways of getting a mean of it wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_qvl.checks.support.rounding import step
from pytest_qvl.samples.batch import IGNORED

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

PLACES_AT_ONCE = 64  # rows of the vocabulary in float64: 78 MB for 152,064 tokens


@dataclass(frozen=True)
class TokenLosses:
    """Negative log-probabilities of the supervised tokens of a batch.

    Attributes:
        rows: Row of the batch that each belongs to.
        values: In nats.
        largest: The largest absolute value among the logits that were read.
        columns: How many tokens the logits can name.
    """

    rows: tuple[int, ...]
    values: tuple[float, ...]
    largest: float
    columns: int

    @property
    def total(self) -> float:
        """The sum over all tokens."""
        return math.fsum(self.values)

    @property
    def mean(self) -> float:
        """The mean over all tokens; NaN where there is none."""
        return self.total / len(self.values) if self.values else math.nan

    def of_row(self, row: int) -> TokenLosses:
        """Those of one row."""
        kept = [(at, value) for at, value in zip(self.rows, self.values, strict=True) if at == row]
        return TokenLosses(tuple(at for at, _ in kept), tuple(v for _, v in kept), self.largest, self.columns)

    def row_means(self) -> dict[int, float]:
        """The mean of each row that has a supervised token."""
        return {row: self.of_row(row).mean for row in dict.fromkeys(self.rows)}

    def limit(self, dtype: torch.dtype) -> float:
        """How far a mean computed in ``dtype`` may be off, in nats: docs/limits.md#cross-entropy."""
        import torch

        eps = torch.finfo(torch.float32).eps
        worst = max(map(abs, self.values), default=0.0)
        counted = math.sqrt(max(len(self.values), 1))
        rounded = 0.0 if dtype in (torch.float32, torch.float64) else step(dtype, worst)
        return eps * (2 * self.largest + math.sqrt(self.columns) + (2 + counted) * worst) + rounded


def token_losses(logits: torch.Tensor, labels: torch.Tensor, *, shift: int = 1) -> TokenLosses:
    """Cross-entropy of every label that is not ignored, from the logits ``shift`` places before it, in float64.

    Args:
        logits: ``(rows, length, vocabulary)``, of any dtype.
        labels: ``(rows, length)`` int64, -100 where nothing is learned.
        shift: 1 for a language model; 0 and 2 are what comes of shifting never or twice.
    """
    import torch

    length = labels.shape[1]
    rows, places = (labels[:, shift:] != IGNORED).nonzero(as_tuple=True)
    targets = labels[rows, places + shift]
    values: list[float] = []
    largest = 0.0
    for start in range(0, len(rows), PLACES_AT_ONCE):
        part = slice(start, start + PLACES_AT_ONCE)
        at = logits[rows[part], places[part]].double()
        right = at.gather(1, targets[part].to(at.device)[:, None]).flatten()
        values += (torch.logsumexp(at, dim=1) - right).tolist()
        largest = max(largest, float(at.abs().max()))
    assert length == logits.shape[1]
    return TokenLosses(tuple(rows.tolist()), tuple(values), largest, int(logits.shape[-1]))


def usual_mistakes(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """What the loss would be if one of the usual things were wrong with it, by the words for that.

    Args:
        logits: ``(rows, length, vocabulary)``.
        labels: ``(rows, length)`` int64.
    """
    right = token_losses(logits, labels)
    means = right.row_means()
    places = labels.shape[0] * labels.shape[1]
    return {
        "the sum over tokens, not their mean": right.total,
        "labels that are not shifted: each token is predicted from itself": token_losses(logits, labels, shift=0).mean,
        "labels that are shifted twice: each token is predicted two places ahead": token_losses(
            logits, labels, shift=2
        ).mean,
        "the mean of the rows' means: a token of a short answer counts more than one of a long answer": (
            math.fsum(means.values()) / len(means)
        ),
        "the sum over tokens divided by all places of the batch, ignored ones too": right.total / places,
        "the sum over tokens divided by the rows": right.total / labels.shape[0],
        **{f"what row {row} alone has: the other rows count nothing": mean for row, mean in means.items()},
    }


def explained(value: float, expected: float, mistakes: dict[str, float], limit: float) -> str:
    """What a wrong loss is, as the end of a sentence: one of the usual mistakes, or a factor."""
    for words, wrong in mistakes.items():
        if abs(value - wrong) <= limit * max(1.0, abs(wrong / expected) if expected else 1.0) != abs(wrong - expected):
            return f", which is {words}"
    return f", {value / expected:.4g} of it" if expected else ""


def telling_labels(labels: torch.Tensor, tokens: Sequence[int], seed: int) -> torch.Tensor:
    """Labels by which every place and every row has another loss, and rows have unequal numbers of tokens.

    Every supervised token is replaced by one of ``tokens`` at random; what is ignored stays ignored. Where all rows
    have the same number, by which a mean of means would be the mean over all, every other row keeps its last one only,
    or has the one before supervised as well.

    Args:
        labels: ``(rows, length)`` int64.
        tokens: Ids to choose from.
        seed: Of the choice.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(tokens, dtype=labels.dtype)
    chosen = ids[torch.randint(len(tokens), labels.shape, generator=generator)].to(labels.device)
    return torch.where(_uneven(labels != IGNORED), chosen, torch.full_like(labels, IGNORED))


def _uneven(counted: torch.Tensor) -> torch.Tensor:
    places = {row: counted[row, 1:].nonzero().flatten() + 1 for row in range(len(counted)) if counted[row, 1:].any()}
    if len({len(at) for at in places.values()}) != 1:
        return counted
    changed = counted.clone()
    for at in list(places.items())[1::2]:
        row, last = at[0], int(at[1][-1])
        if len(at[1]) > 1:
            changed[row] = False
        changed[row, last - 1 if len(at[1]) == 1 and last > 1 else last] = True
    return changed
