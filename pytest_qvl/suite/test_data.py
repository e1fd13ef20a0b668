"""Promise 10: what the collator makes of the data is what the model takes."""

from __future__ import annotations

from typing import Any

from pytest_qvl import checks
from pytest_qvl.checks.batches.rows import comparable, some_rows
from pytest_qvl.checks.support.noise_floor import noise_floor
from pytest_qvl.checks.support.packing import is_packed, pack
from pytest_qvl.models.anatomy import anatomy


def test_batch(qvl_dataset: Any, qvl_collator: Any, qvl_processor: Any, qvl_lora_model: Any) -> None:
    """Placeholders, pixels, masks, token types, positions and labels of collated rows, without a forward pass."""
    for rows in some_rows(qvl_dataset):
        checks.batch(qvl_collator(rows), qvl_processor, qvl_lora_model, comparable(rows), training=True)


def test_packing_isolation(
    qvl_lora_model: Any, qvl_processor: Any, training_samples: Any, training_batches: Any
) -> None:
    """Samples that are packed into a row compute what they compute alone, and see no other."""
    batch = training_batches[0]
    packed = batch if is_packed(batch) else pack(anatomy(qvl_lora_model), batch)
    floor = noise_floor(qvl_lora_model, qvl_processor, training_samples, adapter_disabled=True)
    checks.packing_isolation(qvl_lora_model, packed, floor)
