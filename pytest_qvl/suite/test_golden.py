"""Promise 12, from end to end: fixed inputs give what verified releases gave."""

from __future__ import annotations

from typing import Any

from pytest_qvl import checks


def test_golden_record(qvl_quantized_model: Any, qvl_processor: Any, qvl_adapter_policy: Any) -> None:
    """Pixels, positions, features and logits are those of the record beside the checkpoint."""
    checks.golden_record(qvl_quantized_model, qvl_processor, qvl_adapter_policy)
