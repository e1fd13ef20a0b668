"""What needs widths nearer to those of the released models: frequencies of rotary embeddings, terms of a merger."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pytest_qvl.checks import CheckFailed, layer_arithmetic
from pytest_qvl.faults.case import Case, apply, lora_config
from pytest_qvl.faults.catalogue import find
from pytest_qvl.faults.matrix.random_models import random_config
from pytest_qvl.faults.tools import attribute, while_running
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.layers import mergers
from pytest_qvl.models.sources.synthetic import build_synthetic
from pytest_qvl.samples import scenes

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")


@pytest.fixture(scope="module")
def wide_heads(processor: Any) -> Case:
    """The rotary embedding of the released models: 64 frequencies by base 1e6 in bfloat16, whose ends lie close."""
    from peft import get_peft_model

    config = random_config("qwen2_5_vl", layers=1, blocks=1, vision={"fullatt_block_indexes": [0]})
    text = config.get_text_config()
    text.num_attention_heads = text.num_key_value_heads = 1
    text.head_dim, text.rope_theta = 128, 1e6
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text.rope_parameters, text.rope_scaling = rope, {**rope, "type": "mrope"}
    lora = lora_config()
    model = get_peft_model(build_synthetic(config, None, "cpu", torch.bfloat16), lora).eval()
    nothing: Any = None
    return Case(model, processor, lora, nothing, scenes(3, 1, ["nth_colour", "text"]), [], nothing, nothing)


@pytest.mark.parametrize("name", ["mrope-one-frequency-moved", "rotary-base-off"])
def test_faults_of_many_frequencies_in_16_bits_are_named(wide_heads: Case, name: str) -> None:
    assert layer_arithmetic(wide_heads.model, wide_heads.batch(), wide_heads.lora_config).ok
    assert all(word in _said(wide_heads, name) for word in find(name).words())


def test_one_frequency_that_is_off_is_named_by_its_number(wide_heads: Case) -> None:
    def other(frequencies: torch.Tensor) -> torch.Tensor:
        changed = frequencies.clone()
        changed[5] *= 1.25
        return changed

    rotary = anatomy(wide_heads.model).language_backbone.rotary_emb
    with while_running([rotary], "inv_freq", other), pytest.raises(CheckFailed) as failure:
        layer_arithmetic(wide_heads.model, wide_heads.batch(), wide_heads.lora_config)
    assert "turns frequency 5 by 1.25 times its angle; 1 of 64 frequencies" in str(failure.value)


@pytest.fixture(scope="module")
def wide_merger(processor: Any) -> Case:
    """A merger of 1,280 terms twice in bfloat16, a quarter of a released one's."""
    from peft import get_peft_model

    tower = {"hidden_size": 320, "num_heads": 4, "fullatt_block_indexes": [0]}
    config, lora = random_config("qwen2_5_vl", layers=1, blocks=1, vision=tower), lora_config()
    model = get_peft_model(build_synthetic(config, None, "cpu", torch.bfloat16), lora).eval()
    nothing: Any = None
    return Case(model, processor, lora, nothing, scenes(3, 1, ["side", "text"]), [], nothing, nothing)


def test_a_wide_merger_by_one_kernel_is_judged_with_its_norm_and_without(wide_merger: Case) -> None:
    """Limits that add up all errors as if of one sign are several times what so many terms give, and see nothing."""
    from torch.nn.functional import gelu, linear

    merger: Any = next(mergers(anatomy(wide_merger.model)))

    def merged(x: torch.Tensor) -> torch.Tensor:
        normed = merger.norm.forward(x).reshape(-1, merger.first.in_features)
        inner = gelu(linear(normed, merger.first.weight, merger.first.bias))
        return linear(inner, merger.second.weight, merger.second.bias)

    with attribute(merger.module, "forward", merged):
        evidence = layer_arithmetic(wide_merger.model, wide_merger.batch(), wide_merger.lora_config)
    assert evidence.table is not None
    worst = {str(name): float(value) for name, _count, value in evidence.table.rows}  # type: ignore[arg-type]
    assert 0.05 < worst["merger as a whole"] <= 1
    name = "merger-kernel-without-norm"
    assert all(word in _said(wide_merger, name) for word in find(name).words())


def _said(case: Case, name: str) -> str:
    with apply(name, case) as damaged, pytest.raises(CheckFailed) as failure:
        layer_arithmetic(damaged.model, damaged.batch(), damaged.lora_config)
    return str(failure.value)
