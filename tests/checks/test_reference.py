"""The full-precision reference: what it holds, what it refuses, and a noise floor that measures noise."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn

from pytest_qvl.checks.support.binomial import largest_by_chance, smallest_by_chance, tail
from pytest_qvl.checks.support.noise_floor import NoiseFloor, noise_floor, rows_apart
from pytest_qvl.checks.support.reference import Reference, record_reference
from pytest_qvl.checks.support.scoring import answer_logits, chunks, says, scored_columns
from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.adapters import adapter_parameters
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.attention import attention_names
from pytest_qvl.samples import Sample, make_batch, scenes

SAMPLES = scenes(seed=3, per_skill=3)
FEW = SAMPLES[:10]


@pytest.fixture(scope="module")
def full(fresh_model: Any) -> Any:
    return fresh_model(quantized=False)


@pytest.fixture(scope="module")
def reference(full: Any, processor: Any) -> Reference:
    return record_reference(full, processor, SAMPLES)


def randomised(model: Any) -> Any:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding | nn.Conv3d):
                module.weight.normal_(0, 0.04)
    return model


def test_reference_is_small_picklable_and_on_the_cpu(reference: Reference) -> None:
    text = pickle.dumps(reference)
    copy = pickle.loads(text)
    assert len(text) < 40_000 * len(SAMPLES)
    assert copy.floor == reference.floor
    assert copy.probes.keys() == {sample.id for sample in SAMPLES}
    for name, probe in copy.probes.items():
        assert probe.totals == reference.probes[name].totals
        tensors = [
            probe.top_ids,
            probe.top_logprobs,
            *(t for p in probe.tower for t in (p.patches, p.visual_tokens)),
        ]
        assert all(tensor.device.type == "cpu" and tensor.grad_fn is None for tensor in tensors)


def test_recording_again_gives_the_same(full: Any, processor: Any, reference: Reference) -> None:
    again = record_reference(full, processor, SAMPLES)
    assert again.floor == reference.floor
    assert again.ulp_response == reference.ulp_response
    assert {n: p.totals for n, p in again.probes.items()} == {n: p.totals for n, p in reference.probes.items()}


def test_totals_are_log_probabilities_of_the_answer(full: Any, processor: Any, reference: Reference) -> None:
    sample = next(s for s in SAMPLES if s.skill == "colour_at")
    batch = make_batch(processor, [sample], answers=True)
    with torch.no_grad():
        logits = full(**{k: v for k, v in batch.items() if k != "labels"}).logits.float()
    labels = batch["labels"][0]
    places = (labels != -100).nonzero().flatten()
    expected = logits[0].log_softmax(-1)[places - 1, labels[places]].sum()
    # one row instead of a batch: 4 x floor for every answer token
    tolerance = reference.floor.limit * len(places)
    assert reference.probes[sample.id].totals["true"] == pytest.approx(float(expected), abs=tolerance)


def test_trained_weights_have_knowledge_and_random_ones_have_not(
    fresh_model: Any, processor: Any, reference: Reference
) -> None:
    assert reference.has_knowledge
    assert any(probe.said.right for probe in reference.probes.values())
    random = record_reference(randomised(fresh_model(quantized=False)), processor, SAMPLES)
    assert not random.has_knowledge
    assert not any(probe.said.right or probe.said.stopped for probe in random.probes.values())


def test_quantized_model_is_refused(lora_model: Any, processor: Any) -> None:
    with pytest.raises(ValueError, match=r"28 linears of this model are quantized \(first: model.language_model"):
        record_reference(lora_model, processor, FEW)


def test_adapter_disabled_is_the_base_whatever_the_adapter_holds(fresh_model: Any, processor: Any) -> None:
    model = fresh_model(lora=True)
    before = record_reference(model, processor, FEW, adapter_disabled=True)
    with torch.no_grad():
        for parameter in adapter_parameters(anatomy(model)).values():
            parameter.normal_()
    after = record_reference(model, processor, FEW, adapter_disabled=True)
    assert before.source == "nf4 base, adapter disabled"
    assert after.floor == before.floor
    assert {n: p.totals for n, p in after.probes.items()} == {n: p.totals for n, p in before.probes.items()}
    floor = noise_floor(model, processor, FEW, adapter_disabled=True)
    assert floor == before.floor
    assert floor != noise_floor(model, processor, FEW)


def test_adapter_disabled_needs_an_adapter(full: Any, processor: Any) -> None:
    with pytest.raises(ValueError, match="no adapter to disable"):
        record_reference(full, processor, FEW, adapter_disabled=True)


@pytest.mark.parametrize(
    ("samples", "message"), [([], "no samples"), ([*FEW, FEW[3]], f"unique; '{FEW[3].id}' is not")]
)
def test_samples_that_cannot_be_keyed(full: Any, processor: Any, samples: list[Sample], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record_reference(full, processor, samples)


def test_other_samples_are_refused(reference: Reference) -> None:
    picture = FEW[0].images[0].copy()
    picture.putpixel((0, 0), (1, 2, 3))
    others = [
        (replace(FEW[0], id="new"), "holds no sample 'new'"),
        (replace(FEW[0], answer="mauve"), "is not the one"),
        (replace(FEW[0], images=(picture,)), "is not the one"),
    ]
    for sample, message in others:
        with pytest.raises(ValueError, match=message):
            reference.probe(sample)
    assert reference.probe(FEW[0]) is reference.probes[FEW[0].id]


@pytest.mark.parametrize(("dtype", "low", "high"), [("float32", 1e-7, 1e-4), ("bfloat16", 5e-3, 0.25)])
def test_noise_floor_is_rounding(fresh_model: Any, processor: Any, dtype: str, low: float, high: float) -> None:
    floor = noise_floor(fresh_model(dtype=dtype), processor, FEW)
    assert floor.dtype == dtype
    assert len(floor.computations) == 4
    assert floor.value == max(floor.computations.values())
    # rounding of logits of size 10: eps is 1e-7 in float32 and 8e-3 in bfloat16
    assert low < floor.value < high
    assert floor.resolution == torch.finfo(getattr(torch, dtype)).eps * 8  # the largest logits are 8 to 16
    assert floor.last_place >= floor.resolution
    assert floor.limit == max(4 * floor.value, floor.last_place + floor.resolution)


def test_limit_is_capped_at_one_nat() -> None:
    assert NoiseFloor(0.1, {}, "bfloat16", 0.0625, 0.1).limit == pytest.approx(0.4)
    assert NoiseFloor(0.5, {}, "bfloat16", 0.25, 0.5).limit == 1.0
    assert NoiseFloor(0.1, {}, "bfloat16", 0.25, 3.0).limit == 1.0
    # logits beyond 1,024 stand 8 apart in bfloat16
    assert NoiseFloor(8.0, {}, "bfloat16", 8.0, 16.0).limit == 32.0


def test_nothing_to_measure(fresh_model: Any, processor: Any) -> None:
    model = fresh_model(quantized=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(CannotJudge, match=r"no noise floor: .* all leave every logit as it was"):
        noise_floor(model, processor, FEW)


def test_overflow_is_no_noise(fresh_model: Any, processor: Any) -> None:
    model = fresh_model(quantized=False, dtype="float16")
    with torch.no_grad():
        model.lm_head.weight.fill_(60000.0)
    with pytest.raises(CannotJudge, match="logits are not finite"):
        noise_floor(model, processor, FEW)


def test_rows_apart_changes_rounding_only(fresh_model: Any, processor: Any) -> None:
    parts = anatomy(fresh_model(dtype="float32"))
    batch = make_batch(processor, FEW, answers=True)
    plain = answer_logits(parts, batch).logits
    with rows_apart(parts, scored_columns(batch)):
        apart = answer_logits(parts, batch).logits
    assert 0 < float((apart - plain).abs().max()) < 1e-4
    assert torch.equal(answer_logits(parts, batch).logits, plain)


def test_recording_leaves_the_model_as_it_found_it(fresh_model: Any, processor: Any) -> None:
    model = fresh_model(lora=True).train()
    parts = anatomy(model)
    config, state = parts.base.generation_config.to_dict(), torch.get_rng_state()
    record_reference(model, processor, FEW, adapter_disabled=True)
    assert attention_names(parts) == dict.fromkeys(attention_names(parts), "sdpa")
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(module.training for module in model.modules())
    assert parts.base.generation_config.to_dict() == config
    assert parts.core.rope_deltas is None
    assert torch.equal(torch.get_rng_state(), state)


def test_chunks_hold_every_sample_once_and_stay_small() -> None:
    groups = list(chunks(SAMPLES))
    assert sorted(s.id for g in groups for s in g) == sorted(s.id for s in SAMPLES)
    assert max(map(len, groups)) <= 16
    assert [[s.id for s in g] for g in chunks(SAMPLES[::-1])] == [[s.id for s in g] for g in groups]


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("The shape is Red.", "red", True),
        ("red", "red", True),
        ("reddish", "red", False),
        ("blue star, red circle", "red circle", True),
        ("", "red", False),
    ],
)
def test_answers_are_found_as_whole_words(text: str, answer: str, expected: bool) -> None:
    assert says(text, answer) is expected


def test_binomial_tail() -> None:
    assert tail(0, 5, 0.3) == pytest.approx(1)
    assert tail(14, 14, 0.5) == pytest.approx(2**-14)
    assert tail(2, 3, 0.5) == pytest.approx(0.5)
    # P(X > 7) = 6e-5 and P(X > 6) = 5e-4 for 70 trials at 0.02
    assert largest_by_chance(70, 0.02, 1e-4) == 8 - (tail(8, 70, 0.02) <= 1e-4)
    assert largest_by_chance(0, 0.02, 1e-4) == 0
    assert largest_by_chance(4, 1.0, 1e-4) == 4
    assert [tail(k, 3, 0.0) for k in (0, 1, 3, 4)] == [1, 0, 0, 0]
    assert [tail(k, 3, 1.0) for k in (0, 1, 3, 4)] == [1, 1, 1, 0]


@pytest.mark.parametrize("rate", [0.02, 0.5, 0.7])
def test_binomial_tail_is_rounded_once(rate: float) -> None:
    exact = Fraction(rate)
    chances = [math.comb(40, k) * exact**k * (1 - exact) ** (40 - k) for k in range(41)]
    assert [tail(k, 40, rate) for k in range(42)] == [float(sum(chances[k:])) for k in range(42)]


@pytest.mark.parametrize("rate", [1 / 64, 0.5, 0.75])
def test_binomial_limits_of_five_thousand_trials(rate: float) -> None:
    """Against logarithms of the gamma function: a coefficient of so many trials is no float."""
    chances = [
        math.exp(
            math.lgamma(5001)
            - math.lgamma(k + 1)
            - math.lgamma(5001 - k)
            + k * math.log(rate)
            + (5000 - k) * math.log1p(-rate)
        )
        for k in range(5001)
    ]
    beyond = round(5000 * rate + 3 * math.sqrt(5000 * rate * (1 - rate)))
    assert tail(beyond, 5000, rate) == pytest.approx(math.fsum(chances[beyond:]), rel=1e-9)
    most, least = largest_by_chance(5000, rate, 1e-4), smallest_by_chance(5000, rate, 1e-4)
    assert math.fsum(chances[most + 1 :]) <= 1e-4 < math.fsum(chances[most:])
    assert math.fsum(chances[:least]) <= 1e-4 < math.fsum(chances[: least + 1])
