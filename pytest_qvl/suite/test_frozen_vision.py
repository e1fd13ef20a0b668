"""Promise 4: training moves the adapter and nothing else."""

from __future__ import annotations

from typing import Any

from pytest_qvl import checks


def test_frozen_vision(
    qvl_lora_model: Any, training_batches: Any, qvl_make_optimizer: Any, qvl_adapter_policy: Any
) -> None:
    """After real optimizer steps every base tensor and every vision feature is bitwise what it was."""
    checks.frozen_vision(
        qvl_lora_model,
        training_batches,
        steps=max(2, len(training_batches)),
        make_optimizer=qvl_make_optimizer,
        policy=qvl_adapter_policy,
    )
