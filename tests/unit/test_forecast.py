"""The forecast: its allocator, its tensors without data, and its figures against a real GPU's."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import bitsandbytes as bnb
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_qvl.cli import main
from pytest_qvl.figures import digest_of, drawn_digest
from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.models.sources.released import expectations
from pytest_qvl.vram.cards import card
from pytest_qvl.vram.forecast import Forecast, Request, forecast, phases
from pytest_qvl.vram.forecast.engine.allocator import (
    MIN_BLOCK,
    CachingAllocator,
    CardFullError,
    round_size,
    segment_size,
)
from pytest_qvl.vram.forecast.engine.kernels import Device
from pytest_qvl.vram.forecast.engine.recorder import DatalessTensor, Recorder
from pytest_qvl.vram.forecast.engine.trace import KINDS, AllocationTrace, replay
from pytest_qvl.vram.forecast.output.timeline import draw_timeline, drawn
from pytest_qvl.vram.forecast.run import largest, make_forecaster
from pytest_qvl.vram.units import GiB, MiB

HOPPER, TURING = Device((9, 0)), Device((7, 5))
MERGED_PIXELS = 28
TRANSFORMERS_4 = transformers.__version__.startswith("4.")
EMBEDDED = str(embedded_model_dir())


@pytest.fixture(autouse=True)
def _loggers_as_they_were() -> Iterator[None]:
    """The command quietens other packages for its process, which here is everybody's."""
    levels = {name: logging.getLogger(name).level for name in ("bitsandbytes", "transformers")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


# --- the allocator -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "rounded", "segment"),
    [
        (1, 512, 2 * MiB),
        (512, 512, 2 * MiB),
        (513, 1024, 2 * MiB),
        (1 * MiB, 1 * MiB, 2 * MiB),
        (1 * MiB + 1, 1 * MiB + 512, 20 * MiB),
        (10 * MiB - 512, 10 * MiB - 512, 20 * MiB),
        (10 * MiB, 10 * MiB, 10 * MiB),
        (11 * MiB + 1, 11 * MiB + 512, 12 * MiB),
    ],
)
def test_sizes_are_rounded_as_the_caching_allocator_does(size: int, rounded: int, segment: int) -> None:
    assert round_size(size) == rounded
    assert segment_size(rounded) == segment


def test_a_reused_block_counts_whole_when_too_little_would_remain() -> None:
    """Large blocks are split only above 1 MiB of rest, so ``memory_allocated`` exceeds what was asked."""
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(32 * MiB))
    allocator.malloc(32 * MiB - 512 * 1024)
    assert allocator.allocated == 32 * MiB
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(32 * MiB))
    allocator.malloc(30 * MiB)
    assert (allocator.allocated, allocator.reserved) == (30 * MiB, 32 * MiB)


def test_cached_segments_are_given_back_before_memory_runs_out() -> None:
    allocator = CachingAllocator(limit=64 * MiB)
    allocator.free(allocator.malloc(40 * MiB))
    allocator.malloc(50 * MiB)
    assert allocator.reserved == 50 * MiB
    with pytest.raises(CardFullError) as refused:
        allocator.malloc(20 * MiB)
    assert refused.value.requested == 20 * MiB


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 48 * MiB)), max_size=60))
def test_blocks_never_overlap_and_everything_comes_back(steps: list[tuple[bool, int]]) -> None:
    allocator = CachingAllocator()
    live: dict[int, int] = {}
    for take, size in steps:
        if take or not live:
            address = allocator.malloc(size)
            live[address] = allocator.block_size(address)
            assert size <= live[address] < size + MIN_BLOCK + 1 * MiB
        else:
            address = sorted(live)[size % len(live)]
            allocator.free(address)
            del live[address]
        ends = [0]
        for address, block in sorted(live.items()):
            assert address >= ends[-1]
            ends.append(address + block)
        assert allocator.allocated == sum(live.values()) <= allocator.reserved
    for address in live:
        allocator.free(address)
    allocator.empty_cache()
    assert (allocator.allocated, allocator.reserved) == (0, 0)


# --- tensors without data ----------------------------------------------------------------------------------------


