"""What a forecast runs on: the simulated allocator, tensors without data, and the kernels of a card."""

from __future__ import annotations

import subprocess
import sys
import weakref
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_qvl.vram.forecast.engine.allocator import (
    MIN_BLOCK,
    Block,
    CachingAllocator,
    CardFullError,
    ExpandableAllocator,
    round_size,
    segment_size,
)
from pytest_qvl.vram.forecast.engine.dataless import DatalessTensor
from pytest_qvl.vram.forecast.engine.kernels import Device
from pytest_qvl.vram.forecast.engine.recorder import Recorder
from pytest_qvl.vram.forecast.engine.trace import AllocationTrace, replay
from pytest_qvl.vram.units import MiB

HOPPER, TURING = Device((9, 0)), Device((7, 5))


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


def test_an_expandable_segment_grows_by_pages_and_gives_free_ones_back() -> None:
    """``expandable_segments:True``: 20 MiB pages, blocks cut to what is asked, a free end that grows with the next."""
    allocator = ExpandableAllocator()
    first = allocator.malloc(32 * MiB)
    allocator.malloc(512)
    assert (allocator.allocated, allocator.reserved) == (32 * MiB + 512, (40 + 2) * MiB)
    second = allocator.malloc(30 * MiB)  # of which 8 MiB are mapped; segments of their own would be 62 MiB
    assert (second.address, allocator.reserved) == (first.address + 32 * MiB, (80 + 2) * MiB)
    allocator.free(first)
    third = allocator.malloc(32 * MiB - 512 * 1024)
    assert third.size == 32 * MiB - 512 * 1024
    allocator.free(third)
    allocator.empty_cache()  # one page of the first is wholly free, and none of the 18 MiB at the end
    assert (allocator.allocated, allocator.reserved) == (30 * MiB + 512, (60 + 2) * MiB)
    hole = allocator.malloc(25 * MiB)  # into that page and the 12 MiB behind it
    assert (hole.address, allocator.reserved) == (first.address, (80 + 2) * MiB)


def test_an_expandable_block_is_taken_where_the_least_could_grow() -> None:
    """A larger free block in the middle is taken before a smaller one at the end."""
    allocator = ExpandableAllocator()
    before, middle, _between = (allocator.malloc(size * MiB) for size in (4, 8, 2))
    end = allocator.malloc(6 * MiB)
    allocator.free(middle)
    allocator.free(end)
    assert allocator.malloc(5 * MiB).address == middle.address
    assert before.size == 4 * MiB


def test_pages_are_given_back_before_memory_runs_out() -> None:
    allocator = ExpandableAllocator(limit=60 * MiB)
    kept, gone, last = (allocator.malloc(20 * MiB) for _ in range(3))
    allocator.free(gone)
    allocator.malloc(20 * MiB)
    assert not allocator.met_limit
    allocator.free(kept)
    allocator.free(last)
    with pytest.raises(CardFullError) as refused:
        allocator.malloc(41 * MiB)
    assert refused.value.requested == 41 * MiB
    assert (allocator.met_limit, allocator.reserved) == (True, 20 * MiB)
    assert allocator.malloc(40 * MiB).size == 40 * MiB


@pytest.mark.parametrize("kind", [CachingAllocator, ExpandableAllocator])
@settings(max_examples=100, deadline=None)
@given(steps=st.lists(st.tuples(st.sampled_from(["take", "free", "empty"]), st.integers(1, 48 * MiB)), max_size=60))
def test_blocks_never_overlap_and_everything_comes_back(
    kind: type[CachingAllocator], steps: list[tuple[str, int]]
) -> None:
    allocator = kind()
    live: dict[int, tuple[Block, int]] = {}
    for what, size in steps:
        if what == "empty":
            allocator.empty_cache()
        elif what == "take" or not live:
            block = allocator.malloc(size)
            live[block.address] = block, block.size
            assert size <= block.size < size + MIN_BLOCK + 1 * MiB
        else:
            allocator.free(live.pop(sorted(live)[size % len(live)])[0])
        ends = [0]
        for address, (block, handed_out) in sorted(live.items()):
            assert (block.address, block.size) == (address, handed_out)
            assert address >= ends[-1]
            ends.append(address + handed_out)
        assert allocator.allocated == sum(handed_out for _, handed_out in live.values()) <= allocator.reserved
    for block, _ in live.values():
        allocator.free(block)
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


def test_a_remembered_view_begins_where_its_own_argument_does() -> None:
    recorder = Recorder(AllocationTrace(), HOPPER, vocabulary=7)
    with recorder:
        whole = recorder.dataless((4, 6), torch.bfloat16)
        rows = [whole[0:2].t(), whole[2:4].t()]
        assert [row.storage_offset() for row in rows] == [0, 12]
        assert [row.as_strided((2,), (1,), 3).storage_offset() for row in rows] == [3, 3]


