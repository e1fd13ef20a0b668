"""Eager attention that takes some heads at a time: the same numbers, and fewer scores in memory at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

from pytest_qvl.models import attention
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.samples import make_batch, scenes


class Recorded:
    """Eager attention, and of how many scores each of its calls was."""

    def __init__(self, eager: Any) -> None:
        self.eager = eager
        self.scores: list[int] = []

    def __call__(self, module: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        self.scores.append(query.shape[:3].numel() * key.shape[2])
        return self.eager(module, query, key, *args, **kwargs)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    found = Recorded(qwen.eager_attention_forward)
    monkeypatch.setattr(qwen, "eager_attention_forward", found)
    return found


@pytest.fixture(scope="module")
def model(fresh_model: Any) -> Any:
    return fresh_model(quantized=False, dtype="float32")


@pytest.fixture(scope="module")
def batch(processor: Any) -> Any:
    return make_batch(processor, [sample for sample in scenes(seed=3, per_skill=1) if sample.images][:3])


def logits(model: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**batch, use_cache=False).logits
    return found


@pytest.mark.parametrize("at_once", [1, 2**12])
def test_heads_apart_are_heads_together(
    model: Any, batch: Any, recorded: Recorded, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    with attention.other_attention(anatomy(model)):
        together, whole = logits(model, batch), recorded.scores
        monkeypatch.setattr(attention, "SCORES_AT_ONCE", at_once)
        recorded.scores = []
        torch.testing.assert_close(logits(model, batch), together, rtol=1e-4, atol=1e-4)
    assert sum(recorded.scores) == sum(whole)
    assert max(recorded.scores) < max(whole)


def test_few_scores_are_taken_at_once(model: Any, batch: Any, recorded: Recorded) -> None:
    with attention.other_attention(anatomy(model)):
        apart = logits(model, batch)
    calls, recorded.scores = recorded.scores, []
    model.set_attn_implementation("eager")
    try:
        assert torch.equal(logits(model, batch), apart)
    finally:
        model.set_attn_implementation("sdpa")
    assert recorded.scores == calls


def test_the_library_has_its_own_function_back(model: Any, recorded: Recorded) -> None:
    with attention.other_attention(anatomy(model)):
        assert qwen.eager_attention_forward is not recorded
    assert qwen.eager_attention_forward is recorded
    assert set(attention.attention_names(anatomy(model)).values()) == {"sdpa"}
