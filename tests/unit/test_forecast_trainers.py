"""What trainers add to a step: adapters, heads, batches, masks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.vram.forecast import Forecast, Request, Sample, phases
from pytest_qvl.vram.forecast.engine.allocator import round_size
from pytest_qvl.vram.forecast.engine.kernels import Device, attention
from pytest_qvl.vram.forecast.engine.recorder import Recorder
from pytest_qvl.vram.forecast.engine.trace import AllocationTrace, replay
from pytest_qvl.vram.forecast.run import Forecaster, largest, make_forecaster

EMBEDDED = str(embedded_model_dir())
SMALL = Request(model=EMBEDDED, image=(112, 112), tokens=40, lora_r=8, optimizer="adamw_8bit")


def made(request: Request) -> Forecast:
    return Forecaster(request).forecast(request, inference=False)


@pytest.fixture(scope="module")
def trainer() -> Forecaster:
    """Of Transformers' Trainer; its model serves every batch."""
    return Forecaster(SMALL)


def test_trl_keeps_a_quantized_models_adapter_in_bfloat16(trainer: Forecaster) -> None:
    trl, hf = made(replace(SMALL, trainer="trl")), trainer.forecast(SMALL, inference=False)
    ours, theirs = (found.phase(phases.OPTIMIZER).by_kind["adapters"] for found in (trl, hf))
    assert theirs / 2 <= ours < 0.6 * theirs


def test_trl_never_has_all_logits() -> None:
    """A tile of at most 4,096 tokens and 32,768 words in 16 bits takes their place, whatever the vocabulary is."""
    found = made(replace(SMALL, trainer="trl", gradient_checkpointing=False))
    loss = found.phase(phases.LOSS)
    tile = 2 * 32768 * (found.sequence - 1)
    assert loss.by_kind["logits"] == 0
    assert tile <= loss.peak_allocated - found.phase(phases.FORWARD).end_allocated < 1.2 * tile


def test_a_trainer_has_every_batch_of_an_update_on_the_device(trainer: Forecaster) -> None:
    one, four = (
        trainer.forecast(replace(SMALL, accumulation=n), inference=False).phase(phases.BACKWARD) for n in (1, 4)
    )
    assert four.by_kind["inputs"] > 3.5 * one.by_kind["inputs"]
    # The second batch's gradients come while the first's are there.
    assert four.by_kind["gradients"] > one.by_kind["gradients"]


def test_shorter_samples_are_padded_and_images_are_not(trainer: Forecaster) -> None:
    """The mask is no longer all ones, so each layer keeps one of (batch, 1, length, length) in 16 bits."""
    kept = replace(SMALL, gradient_checkpointing=False)
    forecaster = Forecaster(kept)
    long, short = Sample(((112, 112),), 200), Sample((), 100)
    even = forecaster.forecast(replace(kept, samples=(long, replace(long, images=(), tokens=216))), inference=False)
    uneven = forecaster.forecast(replace(kept, samples=(long, short)), inference=False)
    assert (uneven.visual_tokens, uneven.sequence) == (16, 216)
    layers = forecaster.source.config.get_text_config().num_hidden_layers
    mask = 2 * 2 * 216 * 224  # a row is padded to a multiple of 16 values
    grown = uneven.phase(phases.LOSS).start_allocated - even.phase(phases.LOSS).start_allocated
    assert layers * mask <= grown < layers * (mask + 2 * mask)


def test_a_trainer_cuts_text_and_never_an_image(trainer: Forecaster) -> None:
    long = replace(SMALL, tokens=90)
    cut = trainer.forecast(replace(long, max_length=60), inference=False, timeline=False)
    assert cut.sequence == 60
    alike = trainer.forecast(replace(long, tokens=60 - cut.visual_tokens), inference=False, timeline=False)
    assert [phase.peak_allocated for phase in cut.phases] == [phase.peak_allocated for phase in alike.phases]
    with pytest.raises(ValueError, match="max_length is 16 and a sample has 16 visual tokens: the trainer would cut"):
        trainer.forecast(replace(long, max_length=16), inference=False)


def test_padding_to_a_multiple_is_a_mask_and_longer_rows(trainer: Forecaster) -> None:
    usual, padded = (
        trainer.forecast(replace(SMALL, pad_to_multiple_of=n), inference=False, timeline=False).phase(phases.LOSS)
        for n in (1, 128)
    )
    assert padded.by_kind["logits"] > 1.5 * usual.by_kind["logits"]


