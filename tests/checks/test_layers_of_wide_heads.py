"""Rotary embeddings with as many frequencies as the released models have."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pytest_qvl.checks import CheckFailed, layer_arithmetic
from pytest_qvl.faults.case import Case, apply, lora_config
from pytest_qvl.faults.catalogue import find
from pytest_qvl.faults.matrix.random_models import random_config
from pytest_qvl.faults.tools import while_running
from pytest_qvl.models.anatomy import anatomy
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


def _said(case: Case, name: str) -> str:
    with apply(name, case) as damaged, pytest.raises(CheckFailed) as failure:
        layer_arithmetic(damaged.model, damaged.batch(), damaged.lora_config)
    return str(failure.value)
