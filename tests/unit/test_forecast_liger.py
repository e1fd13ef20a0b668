"""What ``use_liger_kernel`` does to memory: what Liger's functions keep and overwrite, and what a step has less."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pytest_qvl.cli import main
from pytest_qvl.models.families import FAMILIES
from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.vram.forecast import Forecast, Request, phases
from pytest_qvl.vram.forecast.engine import liger
from pytest_qvl.vram.forecast.run import Forecaster
from pytest_qvl.vram.forecast.trainer_settings import from_trainer
from pytest_qvl.vram.forecast.validation.records import read_record, request_of
from pytest_qvl.vram.forecast.validation.trainers.cases import PREDICTED
from pytest_qvl.vram.forecast.validation.trainers.predict import predict
from pytest_qvl.vram.units import KiB

WITH_LIGER = pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="liger-kernel 0.8.5 needs Transformers 5"
)
SMALL = Request(
    model=str(embedded_model_dir()),
    image=(112, 112),
    tokens=200,
    lora_r=8,
    optimizer="adamw_8bit",
    gradient_checkpointing=False,
)
QWEN3_VL = str(embedded_model_dir("qwen3-vl"))


def made(request: Request) -> Forecast:
    return Forecaster(request).forecast(request, inference=False)


def kept_by(function: Any, *tensors: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
    """What a function returns, and what it saved for backward."""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return function(*tensors), kept


def where(*tensors: torch.Tensor) -> list[int]:
    return [tensor.untyped_storage().data_ptr() for tensor in tensors]


@pytest.mark.parametrize(
    ("tokens", "width", "vocabulary", "rows"),
    [
        (4 * 4096, 4096, 32000, 2048),  # the example in Liger's source
        (1272, 2048, 151936, 32),
        (5000, 3584, 152064, 128),
        (3, 2048, 151936, 1),
        (40, 4096, 4096, 40),
        (100, 2048, 512, 100),
    ],
)
def test_rows_of_logits_are_as_many_as_liger_takes(tokens: int, width: int, vocabulary: int, rows: int) -> None:
    assert liger.rows_at_once(tokens, width, vocabulary) == rows


def test_a_norm_keeps_its_input_and_a_number_for_each_row_and_overwrites_the_gradient_that_comes() -> None:
    x, weight = torch.randn(2, 5, 8, dtype=torch.bfloat16, requires_grad=True), torch.ones(8)
    out, kept = kept_by(liger._RMSNorm.apply, x, weight)
    assert where(*kept[:2]) == where(x, weight)
    assert [(tensor.dtype, tuple(tensor.shape)) for tensor in kept[2:]] == [(torch.float32, (10,))]
    assert (out.dtype, out.shape) == (x.dtype, x.shape)
    gradient = torch.randn(out.shape, dtype=out.dtype)
    assert where(*torch.autograd.grad(out, x, gradient)) == where(gradient)


def test_a_layer_norm_keeps_its_input_and_two_numbers_for_each_row() -> None:
    x, weight = torch.randn(10, 8, dtype=torch.bfloat16, requires_grad=True), torch.ones(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, kept = kept_by(liger._LayerNorm.apply, x, weight, weight)
    assert where(*kept[:3]) == where(x, weight, weight)
    assert [(tensor.dtype, tuple(tensor.shape)) for tensor in kept[3:]] == [(torch.float32, (10,))] * 2
    assert out.dtype == x.dtype
    gradient = torch.randn(out.shape, dtype=out.dtype)
    assert where(*torch.autograd.grad(out, x, gradient)) != where(gradient)


def test_a_gated_mlp_keeps_gate_and_up_and_has_their_gradients_in_their_places() -> None:
    gate, up = (torch.randn(2, 5, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    out, kept = kept_by(liger._Gated.apply, gate, up)
    assert where(*kept) == where(gate, up)
    assert where(*torch.autograd.grad(out, (gate, up), torch.ones_like(out))) == where(gate, up)


def test_heads_that_lie_within_tokens_are_rotated_in_their_places() -> None:
    within = torch.randn(2, 5, 3, 8, requires_grad=True)
    cos, sin = torch.ones(2, 2, 5, 8)
    (queries, keys), kept = kept_by(liger._Rotated.apply, within.transpose(1, 2), torch.randn(2, 3, 5, 8), cos, sin)
    assert where(*kept) == where(cos, sin)
    assert where(queries) == where(within)
    assert queries.shape == keys.shape == (2, 3, 5, 8)
    assert keys.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("autocast", [False, True])
def test_the_fused_loss_keeps_the_gradient_of_hidden_states_alone(autocast: bool) -> None:
    """Not in the dtype of autocast, products are made anew instead of into a buffer."""
    hidden, weight = torch.randn(9, 4, requires_grad=True), torch.randn(30, 4)
    targets = torch.randint(0, 30, (9,))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert liger._products_stay_as_they_are(hidden, weight) is not autocast
        loss, kept = kept_by(liger._FusedLoss.apply, hidden, weight, targets)
    assert [(tensor.dtype, tuple(tensor.shape)) for tensor in kept] == [(hidden.dtype, (9, 4))]
    assert loss.dim() == 0
    assert where(*torch.autograd.grad(loss, hidden)) == where(*kept)


@WITH_LIGER
def test_the_trainer_has_some_rows_of_logits_and_trl_its_own_head() -> None:
    hf, trl = made(replace(SMALL, liger=True)), made(replace(SMALL, liger=True, trainer="trl"))
    text = Forecaster(SMALL).source.config.get_text_config()
    rows = liger.rows_at_once(hf.sequence, text.hidden_size, text.vocab_size)
    assert hf.phase(phases.LOSS).by_kind["logits"] == pytest.approx(rows * text.vocab_size * 2, rel=0.01)
    assert trl.phase(phases.LOSS).by_kind["logits"] == 0
    plain = made(replace(SMALL, trainer="trl")).phase(phases.LOSS)
    head = plain.peak_allocated - plain.start_allocated
    ours = trl.phase(phases.LOSS)
    assert ours.peak_allocated - ours.start_allocated == pytest.approx(head, rel=0.01)


@WITH_LIGER
@pytest.mark.parametrize(
    ("model", "trainer"),
    [
        pytest.param(SMALL.model, "hf", id="qwen2.5-vl"),
        pytest.param(SMALL.model, "trl", id="qwen2.5-vl-trl", marks=pytest.mark.slow),
        pytest.param(QWEN3_VL, "hf", id="qwen3-vl", marks=pytest.mark.slow),
        pytest.param(QWEN3_VL, "trl", id="qwen3-vl-trl", marks=pytest.mark.slow),
    ],
)
def test_a_step_never_takes_more_with_liger(model: str, trainer: Any) -> None:
    """Without checkpoints it keeps less, and Transformers' Trainer has no logits of all tokens."""
    for checkpointing in (False, True):
        request = replace(SMALL, model=model, trainer=trainer, gradient_checkpointing=checkpointing)
        plain, ours = made(request), made(replace(request, liger=True))
        for phase in (phases.LOSS, phases.BACKWARD):
            assert ours.phase(phase).peak_allocated <= plain.phase(phase).peak_allocated
        if not checkpointing:
            assert ours.phase(phases.LOSS).start_allocated < plain.phase(phases.LOSS).start_allocated
            assert ours.peak.peak_allocated < plain.peak.peak_allocated


