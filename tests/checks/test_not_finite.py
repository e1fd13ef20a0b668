"""One NaN in the vision tower: the check of the tower says so, and no other blames what it looks at."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pytest_qvl import checks
from pytest_qvl.evidence import CannotJudge, CheckFailed
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.samples import make_batch, scenes

ORIGIN = "begin.* at model.visual.blocks.1.attn.qkv, whose own weight is not finite"
SAMPLES = scenes(0, 1, ("nth_colour", "side"))[:2]


@pytest.fixture(scope="module")
def model(fresh_model: Any) -> Any:
    damaged = fresh_model(lora=True)
    with torch.no_grad():
        anatomy(damaged).blocks[1].attn.qkv.weight[3, 5] = float("nan")
    return damaged


def test_the_tower_is_broken(model: Any, processor: Any) -> None:
    with pytest.raises(CheckFailed, match=f"visual features are not finite on sample.*{ORIGIN}"):
        checks.vision_stability(model, processor, SAMPLES, None)


def test_the_checkpoint_is_broken_also_where_there_can_be_no_reference(model: Any, tiny_dir: Any) -> None:
    with pytest.raises(CheckFailed, match=r"1 tensors hold NaN or infinity: model.visual.blocks.1.attn.qkv.weight"):
        checks.checkpoint_complete(model, tiny_dir)


def test_no_place_is_blamed(model: Any, processor: Any) -> None:
    batch = make_batch(processor, SAMPLES)
    for check in (checks.feature_scatter, checks.causality):
        with pytest.raises(CannotJudge, match=f"are not finite.*{ORIGIN}"):
            check(model, batch)
    with pytest.raises(CannotJudge, match=f"the model's outputs are not finite.*{ORIGIN}"):
        checks.image_isolation(model, processor, SAMPLES)


def test_gradients_are_not_judged_where_the_loss_is_not_finite(model: Any, processor: Any) -> None:
    batch = make_batch(processor, SAMPLES, answers=True)
    with pytest.raises(CheckFailed, match=f"the first loss is nan.*{ORIGIN}") as caught:
        checks.training_step(model, batch, gradient_checkpointing=False)
    assert len(caught.value.evidence.problems) == 1


def test_steps_that_train_nothing_do_not_prove_that_vision_stays_frozen(model: Any, processor: Any) -> None:
    batch = make_batch(processor, SAMPLES, answers=True)
    with pytest.raises(CannotJudge, match=f"the loss of the first step is nan.*{ORIGIN}; such a step trains nothing"):
        checks.frozen_vision(model, batch)


def test_a_statistic_of_a_4_bit_weight_is_named(fresh_model: Any, processor: Any) -> None:
    damaged = fresh_model(lora=True)
    name = "model.language_model.layers.1.mlp.up_proj"
    quant = anatomy(damaged).base.get_submodule(name).base_layer.weight.quant_state
    quant.offset = quant.offset * float("nan")
    with pytest.raises(CheckFailed, match=f"the first loss is nan.*{name}.base_layer, whose own weight.offset is not"):
        checks.training_step(damaged, make_batch(processor, SAMPLES, answers=True), gradient_checkpointing=False)