class _RealBytes(TorchDispatchMode):
    """Live and peak bytes of storages that real operations create: an independent account of the same run."""

    def __init__(self, before: list[torch.Tensor]) -> None:
        super().__init__()
        self.before = {tensor.untyped_storage()._cdata for tensor in before}
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.live and storage._cdata not in self.before:
                    self.live[storage._cdata] = round_size(storage.nbytes())
                    weakref.finalize(storage, self.live.pop, storage._cdata)
                    self.peak = max(self.peak, sum(self.live.values()))
        return out


def _step(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> None:
    loss = nn.functional.cross_entropy(model(x).float(), labels)
    loss.backward()


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 256), nn.SiLU(), nn.LayerNorm(256), nn.Linear(256, 64, bias=False))


def test_a_run_without_data_takes_the_bytes_of_the_same_run_on_real_tensors() -> None:
    """Live bytes, peak included, equal to the byte over forward, loss and backward of a small network."""
    model, x = _network(), torch.randn(40, 96)
    with _RealBytes([*model.parameters(), x]) as real:
        _step(model, x, torch.zeros(40, dtype=torch.int64))
    trace = AllocationTrace()
    recorder = Recorder(trace, HOPPER, vocabulary=10**9)
    network = _network()
    with recorder:
        for module in network.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(recorder.dataless(tuple(parameter.shape), parameter.dtype))
        x = recorder.dataless((40, 96), torch.float32)
        trace.phase("step")
        _step(network, x, torch.zeros(40, dtype=torch.int64))
        assert isinstance(network[0].weight.grad, DatalessTensor)
        trace.close()
    step = replay(trace).phases["step"]
    before = sum(round_size(p.nbytes) for p in [*model.parameters(), x])
    assert step.start_allocated == before
    assert step.peak_allocated - before - step.by_kind["workspace"] == real.peak
    assert step.by_kind["workspace"] > 0


def test_integers_keep_their_values_and_what_is_computed_without_data_is_zero() -> None:
    recorder = Recorder(AllocationTrace(), HOPPER, vocabulary=7)
    with recorder:
        ids = torch.arange(6).view(2, 3)
        table = recorder.dataless((100, 7), torch.bfloat16)
        logits = nn.functional.embedding(ids, table)
        assert ids.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert isinstance(logits, DatalessTensor)
        assert logits.argmax(-1).tolist() == [[0, 0, 0], [0, 0, 0]]
        assert logits[ids > 2].shape == (3, 7)
        with pytest.raises(RuntimeError, match="value of a tensor without data"):
            logits.float().sum().item()
    with pytest.raises(RuntimeError, match="outside the recorder"):
        logits + 1


def test_assigning_data_reaches_the_tensor_without_data() -> None:
    recorder = Recorder(AllocationTrace(), HOPPER, vocabulary=7)
    with recorder:
        parameter = nn.Parameter(recorder.dataless((4, 4), torch.bfloat16))
        parameter.data = parameter.data.float()
        assert (parameter.dtype, parameter.elem.dtype) == (torch.float32, torch.float32)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("device", "grouped", "kernel"),
    [
        (HOPPER, True, "FlashAttention"),
        (HOPPER, False, "FlashAttention"),
        (TURING, False, "EfficientAttention"),
        (TURING, True, None),
    ],
)
def test_attention_runs_the_kernel_the_card_has(device: Device, grouped: bool, kernel: str | None) -> None:
    """A T4 has no fused kernel for grouped heads: the whole fp32 score matrix is kept for backward."""
    trace = AllocationTrace()
    recorder = Recorder(trace, device, vocabulary=10**9)
    heads, length = 8, 512
    with recorder:
        query = recorder.dataless((1, heads, length, 64), torch.float16).requires_grad_()
        key = recorder.dataless((1, 2 if grouped else heads, length, 64), torch.float16)
        trace.phase("attention")
        out = nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=grouped)
        name = type(out.grad_fn).__name__
        trace.phase("kept")
    kept = replay(trace).phases["kept"]
    scores = heads * length * length * 4
    if kernel is None:
        assert kept.start_allocated > scores
    else:
        assert kernel in name
        assert kept.start_allocated < scores