@WITH_LIGER
def test_an_evaluation_for_its_loss_alone_has_no_logits_and_one_for_metrics_has_the_models_own() -> None:
    evaluated = replace(SMALL, evaluation=2)
    alone, plain = made(replace(evaluated, liger=True)), made(evaluated)
    metrics = made(replace(evaluated, liger=True, compute_metrics=True))
    logits = [found.phase(phases.EVALUATION).by_kind["logits"] for found in (alone, plain, metrics)]
    assert 4 * logits[0] < logits[1] <= logits[2]


@WITH_LIGER
@pytest.mark.slow
def test_a_case_that_was_predicted_is_still_forecast_so() -> None:
    record = Path(__file__).parents[2] / "docs" / "records" / "forecast-liger-predictions.json"
    entry = read_record(record, PREDICTED)["cases"][0]
    found = predict(request_of(entry))
    # bitsandbytes makes its tables of 1 KiB once in a process, so that not every process has them with this model.
    assert found["allocated"] == pytest.approx(entry["allocated"], abs=4 * KiB)
    for name, phase in entry["phases"].items():
        assert found["phases"][name]["allocated"] == pytest.approx(phase["allocated"], abs=4 * KiB)


@WITH_LIGER
def test_another_family_is_refused_in_one_sentence() -> None:
    if not FAMILIES["qwen3_5"].installed:
        pytest.skip("this Transformers has no Qwen3.5")
    with pytest.raises(ValueError, match=r"liger is True and the model is qwen3_5: .* qwen2_vl, qwen2_5_vl, qwen3_vl"):
        Forecaster(replace(SMALL, model=str(embedded_model_dir("qwen3.5")), liger=True))


def test_a_release_of_transformers_that_liger_does_not_run_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger.transformers, "__version__", "4.57.1")
    with pytest.raises(ValueError, match=r"Transformers is 4\.57\.1: liger-kernel 0\.8\.5 needs 5\.0 or later"):
        Forecaster(replace(SMALL, liger=True))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"trainer": "loop"}, "liger is True and trainer is 'loop': it is followed by the trainers hf and trl"),
        ({"trainer": "unsloth"}, "liger is True and trainer is 'unsloth'"),
        ({"modules_to_save": ("lm_head",)}, "modules_to_save is .'lm_head',. and liger is True"),
        ({"trainable_tokens": 2}, "trainable_tokens is 2 and liger is True"),
        ({"generate_in_training": 8}, "generate_in_training is 8 and liger is True"),
        ({"lora_options": (("bias", "all"),)}, "lora_options has a bias and liger is True"),
    ],
)
def test_what_liger_is_not_followed_with_is_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as refused:
        Request(liger=True, **settings)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        ({"liger_kernel_config": None}, True),
        ({"liger_kernel_config": {"fused_linear_cross_entropy": True}}, True),
        ({"liger_kernel_config": {"fused_linear_cross_entropy": False}}, False),
        ({"liger_kernel_config": {"rope": False}}, False),
        ({"liger_kernel_config": {"fused_linear_cross_entropy": False}, "dataset_text_field": "text"}, True),
        ({"liger_kernel_config": {"rms_norm": False}, "dataset_text_field": "text"}, False),
    ],
)
def test_what_each_trainer_has_liger_patch_by_default_is_read_from_training_arguments(
    settings: dict[str, Any], taken: bool, tmp_path: Path
) -> None:
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps({"per_device_train_batch_size": 2, "use_liger_kernel": True, **settings}))
    if taken:
        assert from_trainer(str(file))["liger"] is True
        return
    with pytest.raises(ValueError, match="which is not forecast: of Liger what it patches by default is followed"):
        from_trainer(str(file))


@WITH_LIGER
def test_the_command_forecasts_it_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["forecast", "--model", SMALL.model, "--image", "112x112", "--liger"]) == 0
    assert ", Liger's kernels\n" in capsys.readouterr().out
    assert main(["forecast", "--model", SMALL.model, "--trainer", "loop", "--liger"]) == 2
    assert "liger is True and trainer is 'loop'" in capsys.readouterr().err
