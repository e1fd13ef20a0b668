"""Promise 10: what the collator makes of the data is what the model takes."""

from __future__ import annotations

from typing import Any

from pytest_qvl import checks
from pytest_qvl.checks.batches.rows import comparable, some_rows


def test_batch(qvl_dataset: Any, qvl_collator: Any, qvl_processor: Any, qvl_lora_model: Any) -> None:
    """Placeholders, pixels, masks, token types, positions and labels of collated rows, without a forward pass."""
    for rows in some_rows(qvl_dataset):
        checks.batch(qvl_collator(rows), qvl_processor, qvl_lora_model, comparable(rows), training=True)