def test_dropout_keeps_a_mask_of_one_byte_per_element() -> None:
    trace = AllocationTrace()
    recorder = Recorder(trace, HOPPER, vocabulary=10**9)
    with recorder:
        x = recorder.dataless((1024, 1024), torch.float32).requires_grad_()
        assert nn.functional.dropout(x, 0.5, training=False) is x
        trace.phase("dropout")
        out = nn.functional.dropout(x, 0.1)
        trace.phase("kept")
        assert out.requires_grad
    found = replay(trace).phases
    assert found["kept"].start_allocated - found["dropout"].start_allocated == (4 + 1) * MiB


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


def test_what_takes_more_memory_is_forecast_to_take_more() -> None:
    request = Request(model=EMBEDDED, image=(112, 112), tokens=40, lora_r=8)
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


def test_without_an_adapter_there_is_no_training_step() -> None:
    bare = _small(lora_r=0)
    assert [phase.name for phase in bare.phases] == [phases.LOAD, phases.VISION, phases.PREFILL]
    assert bare.training_peak is None
    with pytest.raises(ValueError, match="needs a training step"):
        draw_timeline(bare)


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
    given_options = {"checkpoint": "nf4", "optimizer": "adamw_8bit", "pixel_dtype": "bfloat16", "tokens": 68, **options}
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


# --- verdict, search, figure, command ---------------------------------------------------------------------------


def test_a_verdict_names_the_phase_that_runs_out() -> None:
    request = Request("qwen2.5-vl-3b", image=(56, 56), tokens=512, gradient_checkpointing=False)
    forecaster, request = make_forecaster(request, "t4", None)
    fits = forecaster.forecast(request, inference=False)
    assert fits.verdict is not None
    assert fits.verdict.fits
    assert fits.request.compute_dtype == "float16"
    assert fits.request.capability == (7, 5)
    refused = forecaster.forecast(replace(request, tokens=4096), inference=False)
    assert refused.verdict is not None
    assert refused.verdict.failure is not None
    assert refused.verdict.failure.phase == phases.FORWARD


@pytest.mark.parametrize("dimension", ["image", "batch"])
def test_the_largest_that_fits_is_confirmed_and_the_next_refused(dimension: Any) -> None:
    """On a card made to hold exactly a batch of three, or an image of 784 visual tokens."""
    request = Request(model=EMBEDDED, image=(224, 224), tokens=40, gradient_checkpointing=False)
    enough = {"batch": 3} if dimension == "batch" else {"image": (784, 784)}
    forecaster, request = make_forecaster(request, None, "float16")
    request_tokens = 64
    room = forecaster.forecast(replace(request, **enough)).peak_reserved
    t4 = card("t4")
    forecaster.card = replace(t4, usable_bytes=t4.context_bytes + room)
    found = largest(forecaster, forecaster.forecast(request), dimension)
    assert found.forecast is not None
    assert found.refused is not None
    assert found.forecast.verdict is not None
    assert found.refused.verdict is not None
    assert found.forecast.verdict.fits
    assert not found.refused.verdict.fits
    assert not found.bounded
    if dimension == "batch":
        assert (found.forecast.request.batch, found.refused.request.batch) == (3, 4)
    else:
        assert found.forecast.visual_tokens < found.refused.visual_tokens
        assert found.refused.visual_tokens > 784
        assert found.forecast.visual_tokens > request_tokens


def test_a_card_that_holds_every_image_is_said_to() -> None:
    """The processor of the released models shrinks images to 16,384 tokens; this folder's to far fewer."""
    forecaster, request = make_forecaster(Request(model=EMBEDDED, image=(112, 112), tokens=40), "h200", None)
    found = largest(forecaster, forecaster.forecast(request), "image")
    assert found.bounded
    assert found.refused is None
    assert found.forecast is not None
    sizes = forecaster.source.sizes
    assert found.forecast.visual_tokens >= 0.9 * sizes.max_pixels // MERGED_PIXELS**2


