"""Checks inside of a user's autocast, and of models whose forward brings its own: what these compute in is no fault."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_qvl.checks import (
    CheckFailed,
    adapter_neutrality,
    feature_scatter,
    frozen_vision,
    generation_batch_invariance,
    golden_record,
    image_isolation,
    layer_arithmetic,
    training_step,
)
from pytest_qvl.checks.gradients import gradient_arithmetic
from pytest_qvl.checks.support.noise_floor import noise_floor
from pytest_qvl.checks.support.own_rounding import own_response
from pytest_qvl.checks.support.scoring import without_labels
from pytest_qvl.faults.case import Case, apply, load
from pytest_qvl.faults.tools import attribute, values
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.autocast import casts_not_kept
from pytest_qvl.models.layers import family_of
from pytest_qvl.models.training import computes_in_float16
from pytest_qvl.samples import clip_batch, make_batch, scene_clips, scenes

if TYPE_CHECKING:
    from collections.abc import Iterator

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def model(fresh_model: Any) -> Any:
    return fresh_model(dtype="bfloat16", lora=True)


@pytest.fixture(scope="module")
def batch(processor: Any) -> dict[str, torch.Tensor]:
    rows = [sample for sample in scenes(seed=5, per_skill=1) if sample.skill in ("nth_colour", "text", "list")]
    return make_batch(processor, rows, padding_side="right", answers=True)


@contextmanager
def of_its_own(model: Any) -> Iterator[None]:
    """Let the forward of a model run under autocast, as Accelerate's does."""
    base = anatomy(model).base
    with attribute(base, "forward", torch.autocast("cpu", BF16)(base.forward)):
        yield


WRITING = {
    "training_step": lambda model, batch: training_step(model, batch, gradient_checkpointing=False),
    "frozen_vision": frozen_vision,
    "gradient_arithmetic": lambda model, batch: gradient_arithmetic(model, batch, gradient_checkpointing=False),
    "adapter_neutrality": adapter_neutrality,
}


@pytest.mark.parametrize(
    "name", ["training_step", *(pytest.param(n, marks=pytest.mark.slow) for n in list(WRITING)[1:])]
)
@pytest.mark.parametrize("around", ["autocast", "a disabled autocast"])
def test_weights_that_a_check_writes_are_computed_with(model: Any, batch: Any, name: str, around: str) -> None:
    with torch.autocast("cpu", BF16, enabled=around == "autocast"), of_its_own(model):
        model(**batch).loss.backward()  # torch keeps 16-bit copies of the adapter from here on
        model.zero_grad()
        assert WRITING[name](model, batch).ok


def test_an_adapter_is_seen_behind_a_training_forward(model: Any, batch: Any, lora_config: Any) -> None:
    with torch.autocast("cpu", BF16), of_its_own(model):
        model(**batch)
        assert layer_arithmetic(model, batch, lora_config()).ok


def test_the_autocast_around_is_as_it_was() -> None:
    weight, given = torch.ones(2, 2, requires_grad=True), torch.ones(2, 2)
    with torch.autocast("cpu", BF16):
        assert (given @ weight).sum() == 8
        with casts_not_kept():
            weight.data.zero_()
            assert (given @ weight).sum() == 0
            weight.data.fill_(2.0)
            with torch.autocast("cpu", BF16):
                assert (given @ weight).sum() == 16
            weight.data.fill_(3.0)
        assert (given @ weight).dtype == BF16
        assert (given @ weight).sum() == 24
        assert torch.is_autocast_cache_enabled()
        weight.data.zero_()
        with torch.autocast("cpu", BF16):
            pass  # no outermost one: nothing is dropped on leaving it
        assert (given @ weight).sum() == 24
    assert (given @ weight).sum() == 0


# --- a model in float32 under autocast --------------------------------------------------------------------------


@pytest.mark.slow
def test_logits_under_autocast_are_held_to_what_it_computes_in(fresh_model: Any, processor: Any) -> None:
    """The floor is that of a model in bfloat16, whose sums are rounded once, and not that of float32 times a sum's."""
    samples = scenes(seed=0, per_skill=1)
    plain, coarse = fresh_model(dtype="float32"), noise_floor(fresh_model(dtype="bfloat16"), processor, samples)
    fine = noise_floor(plain, processor, samples)
    with torch.autocast("cpu", BF16):
        cast = noise_floor(plain, processor, samples)
        with pytest.raises(ValueError, match="was measured in float32, the model computes in bfloat16"):
            generation_batch_invariance(plain, processor, samples, fine)
        assert generation_batch_invariance(plain, processor, samples, cast).ok
    assert (fine.dtype, cast.dtype, cast.resolution) == ("float32", "bfloat16", coarse.resolution)
    assert coarse.limit / 2 < cast.limit < 2 * coarse.limit


