"""Packed rows: whose collator may make them, and what of them is on the device."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_qvl.cli import main
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.models.sources.synthetic import build_synthetic
from pytest_qvl.vram.forecast import Sample, known_settings, phases
from pytest_qvl.vram.forecast.engine.dry_run import DryRun
from pytest_qvl.vram.forecast.engine.trace import ALLOC
from pytest_qvl.vram.forecast.engine.workload import model_inputs, with_labels
from pytest_qvl.vram.forecast.run import Forecaster
from pytest_qvl.vram.forecast.source import find_source
from pytest_qvl.vram.forecast.validation.trainers.training import OnHost
from tests.unit.test_forecast_real_trainer import USUAL, WITH_QWEN3_5

if TYPE_CHECKING:
    from pathlib import Path

SAMPLES = (Sample(((112, 112),), 60), Sample(((56, 56), (56, 84)), 30), Sample((), 9))
PACKED = replace(USUAL, samples=SAMPLES, packed=True)


@pytest.mark.parametrize("setting", ["packing", "padding_free"])
def test_sfttrainer_refuses_data_with_images_in_the_words_that_are_quoted(setting: str, tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from pytest_qvl.vram.forecast.validation.trainers.training import _processor

    model = build_synthetic(find_source(USUAL.model).config, None, "cpu", torch.float32)
    arguments = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **{setting: True})
    with pytest.raises(ValueError, match="vision datasets") as refused:
        trl.SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_dict({"images": [0, 1]}),
            processing_class=_processor(USUAL.model),
        )
    ours = known_settings.REFUSED[setting][1]
    assert str(refused.value).partition(". ")[0] in ours


def test_a_packed_row_is_told_apart_by_positions_and_has_no_mask() -> None:
    source = find_source(PACKED.model)
    model = build_synthetic(source.config, None, "cpu", torch.bfloat16)
    batch = with_labels(model_inputs(anatomy(model), PACKED, source, OnHost()), PACKED)  # type: ignore[arg-type]
    lengths = [sum(source.lengths(sample, None)) for sample in SAMPLES]
    assert batch["input_ids"].shape == batch["labels"].shape == (1, sum(lengths))
    assert "attention_mask" not in batch
    assert batch["position_ids"].shape == (4, 1, sum(lengths))
    begins = (batch["position_ids"][0, 0] == 0).nonzero().flatten().tolist()
    assert begins == [0, lengths[0], lengths[0] + lengths[1]]
    assert (batch["labels"] >= 0).all()
    # The first of packed samples computes what it does alone: the model keeps them apart.
    model.float().eval()
    with torch.no_grad():
        whole = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        changed = dict(batch)
        changed["input_ids"] = batch["input_ids"].clone()
        changed["input_ids"][0, 1] = 5
        other = model(**{k: v for k, v in changed.items() if k != "labels"}).logits
    assert not torch.equal(whole[0, : lengths[0]], other[0, : lengths[0]])
    assert torch.equal(whole[0, lengths[0] :], other[0, lengths[0] :])


def test_a_packed_batch_has_the_logits_of_its_tokens_and_a_mask_of_all_of_them() -> None:
    kept = replace(PACKED, checkpoint="nf4")
    source = find_source(kept.model)
    lengths = [sum(source.lengths(sample, None)) for sample in SAMPLES]
    packed, padded = (
        Forecaster(request).forecast(request, inference=False).phase(phases.LOSS).by_kind["logits"]
        for request in (kept, replace(kept, packed=False))
    )
    assert packed / padded == pytest.approx(sum(lengths) / (len(lengths) * max(lengths)), rel=0.02)


def test_a_loop_keeps_packed_samples_apart_too() -> None:
    """None of the masks would be made beside a KV cache."""
    masks = [
        size
        for trainer in ("hf", "loop")
        for size in attention_masks(replace(PACKED, checkpoint="nf4", trainer=trainer, precision="bf16"))
    ]
    assert len(masks) == 2
    assert masks[0] == masks[1]


def attention_masks(request: Any) -> set[int]:
    """Sizes of masks of every token for every token, a byte each, that a run makes."""
    source = find_source(request.model)
    length = sum(sum(source.lengths(sample, None)) for sample in SAMPLES)
    trace = DryRun(request, source).run(request, inference=False)
    return {size for code, _, size, _ in trace.events if code == ALLOC and size == length * length}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"trainer": "trl"}, "SFTTrainer packs no data with images"),
        ({"trainer": "unsloth"}, "SFTTrainer packs no data with images"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of is 8: a packed row has no padding"),
    ],
    ids=["trl", "unsloth", "padding"],
)
def test_rows_that_nobody_packs_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(PACKED, **changes)


def test_a_dataset_does_not_say_what_is_packed_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["forecast", "--model", PACKED.model, "--packed", "--dataset", str(tmp_path)]) == 2
    assert "--packed beside --dataset" in capsys.readouterr().err


@WITH_QWEN3_5
def test_packed_rows_of_linear_attention_are_refused() -> None:
    request = replace(PACKED, model=str(embedded_model_dir("qwen3.5")), samples=(), batch=2)
    with pytest.raises(ValueError, match="how linear attention tells packed samples apart"):
        Forecaster(request)
