"""Forecasts of whole models: a small one by arithmetic, large ones against a real GPU's figures."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.models.sources.released import expectations
from pytest_qvl.vram.forecast import Forecast, Request, forecast, phases
from pytest_qvl.vram.forecast.engine.allocator import (
    MIN_BLOCK,
    round_size,
)
from pytest_qvl.vram.forecast.engine.trace import KINDS, replay
from pytest_qvl.vram.forecast.output.timeline import draw_timeline
from pytest_qvl.vram.forecast.run import make_forecaster
from pytest_qvl.vram.units import GiB, MiB

MERGED_PIXELS = 28
TRANSFORMERS_4 = transformers.__version__.startswith("4.")
EMBEDDED = str(embedded_model_dir())


# --- a small model, exactly --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Forecast:
    return forecast(EMBEDDED, image=(224, 224), tokens=40, lora_r=8, optimizer="adamw_8bit", generate=5, card="t4")


def test_loaded_weights_are_those_of_the_real_model(small: Forecast) -> None:
    """The resident bytes of the real loader's quantized model, tensor by tensor, each rounded to 512 bytes.

    The difference allowed is one rounding per shared table: bitsandbytes keeps one code book for all layers, which the
    real model's tensors name once per layer.
    """
    from transformers import BitsAndBytesConfig

    from pytest_qvl.models.anatomy import anatomy
    from pytest_qvl.models.backends import LoadRequest
    from pytest_qvl.models.backends.transformers import TransformersBackend
    from pytest_qvl.models.quantized import base_tensors
    from pytest_qvl.models.sources.model_source import parse_model

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )
    model = TransformersBackend().load(LoadRequest(parse_model("embedded"), config, "cpu", "float16"))
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for _, t in base_tensors(anatomy(model))}
    real = sum(round_size(size) for size in storages.values())
    assert abs(small.phase(phases.LOAD).by_kind["weights"] - real) <= 4 * MIN_BLOCK


def test_adapter_gradients_and_optimizer_states_are_counted_by_their_formulas(small: Forecast) -> None:
    config = json.loads((embedded_model_dir() / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    narrow = text["num_key_value_heads"] * hidden // text["num_attention_heads"]
    shapes = [(hidden, hidden), (hidden, narrow), (hidden, narrow), (hidden, hidden)]
    shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
    matrices = [size for wide, out in shapes for size in (8 * wide, 8 * out)] * text["num_hidden_layers"]
    adapters = sum(round_size(4 * size) for size in matrices)
    step = small.phase(phases.OPTIMIZER)
    assert step.by_kind["adapters"] == adapters
    assert step.by_kind["gradients"] == adapters

    def states(size: int) -> int:
        """bitsandbytes: fp32 below 4,096 values, else a byte each and a scale per 256, twice."""
        if size < 4096:
            return 2 * round_size(4 * size)
        return 2 * round_size(size) + 2 * round_size(4 * -(-size // 256))

    # The two quantization maps of 256 fp32 values come on top, once.
    assert step.by_kind["optimizer"] - sum(map(states, matrices)) in (0, 2 * round_size(4 * 256))


def test_the_cache_holds_keys_and_values_of_every_token(small: Forecast) -> None:
    config = json.loads((embedded_model_dir() / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    width = text["num_key_value_heads"] * text["hidden_size"] // text["num_attention_heads"]
    # At the last step all but the newest token are in; each new state is written beside the old one before that goes.
    tokens = small.sequence + small.request.generate - 1
    layer = round_size(2 * width * tokens)
    cache = small.phase(phases.DECODE).by_kind["cache"]
    assert 0 <= cache - 2 * text["num_hidden_layers"] * layer <= 2 * layer
    assert small.visual_tokens == 64
    assert small.sequence == 104


def test_phases_come_in_order_and_their_parts_sum_to_their_peak(small: Forecast) -> None:
    names = [phase.name for phase in small.phases]
    assert names == [
        phases.LOAD,
        phases.ATTACH,
        phases.VISION,
        phases.PREFILL,
        phases.DECODE,
        phases.FIRST,
        phases.STATES,
        *phases.TRAINING,
    ]
    for phase in small.phases:
        assert sum(phase.by_kind.values()) == phase.peak_allocated <= phase.peak_reserved
        assert phase.end_allocated <= phase.peak_allocated
    assert set(small.peak.by_kind) == set(KINDS)
    with pytest.raises(KeyError, match="no phase 'lunch'; there are load"):
        small.phase("lunch")


def test_the_timeline_covers_one_training_step(small: Forecast) -> None:
    assert set(small.timeline.phases) == set(phases.TRAINING)
    assert small.training_peak is not None
    assert max(map(sum, small.timeline.live)) == small.training_peak.peak_allocated


def test_only_tensors_that_stay_are_alive_after_a_step(small: Forecast) -> None:
    last = dict(zip(KINDS, small.timeline.live[-1], strict=True))
    assert last["activations"] == last["logits"] == last["gradients"] == last["cache"] == 0
    assert min(last["weights"], last["adapters"], last["optimizer"], last["inputs"]) > 0


def _small(**changes: Any) -> Forecast:
    return forecast(**{"model": EMBEDDED, "image": (224, 224), "tokens": 40, "lora_r": 8, **changes})


@pytest.mark.slow
def test_what_takes_more_memory_is_forecast_to_take_more() -> None:
    request = Request(model=EMBEDDED, image=(112, 112), tokens=40, lora_r=8, trainer="loop")
    forecaster, request = make_forecaster(request, None, None)

    def training(**changes: Any) -> int:
        peak = forecaster.forecast(replace(request, **changes), inference=False).training_peak
        assert peak is not None
        return peak.peak_allocated

    base = training()
    for changes in ({"batch": 2}, {"images": 2, "tokens": 44}, {"tokens": 200}):
        assert training(**changes) > base
    for other in ({"gradient_checkpointing": False}, {"vision_hook": True}, {"lora_r": 16}, {"kbit_upcast": True}):
        if "vision_hook" not in other or not TRANSFORMERS_4:
            forecaster, _ = make_forecaster(replace(request, **other), None, None)
            assert training(**other) > base


@pytest.mark.slow
def test_optimizers_differ_by_their_states() -> None:
    """r = 1024 makes adapters large enough that bitsandbytes pages all of them (100,000 values and more)."""
    found = {
        name: _small(optimizer=name, lora_r=1024, image=(56, 56))
        for name in ("adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
    }
    kept = {name: one.phase(phases.OPTIMIZER).by_kind["optimizer"] for name, one in found.items()}
    adapters = found["adamw_torch"].phase(phases.ATTACH).by_kind["adapters"]
    # fp32 twice; AdamW's step counters are 0-dimensional and live on the host.
    assert kept["adamw_torch"] >= 2 * adapters
    # A byte twice and 2/64 of it in scales; rounding adds at most 512 bytes to each of four tensors.
    assert adapters / 2 <= kept["adamw_8bit"] <= adapters / 2 * 1.04
    assert kept["paged_adamw_8bit"] < kept["adamw_8bit"] / 10
    assert kept["paged_adamw_32bit"] < kept["adamw_torch"] / 10


def test_several_requests_of_one_forecaster_do_not_disturb_each_other() -> None:
    request = Request(model=EMBEDDED, image=(224, 224), tokens=40, lora_r=8)
    forecaster, request = make_forecaster(request, None, None)
    first = forecaster.forecast(request)
    forecaster.forecast(Request(model=EMBEDDED, image=(448, 448), tokens=40, lora_r=8, batch=2))
    again = forecaster.forecast(request)
    assert [p.peak_allocated for p in again.phases] == [p.peak_allocated for p in first.phases]


@pytest.mark.parametrize("set_aside", [True, False])
def test_what_the_caller_set_aside_from_the_garbage_collector_stays_so(set_aside: bool) -> None:
    was = gc.get_freeze_count()
    gc.freeze() if set_aside else gc.unfreeze()
    _small(image=(56, 56))
    try:
        assert bool(gc.get_freeze_count()) == set_aside
    finally:
        gc.freeze() if was else gc.unfreeze()


def test_without_an_adapter_there_is_no_training_step(tmp_path: Path) -> None:
    bare = _small(lora_r=0)
    assert [phase.name for phase in bare.phases] == [phases.LOAD, phases.VISION, phases.PREFILL]
    assert bare.training_peak is None
    with pytest.raises(ValueError, match="needs a training step"):
        draw_timeline(bare, tmp_path / "step.svg")


# --- against a real GPU ------------------------------------------------------------------------------------------

# Peak allocated MiB and, where it was noted, the loaded model's, on one NVIDIA H200: torch 2.11, Transformers 5.17.0,
# PEFT 0.21.2, bitsandbytes 0.50.2, random weights, batch 1, visual tokens + 68, LoRA r = 16, AdamW8bit, bf16 pixels.
# Models without a noted one were quantized layer by layer instead of by from_pretrained.
MEASURED: list[tuple[str, int, dict[str, Any], int, int | None]] = [
    ("forward, all logits", 1024, {"lora_r": 0, "all_logits": True}, 7015, 6581),
    ("forward, last logits", 1024, {"lora_r": 0}, 6946, 6581),
    ("checkpointing, hook", 1024, {"vision_hook": True}, 9386, 6581),
    ("checkpointing", 1024, {}, 9060, None),
    ("everything kept", 512, {"gradient_checkpointing": False}, 12912, None),
    ("k-bit upcast, hook", 1024, {"kbit_upcast": True, "vision_hook": True, "checkpoint": "16bit"}, 14110, None),
    ("3B, checkpointing, hook", 1024, {"model": "qwen2.5-vl-3b", "vision_hook": True}, 5916, None),
]


ALWAYS_RUN = ("forward, last logits", "everything kept")


@pytest.mark.parametrize(
    ("what", "visual", "options", "peak", "resident"),
    [pytest.param(*case, marks=() if case[0] in ALWAYS_RUN else pytest.mark.slow) for case in MEASURED],
)
def test_the_forecast_is_what_an_h200_measured(
    what: str, visual: int, options: dict[str, Any], peak: int, resident: int | None
) -> None:
    """Within 3 % or 64 MiB of the peak; above the loaded model within 10 % or 32 MiB, so that weights do not decide.

    The first bound is the promise of the forecast; the second makes it one about activations: at 1,024 tokens 3 % of
    the peak would be half of them. Of models quantized layer by layer the loaded size was not noted (their unsplit
    blocks differ), so they are held to the first bound only.
    """
    if options.get("vision_hook") and TRANSFORMERS_4:
        pytest.skip("Transformers 4 puts no gradient hook on the vision tower")
    rows = {512: 16, 1024: 32}[visual]
    given_options = {
        "checkpoint": "nf4",
        "optimizer": "adamw_8bit",
        "pixel_dtype": "bfloat16",
        "tokens": 68,
        "trainer": "loop",
        **options,
    }
    request = Request(image=(rows * MERGED_PIXELS, visual // rows * MERGED_PIXELS), **given_options)
    forecaster, request = make_forecaster(request, None, None)
    found = forecaster.forecast(request, inference=request.lora_r == 0)
    assert found.visual_tokens == visual
    phase = found.training_peak or found.phase(phases.PREFILL)
    expected = peak * MiB
    assert abs(phase.peak_allocated - expected) <= max(0.03 * expected, 64 * MiB)
    if resident is not None:
        above, expected_above = phase.peak_allocated - found.resident, (peak - resident) * MiB
        assert abs(found.resident - resident * MiB) <= 2 * MiB
        assert abs(above - expected_above) <= max(0.10 * expected_above, 32 * MiB)


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "peak"), [({}, 11071), ({"trainer": "loop"}, 13795)])
def test_a_trainer_and_a_loop_take_what_they_were_measured_to(settings: dict[str, Any], peak: int) -> None:
    """3B, one image, on an H200, noted in whole MiB: Transformers' Trainer with ``bf16=True``, a loop without autocast."""
    found = forecast("qwen2.5-vl-3b", image=(756, 1008), tokens=300, gradient_checkpointing=False, **settings)
    assert found.visual_tokens == 972
    assert found.training_peak is not None
    assert abs(round(found.training_peak.peak_allocated / MiB) - peak) <= 4


