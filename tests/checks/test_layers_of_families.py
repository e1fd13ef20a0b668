"""Layers that the embedded model does not have: DeepStack and learned positions of Qwen3-VL, the tower of Qwen2-VL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_qvl.checks import CheckFailed, QuantizationPolicy, layer_arithmetic
from pytest_qvl.faults.case import Case, apply, load, lora_config
from pytest_qvl.faults.catalogue import catalogue, find
from pytest_qvl.faults.matrix.random_models import random_model
from pytest_qvl.faults.subject import embedded
from pytest_qvl.faults.tools import attribute
from pytest_qvl.models.quantized import usual_quantization
from pytest_qvl.samples import scenes

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")
DEEPSTACK = [n for n, f in catalogue().items() if "DeepStack" in f.requires and f.check == "layer_arithmetic"]


@pytest.fixture(scope="module", params=["qwen3_vl", pytest.param("qwen2_vl", marks=pytest.mark.slow)])
def case(processor: Any, request: pytest.FixtureRequest) -> Iterator[Case]:
    """A random model of another family in float32, and a batch of an image beside a text."""
    from peft import get_peft_model

    base = random_model(
        request.param, seed=0, dtype=torch.float32, quantization_config=usual_quantization(torch.float32)
    )
    unrecorded: Any = None
    rows, policy = scenes(3, 1, ["side", "text"]), QuantizationPolicy(compute_dtype="float32")
    config = lora_config()
    with attribute(processor.image_processor, "patch_size", base.config.vision_config.patch_size):
        model = get_peft_model(base, config).eval()
        yield Case(model, processor, config, policy, rows, rows, unrecorded, load, embedded("float32"))


def test_a_healthy_model_passes_and_nothing_is_left_out(case: Case) -> None:
    evidence = layer_arithmetic(case.model, case.batch(), case.lora_config)
    assert evidence.notes == ()
    assert evidence.table is not None
    operations = {str(name) for name, *_ in evidence.table.rows}
    assert operations >= {"vision attention", "vision rotary embedding", "attention", "4-bit product", "LoRA"}
    assert ("learned positions" in operations) == (not find("deepstack-lost").missing(case))


@pytest.mark.parametrize("name", DEEPSTACK)
def test_a_fault_of_what_only_qwen3_vl_has_is_named(case: Case, name: str) -> None:
    if reason := find(name).missing(case):
        pytest.skip(reason)
    with apply(name, case) as damaged, pytest.raises(CheckFailed) as failure:
        layer_arithmetic(damaged.model, damaged.batch(), damaged.lora_config)
    for words in find(name).words():
        assert words in str(failure.value)
