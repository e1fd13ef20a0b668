"""The work that peak VRAM is measured of, on the CPU; its numbers are those of a GPU (tests/gpu)."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import torch

from pytest_qvl.checks.vram import measure_work
from pytest_qvl.samples import make_batch, scenes
from pytest_qvl.vram.meter import Meter
from pytest_qvl.vram.scripted import ScriptedAllocator, ScriptedProcess

WORK = ["vision", "prefill", "decode 8", "train step"]
MiB = 2**20


@pytest.fixture
def batches(processor: Any) -> Any:
    samples = scenes(seed=0, per_skill=1)[:2]
    return make_batch(processor, samples), make_batch(processor, samples, padding_side="right", answers=True)


def measured(model: Any, batches: Any, meter: Meter) -> Any:
    found = [usage for usage, _ in measure_work(model, *batches, meter)]
    return found, meter.session().inner


def test_each_phase_is_measured_once(fresh_model: Any, batches: Any) -> None:
    found, phases = measured(fresh_model(quantized=False, dtype="float32", lora=True), batches, Meter())
    assert [usage.name for usage in found] == WORK
    assert found == phases


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own tracing reads it
def test_what_is_compiled_on_the_way_is_no_part_of_the_seconds_but_of_the_peak(fresh_model: Any, batches: Any) -> None:
    model = fresh_model(quantized=False, dtype="float32", lora=True)
    layer = model.base_model.model.model.language_model.layers[0].self_attn.q_proj
    card, clock = ScriptedAllocator(), count(step=1)

    def compiles(graph: Any, _inputs: Any) -> Any:
        card.free(card.take(300 * MiB))
        for _ in range(100):
            next(clock)
        return graph

    meter = Meter(card, ScriptedProcess(card, 600 * MiB), clock=lambda: float(next(clock)))
    try:
        layer.forward = torch.compile(layer.forward, backend=compiles)
        found, phases = measured(model, batches, meter)
    finally:
        torch.compiler.reset()
    assert [usage.name for usage in found] == WORK
    by_name = {usage.name: usage for usage in phases}
    assert "vision, compiled" not in by_name  # its layers are not compiled
    for usage in found[1:3]:
        assert usage.seconds == by_name[f"{usage.name}, compiled"].seconds < 100
        assert by_name[f"{usage.name}, compiled"].allocated == 0
        assert usage.allocated == by_name[usage.name].allocated == 300 * MiB
        assert usage.process == usage.context + usage.reserved