def test_loading_a_16_bit_checkpoint_keeps_the_measured_gaps() -> None:
    """6,591 MiB allocated and 6,598 reserved on the H200: 10 MiB of blocks that were not worth splitting."""
    loaded = forecast("qwen2.5-vl-7b", lora_r=0, image=(56, 56), tokens=8).phase(phases.LOAD)
    assert abs(loaded.end_allocated - 6591 * MiB) <= 2 * MiB
    assert abs(loaded.peak_reserved - 6598 * MiB) <= 2 * MiB


@pytest.mark.slow
def test_a_capped_gpu_runs_out_where_the_replay_says() -> None:
    """A float16 step at 1,024 visual tokens, flash attention off, fitted 10 GiB of an H200 and not 9 GiB."""
    from pytest_qvl.vram.forecast.engine.dry_run import DryRun
    from pytest_qvl.vram.forecast.source import find_source

    request = Request(
        image=(896, 896),
        tokens=68,
        optimizer="adamw_8bit",
        compute_dtype="float16",
        pixel_dtype="float16",
        vision_hook=True,
        capability=(7, 5),
        trainer="loop",
    )
    trace = DryRun(request, find_source(request.model)).run(request, inference=False)
    assert replay(trace, limit=10 * GiB).failure is None
    failure = replay(trace, limit=9 * GiB).failure
    assert failure is not None
    assert failure.phase in phases.TRAINING


def test_lora_parameters_are_the_released_count() -> None:
    request = Request("qwen2.5-vl-3b", image=(56, 56), tokens=8)
    forecaster, request = make_forecaster(request, None, None)
    found = forecaster.forecast(request, inference=False)
    parameters = expectations("qwen2.5-vl-3b")["lora_r16_language_only"]
    adapters = found.phase(phases.STATES).by_kind["adapters"]
    # Two tensors per linear, each rounded to 512 bytes, and blocks that were not worth splitting.
    assert 4 * parameters <= adapters <= 4 * parameters + 4 * MiB
