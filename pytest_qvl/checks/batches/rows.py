"""Which rows of a data set are collated and judged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.batches.conversations import is_comparable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROWS = 16
PER_BATCH = 4


def some_rows(dataset: Sequence[Any], *, rows: int = ROWS, per_batch: int = PER_BATCH) -> Iterator[list[Any]]:
    """Batches of rows spread over a data set, the first and the last among them; no batch is larger than the data set.

    Args:
        dataset: With ``len`` and indices.
        rows: How many rows to take at most.
        per_batch: How many rows a batch has at most.
    """
    count = min(rows, len(dataset))
    places = sorted({round(number * (len(dataset) - 1) / max(1, count - 1)) for number in range(count)})
    for first in range(0, len(places), per_batch):
        yield [dataset[place] for place in places[first : first + per_batch]]


def comparable(rows: Sequence[Any]) -> list[Any] | None:
    """The rows, where :func:`pytest_qvl.checks.batch` can compare a batch with them; None where it cannot."""
    return list(rows) if all(map(is_comparable, rows)) else None
