"""Alignment passes NF4, fails when pictures lose their meaning, and refuses to judge what knows nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pytest_qvl.checks.answers import AlignmentLimits, alignment
from pytest_qvl.checks.reference import Reference, record_reference
from pytest_qvl.evidence import CannotJudge, CheckFailed, Evidence
from pytest_qvl.models.adapters import adapter_parameters
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.taps import features_replaced, positions_changed
from pytest_qvl.samples import scenes

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
        assert 0.95 < figure(evidence, f"margin over {ablation} pictures / reference") < 1.05
    # text-only probes have no margin, and a healthy model guesses some answers without looking
    assert figure(evidence, "probes left out under blank pictures") < 0.4 * len(SAMPLES)
    assert 0 < figure(evidence, "mean KL divergence at answer tokens") < 0.01
    assert figure(evidence, "same most probable token") > 0.97
    assert evidence.table is not None
    assert {row[0] for row in evidence.table.rows} == {sample.skill for sample in SAMPLES}


def test_full_precision_against_itself_is_exact(full: Any, processor: Any, reference: Reference) -> None:
    evidence = alignment(full, processor, SAMPLES, reference)
    assert figure(evidence, "margin over swapped pictures / reference") == 1
    assert figure(evidence, "mean KL divergence at answer tokens") == pytest.approx(0, abs=1e-6)
    assert figure(evidence, "answers lost less gained") == 0


def test_pictures_without_content(base: Any, processor: Any, reference: Reference) -> None:
    with features_replaced(anatomy(base), torch.zeros_like):
        said = fails(base, processor, reference)
    assert said.startswith("true pictures make the right answer 0 nat more probable than blank ones, where full ")
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
    assert "[margin over swapped pictures / reference 0." in said


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


def test_not_a_number_is_no_pass(fresh_model: Any, processor: Any, reference: Reference) -> None:
    model = fresh_model()
    with torch.no_grad():
        model.lm_head.weight[5, 5] = float("nan")
    assert "[margin over blank pictures / reference nan (>= 0.9)]" in fails(model, processor, reference)


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
    assert "nf4 base, adapter disabled makes it" in fails(model, processor, before)


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


def test_model_is_left_as_it_was(lora_model: Any, processor: Any, reference: Reference) -> None:
    lora_model.train()
    alignment(lora_model, processor, SAMPLES, reference)
    assert all(module.training for module in lora_model.modules())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in lora_model.modules())
    lora_model.eval()
