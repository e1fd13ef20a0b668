"""Promise 8: generation is greedy, repeatable, and the same alone, in a batch, with and without a cache."""

from __future__ import annotations

from typing import Any

from pytest_qvl import checks


def test_greedy_is_argmax(qvl_lora_model: Any, mixed_batches: Any) -> None:
    """Greedy generation takes the arg-max of the logits."""
    for batch in mixed_batches:
        checks.greedy_is_argmax(qvl_lora_model, batch)


def test_generation_repeatable(qvl_lora_model: Any, mixed_batches: Any) -> None:
    """The same prompt gives bitwise the same logits and tokens."""
    for batch in mixed_batches:
        checks.generation_repeatable(qvl_lora_model, batch)


def test_generation_batch_invariance(
    qvl_lora_model: Any, qvl_processor: Any, row_samples: Any, qvl_reference: Any
) -> None:
    """A sample generates the same alone and in a left-padded batch."""
    for samples in row_samples:
        checks.generation_batch_invariance(qvl_lora_model, qvl_processor, samples, qvl_reference)


def test_generation_cache_invariance(qvl_lora_model: Any, mixed_batches: Any, qvl_reference: Any) -> None:
    """A sample generates the same with and without the KV cache."""
    for batch in mixed_batches:
        checks.generation_cache_invariance(qvl_lora_model, batch, qvl_reference)


def test_generation_wellformed(
    qvl_lora_model: Any, qvl_processor: Any, answered_samples: Any, qvl_reference: Any
) -> None:
    """Finite logits, an end, no loops, no vision token and no id outside the vocabulary."""
    checks.generation_wellformed(qvl_lora_model, qvl_processor, answered_samples, qvl_reference)


def test_generation_as_found(qvl_lora_model: Any, qvl_processor: Any, answered_samples: Any) -> None:
    """Mode, generation config and padding side as they are found spoil no reply."""
    checks.generation_as_found(qvl_lora_model, qvl_processor, answered_samples)