def test_a_model_that_never_fits_has_no_largest() -> None:
    request = Request(model=EMBEDDED, image=(112, 112), tokens=8, kbit_upcast=True)
    tiny = replace(card("rtx3060-12gb"), usable_bytes=card("rtx3060-12gb").context_bytes + 3 * MiB)
    forecaster, request = make_forecaster(request, tiny, None)
    found = largest(forecaster, forecaster.forecast(request), "image")
    assert found.forecast is None
    assert found.refused is not None
    assert found.refused.visual_tokens == 4


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"image": (0, 0)}, "image 0x0 has no pixels"),
        ({"image": (10, 9000)}, "more than 200 times"),
        ({"images": 0}, "images is 0"),
        ({"batch": -1}, "batch is -1"),
        ({"lora_r": -1}, "lora_r is -1"),
        ({"generate": -3}, "generate is -3"),
        ({"tokens": 3}, "tokens is 3"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'"),
        ({"compute_dtype": "float64"}, "float64"),
        ({"checkpoint": "gguf"}, "checkpoint is 'gguf'"),
        ({"card": "t5"}, "card 't5' is unknown"),
        ({"card": "t4", "compute_dtype": "bfloat16"}, "no bfloat16"),
        ({"model": "qwen9"}, "neither a released configuration"),
    ],
)
def test_nonsense_gets_one_clear_error(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        _small(**change)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is not JSON"),
        ("[]", "no vision-language model"),
        ('{"model_type": "qwen2", "hidden_size": 8}', "model_type 'qwen2'"),
        ('{"model_type": "qwen2_5_vl", "hidden_size": 8}', "vision_config missing"),
    ],
)
def test_a_folder_without_a_vision_model_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=complaint):
        forecast(str(tmp_path))


def _command(*options: str) -> list[str]:
    return ["forecast", "--model", EMBEDDED, "--image", "112x112", "--tokens", "20", *options]


def test_the_command_prints_phases_and_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_command("--card", "t4", "--largest", "none", "--compare")) == 0
    text = capsys.readouterr().out
    for expected in (*phases.TRAINING, "MiB at the peak", "Tesla T4: torch sees 14.56 GiB", "FITS with", "accelerate"):
        assert expected in text


def test_the_command_fails_when_it_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["forecast", "--model", "qwen2.5-vl-7b", "--card", "rtx3060-12gb", "--image", "112x112"]
    assert main([*command, "--tokens", "800", "--kbit-upcast", "--largest", "none"]) == 1
    assert "DOES NOT FIT: out of memory in" in capsys.readouterr().out


def test_the_command_writes_json_and_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    figure = tmp_path / "step.svg"
    assert main(_command("--card", "l4", "--largest", "none", "--json", "--timeline", str(figure))) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["card"]["fits"] is True
    assert data["peak"]["allocated"] == max(phase["peak_allocated"] for phase in data["phases"])
    root = ElementTree.fromstring(figure.read_text(encoding="utf-8"))
    words = " ".join(root.itertext())
    for expected in ("one training step", "L4: 21.45 GiB for the allocator", "weights", "backward"):
        assert expected in words


def test_a_timeline_without_matplotlib_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_qvl.figures.find_spec", lambda _: None)
    monkeypatch.delattr("pytest_qvl.vram.forecast.run.make_forecaster")
    assert main(_command("--timeline", str(tmp_path / "step.svg"))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "error: --timeline draws a figure, and matplotlib is not installed: pip install 'pytest-qvl[plots]'"
    )


@pytest.mark.slow
def test_the_committed_figure_is_that_of_the_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(bnb.functional.name2qmap, "dynamic", raising=False)  # as in a process of its own
    svg = (Path(__file__).parents[2] / "docs" / "forecast.svg").read_text(encoding="utf-8")
    assert drawn_digest(svg) == digest_of(drawn(forecast("qwen2.5-vl-7b", card="t4"))), "run python tools/make_pages.py"


@pytest.mark.parametrize(
    "options",
    [
        ("--card", "t5"),
        ("--lora-r", "-1"),
        ("--image", "0x0"),
        ("--timeline", "step.png"),
        ("--timeline", "step.svg", "--lora-r", "0"),
    ],
)
def test_the_command_refuses_nonsense_with_code_2(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_command(*options)) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("image", ["10", "10x", "10x10x10", "-1x5", "axb"])
def test_the_command_refuses_malformed_sizes(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["forecast", f"--image={image}"])
    assert left.value.code == 2
    assert "is not a size like 1024x768" in capsys.readouterr().err
