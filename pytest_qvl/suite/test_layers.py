"""Promise 12: every layer computes what its definition says, held to independent arithmetic."""

from __future__ import annotations

from typing import Any

from pytest_qvl import checks


def test_layer_arithmetic(qvl_lora_model: Any, qvl_lora_config: Any, mixed_batches: Any) -> None:
    """Each module's output equals an oracle's on the module's own input, to within the rounding of one operation."""
    for batch in mixed_batches:
        checks.layer_arithmetic(qvl_lora_model, batch, qvl_lora_config)
