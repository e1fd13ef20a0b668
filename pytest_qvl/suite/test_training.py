"""Promise 10: a training step reaches every adapter, and only adapters."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_qvl import checks

checkpointing = pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["plain", "checkpointing"])


@pytest.fixture
def rows(training_batch: Any, training_batches: Any, gradient_checkpointing: bool) -> Any:
    """What a test trains on: without checkpointing every activation is kept, so one batch of several does."""
    return training_batch if gradient_checkpointing else training_batches[0]


@checkpointing
def test_training_step(
    qvl_lora_model: Any,
    rows: Any,
    *,
    gradient_checkpointing: bool,
    qvl_make_optimizer: Any,
    qvl_adapter_policy: Any,
    qvl_vram: Any,
) -> None:
    """Loss falls, gradients are finite and on adapters only, every adapter is reached."""
    with qvl_vram.phase(f"optimizer steps, {'checkpointing' if gradient_checkpointing else 'plain'}"):
        checks.training_step(
            qvl_lora_model,
            rows,
            gradient_checkpointing=gradient_checkpointing,
            make_optimizer=qvl_make_optimizer,
            policy=qvl_adapter_policy,
        )


@checkpointing
def test_vision_not_backpropagated(
    qvl_lora_model: Any, rows: Any, gradient_checkpointing: bool, qvl_adapter_policy: Any
) -> None:
    """Autograd does not follow the frozen vision tower."""
    checks.vision_not_backpropagated(
        qvl_lora_model, rows, gradient_checkpointing=gradient_checkpointing, policy=qvl_adapter_policy
    )


def test_label_mask(qvl_lora_model: Any, training_batch: Any, qvl_processor: Any) -> None:
    """Only answer tokens are supervised: no image, vision, prompt or pad token."""
    checks.label_mask(qvl_lora_model, training_batch, qvl_processor)


def test_training_collation(qvl_processor: Any, training_samples: Any, training_batch: Any) -> None:
    """Each row is taught its own sample's answer, and attends to all of itself and to no padding."""
    checks.training_collation(qvl_processor, training_samples, training_batch)


def test_loss_arithmetic(qvl_lora_model: Any, training_batches: Any, qvl_trainer: Any) -> None:
    """The loss is the mean cross-entropy of the answers' tokens, in one batch and accumulated over several."""
    checks.loss_arithmetic(qvl_lora_model, training_batches[0], trainer=qvl_trainer)


@checkpointing
def test_gradient_arithmetic(qvl_lora_model: Any, rows: Any, gradient_checkpointing: bool) -> None:
    """Autograd's gradient is the derivative of the loss, in every layer."""
    checks.gradient_arithmetic(qvl_lora_model, rows, gradient_checkpointing=gradient_checkpointing)
