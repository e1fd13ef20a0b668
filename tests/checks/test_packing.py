"""packing_isolation: packed samples compute what they compute alone, and see no other."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import masking_utils

from pytest_qvl.checks import causality, frozen_vision, loss_arithmetic, packing_isolation
from pytest_qvl.checks.support.noise_floor import NoiseFloor, noise_floor
from pytest_qvl.checks.support.packing import pack
from pytest_qvl.evidence import CannotJudge, CheckFailed, InputError
from pytest_qvl.models.adapters import adapter_parameters
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.samples import make_batch, scenes

if TYPE_CHECKING:
    from pytest_qvl.checks.support.teaching import Batch


@pytest.fixture(scope="module")
def samples() -> Any:
    return scenes(0, 1, ["colour", "nth_shape", "text"], cell=14)


@pytest.fixture(scope="module")
def batch(processor: Any, samples: Any) -> Batch:
    return make_batch(processor, samples, padding_side="right", answers=True)


@pytest.fixture(scope="module")
def packed(lora_model: Any, batch: Batch) -> Batch:
    return pack(anatomy(lora_model), batch)


@pytest.fixture(scope="module")
def floor(lora_model: Any, processor: Any, samples: Any) -> NoiseFloor:
    return noise_floor(lora_model, processor, samples, adapter_disabled=True)


def test_a_packed_row_computes_what_its_samples_compute_alone(
    lora_model: Any, packed: Batch, floor: NoiseFloor
) -> None:
    figures = {figure.name: figure.value for figure in packing_isolation(lora_model, packed, floor).figures}
    assert figures["samples"] == 3
    assert figures["logits compared at places"] == int((packed["labels"] != -100).sum())
    without = {name: value for name, value in packed.items() if name not in {"labels", "use_cache"}}
    evidence = packing_isolation(lora_model, without, floor)
    assert evidence.ok
    assert "the collator adds use_cache=False to the batch" in str(evidence)
    assert "use_cache" not in str(packing_isolation(lora_model, packed, floor))


def test_a_batch_may_say_that_it_wants_no_cache(lora_model: Any, batch: Batch) -> None:
    """As collators of packed rows add it for the Trainer."""
    told = {**batch, "use_cache": False}
    assert pack(anatomy(lora_model), told).keys() == pack(anatomy(lora_model), batch).keys()
    assert causality(lora_model, told).ok
    assert loss_arithmetic(lora_model, told).ok
    assert frozen_vision(lora_model, told).ok


def test_samples_that_see_each_other_are_found(
    lora_model: Any, packed: Batch, floor: NoiseFloor, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(masking_utils, "find_packed_sequence_indices"):
        pytest.skip("this release of Transformers looks for packed rows in another place")
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda *_args, **_kwargs: None)
    with pytest.raises(CheckFailed, match=r"has other logits than alone, by up to(.|\n)*moved row 0, token \d+ \("):
        packing_isolation(lora_model, packed, floor)


def test_positions_of_another_sample_are_found(lora_model: Any, packed: Batch, floor: NoiseFloor) -> None:
    wrong = packed["position_ids"].clone()
    wrong[1:] = wrong[0]
    with pytest.raises(CheckFailed, match=r"^sample \d of row 0 has other logits than alone"):
        packing_isolation(lora_model, {**packed, "position_ids": wrong}, floor)


def test_positions_that_move_logits_less_than_rounding_does_are_found(lora_model: Any, packed: Batch) -> None:
    """One axis of one visual token, under a noise floor that allows a nat: ids are integers, and judged exactly."""
    wrong, coarse = packed["position_ids"].clone(), NoiseFloor(1.0, {}, "bfloat16", 1.0, 1.0)
    image = int((packed["input_ids"][0] == anatomy(lora_model).image_token_id).nonzero()[3])
    wrong[2, 0, image] += 1
    with pytest.raises(CheckFailed, match=r"^row 0, token \d+ .*: h is \d+, should be \d+; 1 tokens in 1 of 1 rows"):
        packing_isolation(lora_model, {**packed, "position_ids": wrong}, coarse)


@pytest.mark.parametrize("trained", [0.0, pytest.param(0.3, marks=pytest.mark.slow)])
def test_rounding_that_moves_a_sample_further_than_those_of_the_floor_is_no_alarm(
    fresh_model: Any,
    processor: Any,
    samples: Any,
    trained: float,
    rounded_otherwise: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With B zero, where the adapter rounds nothing, as well as trained; samples that see each other are one still."""
    model = fresh_model(dtype="float32", lora=True)
    floor = noise_floor(model, processor, samples, adapter_disabled=True)
    for name, matrix in adapter_parameters(anatomy(model)).items():
        if "lora_B" in name:
            matrix.data.normal_(std=trained, generator=torch.Generator().manual_seed(0))
    odd = [
        replace(s, images=tuple(i.resize((90, 140)) for i in s.images)) for s in scenes(1, 1, ["nth_colour", "list"])
    ]
    packed = pack(anatomy(model), make_batch(processor, odd, padding_side="right", answers=True))
    length = packed["input_ids"].shape[1]
    with rounded_otherwise(model, lambda shape: shape[1:2] == (length,)):
        figures = {figure.name: figure for figure in packing_isolation(model, packed, floor).figures}
        assert figures["samples beyond the noise floor, held to their own rounding"].value
        assert figures["packed against alone"].limit < 1e-3
        monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda *_args, **_kwargs: None)
        with pytest.raises(CheckFailed, match="has other logits than alone"):
            packing_isolation(model, packed, floor)


def test_what_cannot_be_judged(lora_model: Any, batch: Batch, packed: Batch, floor: NoiseFloor) -> None:
    with pytest.raises(CannotJudge, match="no row holds several samples"):
        packing_isolation(lora_model, batch, floor)
    with pytest.raises(InputError, match="the noise floor was measured in float16"):
        packing_isolation(lora_model, packed, NoiseFloor(1.0, {}, "float16", 1.0, 1.0))
    video = batch["input_ids"].masked_fill(torch.ones_like(batch["input_ids"]).bool(), 403)
    with pytest.raises(CannotJudge, match="videos are not packed here"):
        pack(anatomy(lora_model), {**batch, "input_ids": video})