def test_the_largest_of_samples_that_differ_is_not_searched() -> None:
    request = replace(SMALL, samples=(Sample(((112, 112),), 40), Sample(((56, 56),), 40)))
    forecaster, request = make_forecaster(request, "t4", None)
    with pytest.raises(ValueError, match="samples of one size"):
        largest(forecaster, forecaster.forecast(request, inference=False), "image")


def test_an_additive_mask_is_padded_to_rows_of_sixteen_values() -> None:
    """``preprocess_mask`` of torch's memory-efficient attention."""
    trace = AllocationTrace()
    recorder = Recorder(trace, Device((9, 0)), vocabulary=10**9)
    with recorder:
        q: Any = recorder.dataless((2, 8, 217, 64), torch.bfloat16).requires_grad_()
        mask = recorder.dataless((2, 1, 217, 217), torch.bool)
        trace.phase("attention")
        out = attention(recorder.device, q, q, q, mask)
        trace.phase("kept")
        assert out.requires_grad
    found = replay(trace).phases
    kept = found["kept"].start_allocated - found["attention"].start_allocated
    out_bytes, sums = round_size(2 * 2 * 8 * 217 * 64), round_size(4 * 2 * 8 * 224)
    assert kept == pytest.approx(round_size(2 * 2 * 217 * 224) + out_bytes + sums, abs=2048)


@pytest.mark.parametrize(
    ("optimizer", "bytes_per_value"), [("adamw_torch_fused", 8), ("adamw_torch", 8), ("sgd", 0), ("adafactor", 2)]
)
def test_optimizers_keep_the_states_they_are_known_for(optimizer: Any, bytes_per_value: int) -> None:
    """AdamW two fp32 values; SGD none; Adafactor of each matrix a row and a column, some 512 bytes each."""
    found = made(replace(SMALL, optimizer=optimizer)).phase(phases.LOSS).by_kind
    values = found["adapters"] / 4
    assert found["optimizer"] <= 1.1 * bytes_per_value * values
    assert found["optimizer"] >= bytes_per_value * values or optimizer == "adafactor"


@pytest.mark.parametrize(
    ("settings", "grows"),
    [
        ({"lora_targets": "all-linear"}, True),
        ({"lora_targets": ("q_proj", "v_proj")}, False),
        ({"lora_targets": r".*language_model.*\.(q|v)_proj"}, False),
        ({"modules_to_save": ("lm_head",)}, True),
        ({"trainable_tokens": 64}, True),
    ],
)
def test_what_is_trained_is_what_the_adapter_names(trainer: Forecaster, settings: dict[str, Any], grows: bool) -> None:
    usual = trainer.forecast(SMALL, inference=False).phase(phases.STATES).by_kind
    found = made(replace(SMALL, **settings)).phase(phases.STATES).by_kind
    assert (found["adapters"] > usual["adapters"]) == grows
    assert (found["optimizer"] > usual["optimizer"]) == grows


def test_dropout_keeps_a_mask_of_each_input() -> None:
    kept = replace(SMALL, gradient_checkpointing=False)
    usual, dropped = (made(replace(kept, lora_dropout=p)).phase(phases.LOSS).start_allocated for p in (0.0, 0.1))
    assert dropped > usual


def test_dora_has_magnitudes_in_float32_and_for_a_moment_the_identity_of_the_widest_input(trainer: Forecaster) -> None:
    """``get_lora_weight`` multiplies an identity matrix in the adapter's dtype: 1.4 GiB for a 7B model's MLP."""
    usual, dora = trainer.forecast(SMALL, inference=False), made(replace(SMALL, use_dora=True))
    config = trainer.source.config.get_text_config()
    narrow = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    outputs = 3 * config.hidden_size + 2 * narrow + 2 * config.intermediate_size
    grown = dora.phase(phases.LOSS).by_kind["adapters"] - usual.phase(phases.LOSS).by_kind["adapters"]
    assert 0 <= grown - 4 * outputs * config.num_hidden_layers < 512 * 7 * config.num_hidden_layers
    forward = dora.phase(phases.FORWARD).peak_allocated - usual.phase(phases.FORWARD).peak_allocated
    assert forward > 4 * config.intermediate_size**2


