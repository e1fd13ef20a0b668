"""Alignment passes NF4, fails when pictures lose their meaning, and refuses to judge what knows nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_qvl.checks.support.noise_floor import NoiseFloor
from pytest_qvl.checks.support.probing import Margin
from pytest_qvl.checks.support.reference import Reference, record_reference
from pytest_qvl.checks.support.rounding import step
from pytest_qvl.checks.visual_alignment import AlignmentLimits, alignment, margin_noise
from pytest_qvl.evidence import CannotJudge, CheckFailed, Evidence
from pytest_qvl.models.adapters import adapter_parameters
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.taps import features_replaced, positions_changed
from pytest_qvl.samples import Sample, make_batch, scenes

SKILLS = ("colour", "side", "list", "nth_colour", "text")
SAMPLES = scenes(seed=11, per_skill=7, skills=SKILLS)
SHORT = 12


@pytest.fixture(scope="module")
def full(fresh_model: Any) -> Any:
    return fresh_model(quantized=False)


@pytest.fixture(scope="module")
def reference(full: Any, processor: Any) -> Reference:
    return record_reference(full, processor, SAMPLES)


@pytest.fixture(scope="module")
def base(fresh_model: Any) -> Any:
    return fresh_model()


def fails(model: Any, processor: Any, reference: Reference) -> str:
    with pytest.raises(CheckFailed) as caught:
        alignment(model, processor, SAMPLES, reference, max_new_tokens=SHORT)
    return "\n".join(caught.value.evidence.problems)


def figure(evidence: Evidence, name: str) -> float:
    return float(next(f.value for f in evidence.figures if f.name == name))


def test_nf4_with_a_fresh_adapter(lora_model: Any, processor: Any, reference: Reference) -> None:
    evidence = alignment(lora_model, processor, SAMPLES, reference)
    assert figure(evidence, "right answers") >= 0.95 * len(SAMPLES)
    for ablation in ("blank", "noise", "swapped"):
        assert 0.95 < figure(evidence, f"margin over {ablation} images / reference") < 1.05
    # text-only probes have no margin, and a healthy model guesses some answers without looking
    assert figure(evidence, "probes left out under blank images") < 0.4 * len(SAMPLES)
    assert 0 < figure(evidence, "mean KL divergence at answer tokens") < 0.01
    assert figure(evidence, "same most probable token") > 0.97
    assert evidence.table is not None
    assert {row[0] for row in evidence.table.rows} == {sample.skill for sample in SAMPLES}
    digests = [f"{reference.probe(sample).digest:08x}" for sample in SAMPLES]
    digest, became = zip(*(str(answer).split(" ") for answer in evidence.data["answers"]), strict=True)
    assert list(digest) == digests
    assert sum(one in ("right", "gained") for one in became) == figure(evidence, "right answers")
    assert became.count("lost") - became.count("gained") == figure(evidence, "answers lost less gained")


def test_full_precision_against_itself_is_exact(full: Any, processor: Any, reference: Reference) -> None:
    evidence = alignment(full, processor, SAMPLES, reference)
    assert figure(evidence, "margin over swapped images / reference") == 1
    assert figure(evidence, "mean KL divergence at answer tokens") == pytest.approx(0, abs=1e-6)
    assert figure(evidence, "answers lost less gained") == 0


def test_pictures_without_content(base: Any, processor: Any, reference: Reference) -> None:
    with features_replaced(anatomy(base), torch.zeros_like):
        said = fails(base, processor, reference)
    assert said.startswith("true images make the right answer 0 nat more probable than blank ones, where full ")
    assert "(worst: sample '" in said
    assert "(text-only control: 7 of 7 right, 7 before)" in said
    assert "lost, for instance, samples " in said


def test_weaker_features(base: Any, processor: Any, reference: Reference) -> None:
    """Every visual token four fifths of the mean: what tells pictures apart is still there, but faint."""

    def washed_out(features: torch.Tensor) -> torch.Tensor:
        return 0.2 * features + 0.8 * features.mean(dim=0)

    with features_replaced(anatomy(base), washed_out):
        said = fails(base, processor, reference)
    assert "the model looks less than before" in said
    assert "[margin over swapped images / reference 0." in said


def test_pictures_exchanged_within_a_prompt(base: Any, processor: Any, reference: Reference) -> None:
    parts = anatomy(base)
    half = 9  # visual tokens of the smallest picture, 84 x 84 px: rolls across pictures, not only inside them
    with features_replaced(parts, lambda features: features.roll(half, 0)):
        said = fails(base, processor, reference)
    assert "skill 'nth_colour'" in said


def test_one_lost_skill_is_seen(base: Any, processor: Any, reference: Reference) -> None:
    with positions_changed(anatomy(base), lambda positions: positions[[0, 2, 1]]):
        said = fails(base, processor, reference)
    assert "skill 'side'" in said
    assert "skill 'colour'" not in said


def test_lost_mrope(base: Any, processor: Any, reference: Reference) -> None:
    def flat(positions: torch.Tensor) -> torch.Tensor:
        if positions.shape[-1] == 1:
            return positions
        return torch.arange(positions.shape[-1]).expand_as(positions)

    with positions_changed(anatomy(base), flat):
        said = fails(base, processor, reference)
    assert "skill 'list'" in said


def test_not_a_number_is_said_first_and_traced(fresh_model: Any, processor: Any, reference: Reference) -> None:
    model = fresh_model()
    with torch.no_grad():
        model.lm_head.weight[5, 5] = float("nan")
    said = fails(model, processor, reference)
    assert said.startswith("logits at the answer of sample '")
    assert "this begins at lm_head, whose own weight is not finite" in said
    assert "looks less" not in said
    assert "answers are right" not in said


def train(model: Any, processor: Any, samples: list[Sample], steps: int, rate: float) -> Any:
    batch = make_batch(processor, samples, answers=True, padding_side="right")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    model.train()
    for _ in range(steps):
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


LESSONS = scenes(seed=5, per_skill=2, skills=SKILLS)


@pytest.mark.slow
def test_an_adapter_trained_on_right_answers(fresh_model: Any, processor: Any, reference: Reference) -> None:
    """Sure of itself over blank pictures too, which is no damage: all answers are right and follow the picture."""
    model = train(fresh_model(lora=True), processor, LESSONS, 12, 2e-3)
    evidence = alignment(model, processor, SAMPLES, reference, max_new_tokens=SHORT)
    assert figure(evidence, "adapter on: margin over noise images / reference") < 0.9
    assert figure(evidence, "adapter on: right answers") >= 0.95 * len(SAMPLES)
    assert figure(evidence, "adapter on: replies that change with swapped images") >= 0.9 * 28
    assert figure(evidence, "adapter off: margin over noise images / reference") > 0.95
    assert any("judged only against limits of your own" in note for note in evidence.notes)
    with pytest.raises(CheckFailed, match="the model looks less than before"):
        alignment(model, processor, SAMPLES, reference, limits=AlignmentLimits(), max_new_tokens=SHORT)


@pytest.mark.slow
def test_an_adapter_that_answers_blind(fresh_model: Any, processor: Any, reference: Reference) -> None:
    lessons = [replace(s, answer="red") for s in LESSONS if s.images]
    model = train(fresh_model(lora=True), processor, lessons, 15, 1e-2)
    said = fails(model, processor, reference)
    assert "with the adapter on, the model answers without looking: 28 of 28 replies stay the same" in said
    assert "adapter off" not in said


@pytest.fixture(scope="module")
def lightly_trained(fresh_model: Any) -> Any:
    model = fresh_model(lora={"init_lora_weights": False})
    with torch.no_grad():
        for name, parameter in adapter_parameters(anatomy(model)).items():
            parameter.mul_(0.05 if "lora_B" in name else 1)
    return model


@pytest.mark.slow
def test_a_base_that_is_damaged_under_a_trained_adapter(
    lightly_trained: Any, processor: Any, reference: Reference
) -> None:
    assert alignment(lightly_trained, processor, SAMPLES, reference, max_new_tokens=SHORT).ok
    with features_replaced(anatomy(lightly_trained), lambda features: 0.2 * features + 0.8 * features.mean(dim=0)):
        said = fails(lightly_trained, processor, reference)
    assert said.startswith("adapter off: true images make the right answer ")
    assert "[adapter off: margin over swapped images / reference 0." in said


def test_a_trained_adapter_with_too_few_probes(lightly_trained: Any, processor: Any, reference: Reference) -> None:
    evidence = alignment(lightly_trained, processor, SAMPLES[:7], reference, max_new_tokens=SHORT)
    [note] = [note for note in evidence.notes if note.startswith("adapter on: not judged, ")]
    assert "probes that need the image in full precision are too few to tell a model that looks" in note


@pytest.mark.slow
def test_an_adapter_that_is_not_finite(fresh_model: Any, processor: Any, reference: Reference) -> None:
    model = fresh_model(lora=True)
    with torch.no_grad():
        name, parameter = next(iter(adapter_parameters(anatomy(model)).items()))
        parameter[0, 0] = float("inf")
    said = fails(model, processor, reference)
    assert said.startswith("adapter on: logits at the answer of sample '")
    assert f"this begins at {name.removesuffix('.weight')}, whose own weight is not finite" in said


def test_names_from_files_do_not_steer_the_terminal(base: Any, processor: Any, reference: Reference) -> None:
    escaped = [replace(s, id=f"\x1b[2J{s.id}", skill=f"\x1b[31m{s.skill}") for s in SAMPLES]
    recorded = {new.id: replace(reference.probes[old.id]) for new, old in zip(escaped, SAMPLES, strict=True)}
    with features_replaced(anatomy(base), torch.zeros_like), pytest.raises(CheckFailed) as caught:
        alignment(base, processor, escaped, replace(reference, probes=recorded), max_new_tokens=SHORT)
    assert "\x1b" not in str(caught.value)
    assert "lost, for instance, samples '\\x1b[2J" in str(caught.value)


@given(
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.floats(1, 100),
    st.lists(st.integers(1, 8), min_size=1, max_size=40),
    st.floats(1, 50),
    st.randoms(use_true_random=False),
)
def test_rounding_alone_never_costs_a_margin(
    dtype: torch.dtype, logit: float, tokens: list[int], before: float, random: Any
) -> None:
    """Every logit rounded the other way at random: four log-probabilities for each token of each answer."""
    one = step(dtype, logit)
    floor = NoiseFloor(0.0, {}, str(dtype).removeprefix("torch."), one, one)
    margins = [Margin(SAMPLES[0], before, before, count) for count in tokens]
    off = sum(random.choice((-2 * one, 2 * one)) for _ in range(2 * sum(tokens))) / len(tokens)
    allowed = margin_noise(floor, margins, 1e-4)
    assert abs(off) <= allowed * math.sqrt(3)  # beyond: once in 10,000 ** 3 draws
    assert allowed > 0


@pytest.mark.slow
def test_a_users_adapter_is_reported_not_judged(fresh_model: Any, processor: Any) -> None:
    model = fresh_model(lora=True)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in adapter_parameters(anatomy(model)).items():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    before = record_reference(model, processor, SAMPLES, adapter_disabled=True)
    evidence = alignment(model, processor, SAMPLES, before, limits=None, max_new_tokens=SHORT)
    assert figure(evidence, "answers lost less gained") > 10
    assert not any(f.relation for f in evidence.figures)
    assert "reported, not judged, against nf4 base, adapter disabled" in evidence.notes
    with pytest.raises(CheckFailed, match="nf4 base, adapter disabled makes it"):
        alignment(model, processor, SAMPLES, before, limits=AlignmentLimits(), max_new_tokens=SHORT)
    assert "with the adapter on, answers are lost: " in fails(model, processor, before)


def test_limits_are_the_callers(base: Any, processor: Any, reference: Reference) -> None:
    generous = AlignmentLimits(margin_ratio=-10, flip_rate=1.0)
    with features_replaced(anatomy(base), torch.zeros_like):
        assert alignment(base, processor, SAMPLES, reference, limits=generous, max_new_tokens=SHORT).ok


def test_a_model_that_knows_nothing_cannot_be_judged(fresh_model: Any, processor: Any, reference: Reference) -> None:
    model = fresh_model(quantized=False)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    ignorant = record_reference(model, processor, SAMPLES)
    with pytest.raises(CannotJudge, match="knows nothing about them"):
        alignment(model, processor, SAMPLES, ignorant)
    assert fails(model, processor, reference)  # held against one that knows, it fails


def test_unknown_skills_are_left_out(base: Any, processor: Any, reference: Reference) -> None:
    """Full precision wrong on a skill: whatever the model says there is no loss."""
    probes = {
        name: replace(probe, said=replace(probe.said, right=False)) if name.startswith("list") else probe
        for name, probe in reference.probes.items()
    }
    with positions_changed(anatomy(base), lambda positions: positions[[0, 2, 1]]):
        said = fails(base, processor, replace(reference, probes=probes))
    assert "skill 'list'" not in said
    assert "skill 'side'" in said


def test_too_few_samples(base: Any, processor: Any, reference: Reference) -> None:
    few = SAMPLES[:4]
    only = replace(reference, probes={s.id: reference.probes[s.id] for s in few})
    with pytest.raises(CannotJudge, match="on 4 probes"):
        alignment(base, processor, few, only)
    text = [replace(s, answer=s.answer) for s in SAMPLES if s.skill == "text"]
    wrong = {
        s.id: replace(reference.probes[s.id], said=replace(reference.probes[s.id].said, right=False)) for s in text
    }
    with pytest.raises(CannotJudge, match="none of these 7 samples decides"):
        alignment(base, processor, text, replace(reference, probes=reference.probes | wrong))


def test_other_samples_are_refused(base: Any, processor: Any, reference: Reference) -> None:
    with pytest.raises(ValueError, match="holds no sample"):
        alignment(base, processor, scenes(seed=12, per_skill=1), reference)


@pytest.mark.slow
def test_model_is_left_as_it_was(lightly_trained: Any, processor: Any, reference: Reference) -> None:
    lightly_trained.train()
    alignment(lightly_trained, processor, SAMPLES, reference, max_new_tokens=SHORT)
    assert all(module.training for module in lightly_trained.modules())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in lightly_trained.modules())
    lightly_trained.eval()