@pytest.mark.slow
def test_last_places_are_those_of_the_dtype_that_products_are_made_in(fresh_model: Any, processor: Any) -> None:
    """A 4-bit product is handed on in float32, where nothing else says that it was made in bfloat16."""
    from peft import prepare_model_for_kbit_training

    samples, moved = scenes(seed=0, per_skill=1), {}
    for name in ("as it is", "prepared"):
        model = fresh_model(dtype="bfloat16")
        if name == "prepared":
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False).eval()
        parts = anatomy(model)
        batch = without_labels(make_batch(processor, samples[:2]))
        with torch.no_grad():
            moved[name] = (
                own_response(parts, lambda m=model, b=batch: m(**b).logits, tower=False).square().mean().sqrt()
            )
    assert moved["prepared"] > moved["as it is"] / 2


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_float16_of_autocast_takes_a_loss_scale(model: Any, dtype: torch.dtype) -> None:
    assert not computes_in_float16(anatomy(model))
    with torch.autocast("cpu", dtype):
        assert computes_in_float16(anatomy(model)) == (dtype == torch.float16)


# --- a model that Accelerate has prepared -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(fresh_model: Any, lora_config: Any) -> Any:
    """Raised to float32 where it is not packed, as by ``prepare_model_for_kbit_training``, then run in bfloat16."""
    from accelerate import Accelerator
    from peft import get_peft_model, prepare_model_for_kbit_training

    base = prepare_model_for_kbit_training(fresh_model(dtype="bfloat16"), use_gradient_checkpointing=False)
    model = get_peft_model(base, lora_config()).eval()
    return Accelerator(mixed_precision="bf16", cpu=True).prepare(model)


def test_an_adapter_on_a_prepared_model_is_neutral(prepared: Any, batch: Any) -> None:
    assert adapter_neutrality(prepared, batch).ok


@pytest.mark.slow
def test_what_a_finite_mask_lets_through_is_seen_on_a_prepared_model(prepared: Any, processor: Any) -> None:
    """Its tower is in float32, and rounds to bfloat16 what it multiplies."""
    unused: Any = None
    rows = [sample for sample in scenes(seed=5, per_skill=1) if sample.skill in ("nth_colour", "text", "list")]
    case = Case(prepared, processor, unused, unused, rows, rows, unused, load)
    assert image_isolation(prepared, processor, rows).ok
    with apply("scored-images-leak-into-each-other", case), pytest.raises(CheckFailed, match="vision attention mix"):
        image_isolation(prepared, processor, rows)


def test_what_the_wrapper_of_a_prepared_model_changes_is_seen(prepared: Any, batch: Any) -> None:
    own = prepared.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        output.logits = output.logits * (1 + 2**-20)  # less than bfloat16 holds
        return output

    with attribute(prepared, "forward", forward), pytest.raises(CheckFailed, match="logits of the base model"):
        adapter_neutrality(prepared, batch)


def test_a_layer_of_a_prepared_model_that_is_not_neutral_is_seen(prepared: Any, batch: Any) -> None:
    layer = anatomy(prepared).language_backbone.layers[0].self_attn.q_proj
    own = layer.forward
    with attribute(layer, "forward", lambda x: own(x) * 1.01), pytest.raises(CheckFailed) as failure:
        adapter_neutrality(prepared, batch)
    assert "first at the output of model.language_model.layers.0.self_attn.q_proj" in str(failure.value)


def test_the_tower_of_a_prepared_model_is_run_as_it_ran(prepared: Any, processor: Any) -> None:
    made = [clip.noise(0) for clip in scene_clips(0, cell=56)]
    rows = clip_batch(processor, made, time=family_of(anatomy(prepared)).video_time)
    assert feature_scatter(prepared, rows).ok


def test_a_prepared_model_is_held_to_the_golden_record_at_its_precision(prepared: Any, processor: Any) -> None:
    assert golden_record(prepared, processor).ok
    with values(anatomy(prepared).blocks[0].mlp.gate_proj.weight, lambda w: w * 1.25), pytest.raises(CheckFailed):
        golden_record(prepared, processor)
