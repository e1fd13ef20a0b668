"""Promise 1: quantized where it should be, 16 bits where it must be."""

from __future__ import annotations

from typing import Any

from pytest_qvl import checks


def test_checkpoint_complete(qvl_quantized_model: Any) -> None:
    """The checkpoint holds every tensor of the model in its shape, and none too many."""
    checks.checkpoint_complete(qvl_quantized_model)


def test_weights_as_stored(qvl_quantized_model: Any, qvl_adapter_policy: Any) -> None:
    """Every tensor in memory is bitwise what the checkpoint holds, every decisive value what its config says."""
    checks.weights_as_stored(qvl_quantized_model, policy=qvl_adapter_policy)


def test_quantization_census(qvl_quantized_model: Any, quantization_policy: Any) -> None:
    """Language linears are NF4 as asked; vision tower, merger, head and embeddings are not."""
    checks.quantization_census(qvl_quantized_model, quantization_policy)
