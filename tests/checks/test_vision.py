"""Vision stability passes what rounding does, and names what quantization, damage and overflow do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pytest_qvl.checks.support.reference import Reference, record_reference
from pytest_qvl.checks.support.tower import kept_rows
from pytest_qvl.checks.vision import vision_stability
from pytest_qvl.evidence import CannotJudge, CheckFailed, Evidence
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.attention import other_attention
from pytest_qvl.models.taps import features_replaced
from pytest_qvl.samples import Sample, scenes

SAMPLES = scenes(seed=5, per_skill=1)
DRIFTS = [f"drift {stage}, {what}" for stage in ("before the merger", "merger output") for what in ("rms", "worst row")]


@pytest.fixture(scope="module", params=["bfloat16", "float16", "float32"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def references(fresh_model: Any, processor: Any) -> dict[str, Reference]:
    return {
        dtype: record_reference(fresh_model(quantized=False, dtype=dtype), processor, SAMPLES)
        for dtype in ("bfloat16", "float16", "float32")
    }


def figure(evidence: Evidence, name: str) -> float:
    return float(next(f.value for f in evidence.figures if f.name == name))


def failure(model: Any, processor: Any, reference: Reference | None, samples: list[Sample] = SAMPLES) -> str:
    with pytest.raises(CheckFailed) as caught:
        vision_stability(model, processor, samples, reference)
    return str(caught.value)


def test_kept_16bit_tower_is_bitwise_the_full_precision_one(
    fresh_model: Any, processor: Any, references: dict[str, Reference], dtype: str
) -> None:
    evidence = vision_stability(fresh_model(dtype=dtype, lora=True), processor, SAMPLES, references[dtype])
    assert all(figure(evidence, name) == 0 for name in DRIFTS)
    assert figure(evidence, "images") == sum(len(s.images) for s in SAMPLES)


@pytest.mark.parametrize("cast", ["bfloat16", "float16", "float32"])
def test_a_cast_tower_is_within_rounding(
    fresh_model: Any, processor: Any, references: dict[str, Reference], dtype: str, cast: str
) -> None:
    model = fresh_model(quantized=False, dtype=dtype)
    anatomy(model).vision_tower.to(getattr(torch, cast))
    evidence = vision_stability(model, processor, SAMPLES, references[dtype])
    assert cast == dtype or figure(evidence, DRIFTS[0]) > 0


def test_a_tower_under_the_users_autocast_is_within_rounding(
    fresh_model: Any, processor: Any, references: dict[str, Reference]
) -> None:
    model = fresh_model(quantized=False, dtype="float32")
    with torch.autocast("cpu", torch.bfloat16):
        evidence = vision_stability(model, processor, SAMPLES, references["float32"])
        recorded = record_reference(model, processor, SAMPLES)
    assert recorded.vision_dtype == "bfloat16"
    assert figure(evidence, DRIFTS[0]) > 0
    quantized = fresh_model(dtype="float32", skip=("lm_head",))
    with torch.autocast("cpu", torch.bfloat16):
        assert "moved away" in failure(quantized, processor, references["float32"])


def test_another_attention_kernel_is_within_rounding(
    fresh_model: Any, processor: Any, references: dict[str, Reference], dtype: str
) -> None:
    model = fresh_model(dtype=dtype)
    with other_attention(anatomy(model)):
        evidence = vision_stability(model, processor, SAMPLES, references[dtype])
    assert figure(evidence, DRIFTS[0]) > 0


def test_quantized_tower(fresh_model: Any, processor: Any, references: dict[str, Reference], dtype: str) -> None:
    said = failure(fresh_model(dtype=dtype, skip=("lm_head",)), processor, references[dtype])
    assert said.startswith(f"visual features before the merger moved away from full precision, {dtype}, furthest at")
    assert "22 of 22 linears of tower and merger are quantized (first: model.visual.blocks.0.attn.qkv, nf4)" in said
    assert "row " in said
    assert "<=" in said


def test_one_4bit_layer_of_the_merger(fresh_model: Any, processor: Any, references: dict[str, Reference]) -> None:
    import bitsandbytes as bnb

    model = fresh_model()
    weight = anatomy(model).merger.mlp[2].weight
    packed, state = bnb.functional.quantize_4bit(weight.data, quant_type="nf4", compress_statistics=True)
    weight.data = bnb.functional.dequantize_4bit(packed, state).to(weight.dtype)
    said = failure(model, processor, references["bfloat16"])
    assert "merger output moved away" in said
    assert "before the merger moved" not in said
    assert "its weights are not those of the reference" in said


def test_one_changed_visual_token(fresh_model: Any, processor: Any, references: dict[str, Reference]) -> None:
    model = fresh_model()
    sample = next(s for s in SAMPLES if s.skill == "side")

    def change(features: torch.Tensor) -> torch.Tensor:
        changed = features.clone()
        changed[5] *= 1.035
        return changed

    with features_replaced(anatomy(model), change):
        said = failure(model, processor, references["bfloat16"], [sample])
    assert f"sample {sample.id!r}, image 0, row 5" in said
    assert "[drift merger output, worst row 0." in said
    assert "rms" not in said


def test_overflow_is_traced_to_its_module(fresh_model: Any, processor: Any, references: dict[str, Reference]) -> None:
    model = fresh_model(dtype="float16")
    with torch.no_grad():
        anatomy(model).blocks[2].mlp.down_proj.weight[7] = 60000.0
    said = failure(model, processor, references["float16"])
    assert said.startswith("visual features are not finite on sample ")
    assert "begins at model.visual.blocks.2.mlp.down_proj, whose dtype ends at 65504" in said


def test_headroom_in_float16_and_a_note_in_bfloat16(fresh_model: Any, processor: Any) -> None:
    def bias_of(model: Any) -> torch.Tensor:
        bias: torch.Tensor = anatomy(model).blocks[1].attn.qkv.bias
        return bias

    half, brain = fresh_model(dtype="float16"), fresh_model(dtype="bfloat16")
    with torch.no_grad():
        bias_of(half)[-1] = bias_of(brain)[-1] = 40000.0
    said = failure(half, processor, None)
    assert said.startswith("model.visual.blocks.1.attn.qkv reaches 4000")
    assert "compute this part in bfloat16 or float32" in said
    evidence = vision_stability(brain, processor, SAMPLES, None)
    assert any("would overflow, or nearly, in float16" in note for note in evidence.notes)
    assert any("no reference" in note for note in evidence.notes)


def test_inputs_that_cannot_decide(fresh_model: Any, processor: Any, references: dict[str, Reference]) -> None:
    model, reference = fresh_model(), references["bfloat16"]
    with pytest.raises(CannotJudge, match="no sample has an image"):
        vision_stability(model, processor, [s for s in SAMPLES if not s.images], reference)
    with pytest.raises(ValueError, match="holds no sample"):
        vision_stability(model, processor, scenes(seed=6, per_skill=1), reference)
    sample = next(s for s in SAMPLES if s.images)
    probe = reference.probes[sample.id]
    broken = replace(probe, tower=tuple(replace(output, finite=False) for output in probe.tower))
    with pytest.raises(CannotJudge, match="not finite in full precision either"):
        vision_stability(model, processor, [sample], replace(reference, probes={sample.id: broken}))
    fewer = replace(probe, tower=tuple(replace(o, rows=(o.rows[0], o.rows[1][:-1])) for o in probe.tower))
    with pytest.raises(ValueError, match="recorded with another processor"):
        vision_stability(model, processor, [sample], replace(reference, probes={sample.id: fewer}))


def test_model_is_left_as_it_was(lora_model: Any, processor: Any, references: dict[str, Reference]) -> None:
    lora_model.train()
    vision_stability(lora_model, processor, SAMPLES, references["bfloat16"])
    assert all(module.training for module in lora_model.modules())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in lora_model.modules())
    lora_model.eval()


def test_kept_rows_are_evenly_spaced() -> None:
    assert kept_rows(9) == list(range(9))
    rows = kept_rows(1000)
    assert len(rows) == len(set(rows)) == 32
    assert (rows[0], rows[-1]) == (0, 999)