def test_remembered_calls_tell_integers_from_floats() -> None:
    recorder = Recorder(AllocationTrace(), HOPPER, vocabulary=7)
    with recorder:
        numbers = recorder.dataless((3,), torch.int64)
        assert [(numbers * factor).dtype for factor in (1, 1.0, 1)] == [torch.int64, torch.float32, torch.int64]


def test_remembered_calls_tell_tensors_with_data_from_those_without() -> None:
    recorder = Recorder(AllocationTrace(), HOPPER, vocabulary=7)
    with recorder:
        one, other = (recorder.dataless((3,), torch.float32) for _ in range(2))
        assert one.add_(other) is one
        assert torch.ones(3).add_(other) is not other


def test_a_deep_copy_is_an_allocation_of_its_own_from_when_it_is_placed() -> None:
    trace = AllocationTrace()
    recorder = Recorder(trace, HOPPER, vocabulary=7)
    with recorder:
        one = recorder.dataless((4, 4), torch.float32)
        with recorder.off_device():
            other = deepcopy(one)
        assert trace.allocations == 1
        recorder.place(other)
        assert trace.allocations == 2
        del one, other
    assert sorted(number for code, number, *_ in trace.events if code == 1) == [0, 1]


def test_assigning_data_reaches_the_tensor_without_data() -> None:
    recorder = Recorder(AllocationTrace(), HOPPER, vocabulary=7)
    with recorder:
        parameter = nn.Parameter(recorder.dataless((4, 4), torch.bfloat16))
        parameter.data = parameter.data.float()
        assert (parameter.dtype, parameter.layout_.dtype) == (torch.float32, torch.float32)  # type: ignore[attr-defined]


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


def test_autocast_is_cudas() -> None:
    """PEFT asks whether autocast is on without naming a device and means CUDA; there ``layer_norm`` runs in fp32."""
    recorder = Recorder(AllocationTrace(), HOPPER, vocabulary=10**9)
    question = torch.is_autocast_enabled
    with recorder:
        x, weight = (recorder.dataless((100, 64), torch.bfloat16), recorder.dataless((64,), torch.bfloat16))
        assert not torch.is_autocast_enabled()
        assert nn.functional.layer_norm(x, (64,), weight).dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.is_autocast_enabled()
            assert nn.functional.layer_norm(x, (64,), weight).dtype == torch.float32
            assert nn.functional.linear(x.float(), recorder.dataless((8, 64), torch.float32)).dtype == torch.bfloat16
    assert torch.is_autocast_enabled is question


def test_the_cache_is_emptied_where_a_phase_begins() -> None:
    """What loading leaves behind is given back before the next phase, whose reserved bytes begin without it."""
    trace = AllocationTrace()
    trace.phase("load")
    trace.free(trace.alloc(40 * MiB, "weights"))
    trace.phase("train")
    trace.alloc(11 * MiB, "activations")
    assert replay(trace).phases["train"].peak_reserved == 40 * MiB
    trace.empty_cache_before("train")
    assert replay(trace).phases["train"].peak_reserved == 12 * MiB
    with pytest.raises(ValueError, match="'decode' is not in list"):
        trace.empty_cache_before("decode")


def test_a_step_is_repeated_without_what_stays_of_it() -> None:
    """Two steps of which the first leaves states: the second has all but those, and the first's names are others."""
    trace = AllocationTrace()
    trace.phase("before")
    weight = trace.alloc(1 * MiB, "weights")
    start = len(trace.events)
    trace.phase("forward")
    activation = trace.alloc(2 * MiB, "activations")
    trace.phase("update")
    trace.alloc(4 * MiB, "optimizer")
    trace.relabel(activation, "gradients")
    trace.free(activation)
    step = trace.take_step(start, {"forward": "first", "update": "states"})
    trace.repeat(step)
    trace.free(weight)
    found = replay(trace).phases
    assert list(found) == ["before", "first", "states", "forward", "update"]
    assert [phase.peak_allocated // MiB for phase in found.values()] == [1, 3, 7, 7, 7]
    assert found["update"].by_kind["gradients"] == 0
    assert found["update"].end_allocated == 4 * MiB
    assert found["states"].peak_allocated == found["update"].peak_allocated


def test_a_process_that_forecasts_imports_nothing_that_it_does_not_run() -> None:
    code = (
        "from pytest_qvl.vram.forecast.imports import only_what_runs\n"
        "import sys, torch\n"
        "before = torch.compile, torch.distributed.is_available\n"
        "with only_what_runs():\n    import bitsandbytes, peft, pytest_qvl.vram.forecast.run, transformers.modeling_utils\n"
        "assert (torch.compile, torch.distributed.is_available) == before\n"
        "unused = {'scipy', 'sklearn'}\n"
        "assert not unused & set(sys.modules), unused & set(sys.modules)\n"
        "import scipy\n"
        "assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(2)).tolist() == [2, 2]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