def test_what_a_reentrant_checkpoint_recomputes_runs_as_on_the_card() -> None:
    """On a T4 the score matrix is there in backward as in forward; the CPU's attention has none."""
    kept = replace(SMALL, tokens=400, capability=(7, 5), precision="fp16", compute_dtype="float16")
    usual, reentrant = (made(replace(kept, reentrant=on)).phase(phases.BACKWARD).peak_allocated for on in (False, True))
    assert usual <= reentrant < 1.02 * usual


def test_a_module_to_save_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="modules_to_save names 'head', and no module of"):
        made(replace(SMALL, modules_to_save=("head",)))


def test_evaluation_and_generation_find_the_states_of_the_training() -> None:
    forecaster = Forecaster(replace(SMALL, evaluation=4))
    asked = replace(SMALL, evaluation=4, generate_in_training=3)
    found = forecaster.forecast(asked, inference=False)
    assert [phase.name for phase in found.phases][-2:] == [phases.EVALUATION, phases.GENERATION]
    evaluated, generated = found.phases[-2:]
    states = found.phase(phases.LOSS).by_kind["optimizer"]
    assert evaluated.by_kind["optimizer"] == generated.by_kind["optimizer"] == states > 0
    # Four samples' logits against one's; the cache is that of generation alone.
    assert evaluated.by_kind["logits"] > 2 * found.phase(phases.LOSS).by_kind["logits"]
    assert generated.by_kind["cache"] > evaluated.by_kind["cache"] == 0


def test_an_evaluation_with_metrics_keeps_every_batchs_logits(trainer: Forecaster) -> None:
    """Of eight batches seven are kept when the last one's come; then all eight are copied together."""
    metrics = replace(SMALL, evaluation=2, evaluation_batches=8, compute_metrics=True)

    def logits(**changes: Any) -> int:
        found = trainer.forecast(replace(metrics, **changes), inference=False, timeline=False)
        return found.phase(phases.EVALUATION).by_kind["logits"]

    sequence = trainer.forecast(SMALL, inference=False, timeline=False).sequence
    batch = 4 * 2 * sequence * trainer.source.config.get_text_config().vocab_size
    assert 16 * batch <= logits() <= 17 * batch
    assert logits(eval_do_concat_batches=False) < 11 * batch
    assert logits(eval_accumulation_steps=2) <= 5 * batch
    lone = logits(compute_metrics=False)
    assert logits(batch_eval_metrics=True) <= lone + 2 * batch
    assert logits(preprocess_logits="argmax") <= lone + 2 * batch
    assert logits(prediction_loss_only=True) == lone


def test_samples_are_begun_anew_for_a_larger_batch() -> None:
    one, other = Sample(((112, 112),), 40), Sample((), 20)
    assert Request(samples=(one, other)).of_batch(3).samples == (one, other, one)
    assert Request(batch=2).of_batch(5).batch_of_samples == Request(batch=5).batch_of_samples


@pytest.mark.parametrize("name", ["hf", "trl"])
def test_a_base_of_16_bits_has_its_own_size_and_an_adapter_in_float32(trainer: Forecaster, name: Any) -> None:
    usual, whole = trainer.forecast(SMALL, inference=False), made(replace(SMALL, base_bits=16, trainer=name))
    config = trainer.source.config.get_text_config()
    narrow = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    values = 2 * config.hidden_size * (config.hidden_size + narrow) + 3 * config.hidden_size * config.intermediate_size
    # Half a byte each in NF4, and its statistics, against two.
    grown = whole.resident - usual.resident
    assert 1.3 * values * config.num_hidden_layers < grown < 1.5 * values * config.num_hidden_layers
    assert whole.phase(phases.LOSS).by_kind["adapters"] == usual.phase(phases.LOSS).by_kind["adapters"]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            {"lora_targets": ("q_proj", "lm_head")},
            "lora_targets reaches lm_head and trainer is 'trl': SFTTrainer refuses",
        ),
        (
            {"lora_targets": r".*(q_proj|lm_head)"},
            "lora_targets reaches lm_head and trainer is 'trl': SFTTrainer refuses",
        ),
        ({"modules_to_save": ("lm_head",)}, "lm_head is trained itself and trainer is 'trl', whose fused head's"),
    ],
)
def test_a_head_that_trl_trains_or_refuses_to_adapt_is_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        made(replace(SMALL, trainer="trl", **settings))
