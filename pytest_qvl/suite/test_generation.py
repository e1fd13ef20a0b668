"""Promise 8: generation is greedy, repeatable, and the same alone, in a batch, with and without a cache."""

from __future__ import annotations

from typing import Any

from pytest_qvl import checks


def test_greedy_is_argmax(qvl_lora_model: Any, mixed_batch: Any) -> None:
    """Greedy generation takes the arg-max of the logits."""
    checks.greedy_is_argmax(qvl_lora_model, mixed_batch)


def test_generation_repeatable(qvl_lora_model: Any, mixed_batch: Any) -> None:
    """The same prompt gives bitwise the same logits and tokens."""
    checks.generation_repeatable(qvl_lora_model, mixed_batch)


def test_generation_batch_invariance(
    qvl_lora_model: Any, qvl_processor: Any, one_of_each: Any, qvl_reference: Any
) -> None:
    """A sample generates the same alone and in a left-padded batch."""
    checks.generation_batch_invariance(qvl_lora_model, qvl_processor, one_of_each, qvl_reference)


def test_generation_cache_invariance(qvl_lora_model: Any, mixed_batch: Any, qvl_reference: Any) -> None:
    """A sample generates the same with and without the KV cache."""
    checks.generation_cache_invariance(qvl_lora_model, mixed_batch, qvl_reference)


def test_generation_wellformed(qvl_lora_model: Any, qvl_processor: Any, one_of_each: Any, qvl_reference: Any) -> None:
    """Finite logits, an end, no loops, no vision token and no id outside the vocabulary."""
    checks.generation_wellformed(qvl_lora_model, qvl_processor, one_of_each, qvl_reference)
