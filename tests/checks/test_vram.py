"""The work that peak VRAM is measured of, on the CPU; its numbers are those of a GPU (tests/gpu)."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import torch

from pytest_qvl.checks.vram import (
    MOST_REPEATS,
    RESIDENT_SHARE,
    SMALL_THINGS,
    _judge_phase,
    _judge_resident,
    loading,
    measure_work,
)
from pytest_qvl.evidence import CheckFailed, Judge
from pytest_qvl.samples import make_batch, scenes
from pytest_qvl.vram.meter import Meter
from pytest_qvl.vram.scripted import ScriptedAllocator, ScriptedProcess

WORK = ["vision", "prefill", "decode 8", "train step"]
MiB = 2**20


@pytest.fixture
def batches(processor: Any) -> Any:
    samples = scenes(seed=0, per_skill=1)[:2]
    return make_batch(processor, samples), make_batch(processor, samples, padding_side="right", answers=True)


def measured(model: Any, batches: Any, meter: Meter, **options: Any) -> Any:
    found = list(measure_work(model, *batches, meter, **options))
    assert [usage.name for usage, *_ in found] == WORK
    return [usage for usage, *_ in found], meter.session().inner, [compiling for *_, compiling in found]


@pytest.mark.parametrize("timed", [True, False])
def test_seconds_are_those_of_a_second_time(fresh_model: Any, batches: Any, timed: bool) -> None:
    model = fresh_model(quantized=False, dtype="float32", lora=True)
    found, phases, compiling = measured(model, batches, Meter(), timed=timed)
    assert not any(compiling)
    again = phases[1::2] if timed else phases
    assert [usage.name for usage in again] == ([f"{name}, again" for name in WORK] if timed else WORK)
    assert [usage.seconds for usage in found] == [usage.seconds for usage in again]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own tracing reads it
def test_compiling_is_no_part_of_the_seconds_but_of_the_peak(fresh_model: Any, batches: Any, compiler: Any) -> None:
    model = fresh_model(quantized=False, dtype="float32", lora=True)
    layer = model.base_model.model.model.language_model.layers[0].self_attn.q_proj
    card, clock = ScriptedAllocator(), count()
    meter = Meter(card, ScriptedProcess(card, 600 * MiB), clock=lambda: float(next(clock)))

    def compiles(graph: Any, _inputs: Any) -> Any:
        card.free(card.take(300 * MiB))
        for _ in range(100):
            next(clock)
        return graph

    as_written, compiled = layer.forward, compiler(layer.forward, backend=compiles)

    def forward(*args: Any) -> Any:  # compiled from the second time of prefill on, as Unsloth's decoding is
        return (as_written if len(meter.session().inner) < 3 else compiled)(*args)

    layer.forward = forward
    found, phases, compiling = measured(model, batches, meter)
    assert [usage.name for usage in phases[:5]] == ["vision", "vision, again", "prefill", *["prefill, again"] * 2]
    vision, prefill = found[:2]
    assert vision.allocated == 0
    assert [usage.allocated for usage in phases[2:5]] == [0, 300 * MiB, 0]
    assert phases[3].seconds > 100 > phases[4].seconds == prefill.seconds
    assert prefill.allocated == 300 * MiB
    assert prefill.process == prefill.context + prefill.reserved
    assert not any(compiling)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_what_compiles_at_every_call_is_told(fresh_model: Any, batches: Any, compiler: Any) -> None:
    model = fresh_model(quantized=False, dtype="float32", lora=True)
    layer = model.base_model.model.model.language_model.layers[0].self_attn.q_proj
    compiled = compiler(layer.forward, backend="eager")

    def forward(*args: Any) -> Any:
        torch.compiler.reset()
        return compiled(*args)

    layer.forward = forward
    _, phases, compiling = measured(model, batches, Meter())
    assert compiling == [False, True, True, True]
    assert len(phases) == 2 + 3 * (1 + MOST_REPEATS)


@pytest.mark.slow
def test_loading_is_that_of_the_model_which_is_there_now() -> None:
    card = ScriptedAllocator()
    meter = Meter(card)
    assert loading(meter) == []
    for number, name in enumerate(["load", "attach adapter", "prefill", "load"], start=1):
        with meter.phase(name, exclusive=True), card.taken(number * MiB):
            pass
    assert [(usage.name, usage.allocated // MiB) for usage in loading(meter)] == [("load", 4), ("attach adapter", 2)]


@pytest.mark.parametrize("own", [2 * MiB, 5 * 1024 * MiB])
def test_what_stays_beside_the_model_is_held_to_its_room(own: int) -> None:
    room = int(RESIDENT_SHARE * own) + SMALL_THINGS
    judge = Judge("peak_vram", "peak VRAM within its limit")
    _judge_resident(judge, own, own + room)
    assert judge.problems == []
    _judge_resident(judge, own, own + room + 1)
    [problem] = judge.problems
    assert "are allocated beside the model's own" in problem
    assert "something keeps tensors alive" in problem
    with pytest.raises(CheckFailed):
        judge.verdict()


@pytest.mark.parametrize("of", ["allocated", "reserved", "process", "fit"])
def test_a_phase_is_held_to_the_limit_by_the_number_that_it_names(of: Any) -> None:
    card = ScriptedAllocator()
    meter = Meter(card, ScriptedProcess(card, 600 * MiB))
    with meter.phase("train step") as phase:
        card.free(card.take(300 * MiB))
    usage = phase.usage
    assert usage is not None
    needed = {"allocated": 300 * MiB, "reserved": 300 * MiB, "process": 900 * MiB, "fit": 900 * MiB}[of]
    judge = Judge("peak_vram", "peak VRAM within its limit")
    _judge_phase(judge, usage, needed, of)
    assert judge.problems == []
    _judge_phase(judge, usage, needed - MiB, of)
    [problem] = judge.problems
    assert f"({of}), 1 MiB above the limit" in problem
    assert problem.startswith("train step needs ")
