"""No limit that comes from measured noise lies below the resolution of what it judges."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pytest_qvl.checks.generation_invariance import generation_batch_invariance, generation_cache_invariance
from pytest_qvl.checks.support.bitwise import differs
from pytest_qvl.checks.support.greedy import Reply
from pytest_qvl.checks.support.noise_floor import EVIDENCE, NoiseFloor
from pytest_qvl.checks.support.own_rounding import HeldLogits
from pytest_qvl.checks.support.reply_logits import HeldReplies
from pytest_qvl.checks.support.rounding import last_place_noise, rounded_sums, step
from pytest_qvl.checks.support.tower import row_drift
from pytest_qvl.checks.vision import DRIFT_CAP, drift_limit
from pytest_qvl.evidence import CheckFailed, Judge
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.samples import make_batch, scenes

if TYPE_CHECKING:
    from collections.abc import Callable

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = scenes(seed=7, per_skill=1)[:4]
dtypes = st.sampled_from(DTYPES)
magnitudes = st.floats(1e-3, 3e4)
noises = st.floats(0, 100)


def next_up(value: torch.Tensor) -> torch.Tensor:
    """The neighbouring number away from zero; ``torch.nextafter`` has no float16."""
    integers = torch.int32 if value.dtype == torch.float32 else torch.int16
    return (value.view(integers) + 1).view(value.dtype)


def floor_of(dtype: torch.dtype, value: float, last_place: float, largest: float) -> NoiseFloor:
    return NoiseFloor(value, {}, str(dtype).removeprefix("torch."), step(dtype, largest), last_place)


def judged(one: torch.Tensor, other: torch.Tensor, floor: NoiseFloor) -> Judge:
    """What the generation checks say of one step with these logits, which no last place in any module moves."""
    replies, judge = HeldReplies(HeldLogits(floor)), Judge("generation", "")
    made = [Reply((1,), True, None, logits[None].float()) for logits in (one, other)]
    replies.take("row 0", *made, lambda: torch.zeros(1, 1, one.numel()))
    replies.judge(judge, "two ways", "")
    return judge


@given(dtypes, st.floats(-3e4, 3e4))
def test_a_step_is_the_distance_to_the_neighbour(dtype: torch.dtype, number: float) -> None:
    value = torch.tensor([number], dtype=dtype)
    neighbour = next_up(value)
    assert abs(float(neighbour) - float(value)) == step(dtype, abs(float(value)))


@given(dtypes, magnitudes, magnitudes, noises, noises)
def test_one_step_of_a_logit_never_fails_and_many_limits_always_do(
    dtype: torch.dtype, largest: float, scored: float, value: float, last_place: float
) -> None:
    """Whatever the floor, and also where the judged logits are larger than any that the floor was measured on."""
    floor = floor_of(dtype, value, last_place, scored)
    logits = torch.tensor([largest, -largest / 3, 0.0], dtype=dtype)
    moved = next_up(logits)
    assert not judged(logits, moved, floor).problems
    limit = floor.limit_for(float(moved.abs().max()))
    assert limit >= step(dtype, float(moved.abs().max())) >= floor_of(dtype, 0, 0, largest).resolution
    assert limit >= floor.limit
    beyond = logits.double() + 4 * limit
    assert judged(logits.float(), beyond.to(torch.float32), floor).problems


@given(dtypes, magnitudes, noises, noises)
def test_no_limit_exceeds_a_nat_where_the_dtype_can_hold_one(
    dtype: torch.dtype, largest: float, value: float, last_place: float
) -> None:
    assert floor_of(dtype, value, last_place, largest).limit <= max(EVIDENCE, 4 * step(dtype, largest))


@given(dtypes, st.lists(magnitudes, min_size=1, max_size=8), st.floats(0, 10))
def test_one_step_of_every_feature_is_within_the_drift_limit(
    dtype: torch.dtype, numbers: list[float], rounding: float
) -> None:
    rows = torch.tensor([numbers], dtype=dtype)
    limit = drift_limit(rounding, dtype)
    assert float(row_drift(next_up(rows), rows).max()) <= limit <= max(DRIFT_CAP, torch.finfo(dtype).eps)
    assert float(row_drift(rows * (1 + 4 * limit), rows).min()) > limit


def test_a_sum_in_float32_is_rounded_at_every_term() -> None:
    generator = torch.Generator().manual_seed(0)
    terms = 1536
    factors = torch.randn(2, 400, terms, generator=generator)
    products = (factors[0] * factors[1]).double()
    total = torch.zeros(400)
    for term in products.T:
        total = (total.double() + term).float()
    measured = float((total - products.sum(1)).pow(2).mean().sqrt())
    last = float(products.sum(1).pow(2).mean().sqrt()) * torch.finfo(torch.float32).eps / math.sqrt(12)
    assert 0.5 < measured / (last * rounded_sums(torch.float32, terms)) < 2
    assert rounded_sums(torch.bfloat16, terms) == rounded_sums(torch.float32, 1) == 1


def test_last_places_move_and_come_back() -> None:
    layer = nn.Linear(4, 4, dtype=torch.bfloat16).requires_grad_(False)
    inputs = torch.ones(2, 4, dtype=torch.bfloat16)
    plain = layer(inputs)
    with last_place_noise([layer]):
        moved = layer(inputs)
    ratio = ((moved - plain).float().abs() / plain.float().abs()).max()
    assert 0 < float(ratio) <= 2 * torch.finfo(torch.bfloat16).eps
    assert torch.equal(layer(inputs), plain)


@pytest.fixture(scope="module")
def brain(fresh_model: Any) -> Any:
    return fresh_model(dtype="bfloat16", lora=True)


# A CPU with matrix products in bfloat16 hardware, where kernels all but share their additions: a quarter of a step of the
# largest logits, which are 8 to 16. Last places move them as anywhere else.
QUIET = NoiseFloor(0.0151, {}, "bfloat16", 0.0625, 0.09375)


def one_step(brain: Any, when: Callable[[torch.Tensor], bool]) -> Any:
    """Round the largest logit of every row the other way."""

    def other_way(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        if not when(output):
            return output
        largest = output.abs().argmax(-1, keepdim=True)
        return output.scatter(-1, largest, next_up(output.gather(-1, largest)))

    return anatomy(brain).lm_head.register_forward_hook(other_way)


def test_another_rounding_of_the_largest_logit_is_no_defect(brain: Any, processor: Any) -> None:
    alone = one_step(brain, lambda output: output.shape[0] == 1)
    try:
        evidence = generation_batch_invariance(brain, processor, ROWS, QUIET)
    finally:
        alone.remove()
    [worst] = [f for f in evidence.figures if f.name == "alone against batch"]
    assert worst.value >= 0.0625
    decoding = one_step(brain, lambda output: output.shape[1] == 1)
    try:
        generation_cache_invariance(brain, make_batch(processor, ROWS), QUIET)
    finally:
        decoding.remove()


def test_a_head_that_is_off_by_many_steps_is_a_defect(brain: Any, processor: Any) -> None:
    def off(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 0.25 if output.shape[0] == 1 else output

    handle = anatomy(brain).lm_head.register_forward_hook(off)
    try:
        with pytest.raises(CheckFailed, match="alone against batch: logits differ by "):
            generation_batch_invariance(brain, processor, ROWS, QUIET)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bool, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.float64]
)
def test_bits_are_those_of_every_size_of_number(dtype: torch.dtype) -> None:
    values, other = (torch.tensor(numbers)[:, None].to(dtype) for numbers in ([0.0, 1.0, 0.0], [0.0, 0.0, 1.0]))
    assert differs(values, values.clone()).tolist() == [False, False, False]
    assert differs(values, other).tolist() == [False, True, True]
