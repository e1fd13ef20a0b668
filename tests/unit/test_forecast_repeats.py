"""Layers that do not run in a forecast: the trace is the one that all layers make."""

from __future__ import annotations

import itertools
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_qvl.faults.matrix.random_models import random_config
from pytest_qvl.models.families import FAMILIES as KNOWN
from pytest_qvl.vram.forecast import Request, Sample
from pytest_qvl.vram.forecast.engine import kernels, repeats
from pytest_qvl.vram.forecast.engine.chunks import Attention, Chunks
from pytest_qvl.vram.forecast.engine.dry_run import DryRun
from pytest_qvl.vram.forecast.engine.repeats import NotRepeatingError
from pytest_qvl.vram.forecast.engine.towers import chosen, surroundings, towers
from pytest_qvl.vram.forecast.engine.trace import ALLOC, FREE, RELABEL, AllocationTrace, replay
from pytest_qvl.vram.forecast.run import make_forecaster
from pytest_qvl.vram.forecast.source import source_of

# Of Qwen2.5-VL's small towers: windows of three lengths, and several of each.
SMALL = Request(image=(140, 308), tokens=20, lora_r=4, optimizer="adamw_torch")
KEPT: dict[str, Any] = {"gradient_checkpointing": False, "vision_hook": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_vl": {},
    "qwen2_5_vl": {"fullatt_block_indexes": [3, 7, 11]},
    "qwen3_vl": {"deepstack_visual_indexes": [3, 6]},
    "qwen3_5": {},
}
# More than the usual nine where one layer in three is of another kind.
LAYERS = {"qwen3_5": 15}
WITH_QWEN3_5 = pytest.mark.skipif(not KNOWN["qwen3_5"].installed, reason="this Transformers has no Qwen3.5")
# Every kind of run: checkpointed and kept, both trainers and a loop, a cache that grows, gradients that are kept.
SETTINGS: dict[str, dict[str, Any]] = {
    "hf": {},
    "loop, kept": {**KEPT, "trainer": "loop", "generate": 2},
    "all linears": {"lora_targets": "all-linear", "lora_dropout": 0.1, "optimizer": "adafactor"},
    "trl": {"trainer": "trl", "accumulation": 2, "evaluation": 2, "generate_in_training": 2},
    "dora": {"use_dora": True},
    "reentrant": {"reentrant": True},
    "padded": {"samples": (Sample(((56, 56),), 30), Sample(((28, 56), (56, 84)), 20))},
    "videos": {"samples": (Sample(((56, 84),), 30, ((5, 84, 140),)), Sample((), 40, ((8, 56, 56), (2, 28, 56))))},
    "unsloth": {"trainer": "unsloth", "accumulation": 2, "evaluation": 2},
    "unsloth, not compiled": {"trainer": "unsloth", "compiled": False, "generate": 2},
    "8 bits": {"base_bits": 8, "checkpoint": "16bit"},
    "ddp": {"ddp": True},
    "several images, no flash attention": {"images": 3, "batch": 2, "capability": (7, 5), "compute_dtype": "float16"},
}


def built(family: str, **changes: Any) -> tuple[DryRun, Request]:
    request = replace(SMALL, **changes)
    config = random_config(family, layers=LAYERS.get(family, 9), blocks=12, vision=FAMILIES[family])
    return DryRun(request, source_of(config, "x")), request


def ordered(trace: AllocationTrace) -> list[Any]:
    """Its events, allocations by their order; frees without an allocation between them come in any order."""
    numbers: dict[int, int] = {}
    count = itertools.count()
    events: list[Any] = []
    between: list[Any] = []
    for code, number, size, kind in trace.events:
        if code in (FREE, RELABEL):
            between.append((numbers[number], code, kind))
            continue
        if code == ALLOC:
            numbers[number] = next(count)
        events += [*sorted(between), (code, numbers.get(number, -1) if code == ALLOC else number, size, kind)]
        between = []
    return [*events, *sorted(between)]


@pytest.fixture(scope="module", autouse=True)
def _tables() -> None:
    """The first forecast of a process counts bitsandbytes' tables of values."""
    run, request = built("qwen2_vl")
    run.run(request)


# Runs with every test run: nothing else there compares the trace with that of all layers.
QUICK = ("qwen2_5_vl", "hf")


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        pytest.param(family, setting, marks=[] if (family, setting) == QUICK else pytest.mark.slow)
        for family in FAMILIES
        for setting in SETTINGS
        if KNOWN[family].installed
    ],
)
def test_the_trace_is_that_of_all_layers(family: str, setting: str) -> None:
    run, request = built(family, **SETTINGS[setting])
    shortened = towers(run._parts)
    assert len(shortened) == 2
    assert sum(len(tower.runs) for tower in shortened) <= 17
    ours, theirs = run._run(request, shortened, inference=True), run._run(request, [], inference=True)
    assert ordered(ours) == ordered(theirs)
    assert replay(ours).phases == replay(theirs).phases


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("qwen2.5-vl-3b", {}),
        ("qwen2.5-vl-3b", {"precision": "fp16", "compute_dtype": "float16", "capability": (7, 5), "batch": 2}),
        ("qwen2.5-vl-3b", {"trainer": "trl", "accumulation": 4, "evaluation": 2, "generate_in_training": 2}),
        ("qwen2.5-vl-7b", {"gradient_checkpointing": False, "trainer": "loop", "generate": 3}),
        ("qwen2-vl-7b", {"gradient_checkpointing": False, "optimizer": "adafactor", "accumulation": 2}),
        ("qwen2.5-vl-7b", {"image": (1316, 924), "images": 2, "gradient_checkpointing": False, "vision_hook": True}),
        ("qwen3-vl-8b", {"lora_targets": "all-linear", "lora_dropout": 0.05, "optimizer": "sgd"}),
        pytest.param("qwen3.5-9b", {}, marks=WITH_QWEN3_5),
        pytest.param(
            "qwen3.5-9b", {"gradient_checkpointing": False, "trainer": "loop", "generate": 3}, marks=WITH_QWEN3_5
        ),
        pytest.param("qwen3.5-9b", {**KEPT, "linear_attention": "fla+causal-conv1d"}, marks=WITH_QWEN3_5),
    ],
)
def test_the_trace_is_that_of_all_layers_of_released_models(model: str, changes: dict[str, Any]) -> None:
    request = replace(SMALL, **{"model": model, "image": (448, 616), **changes})
    run = make_forecaster(request, None, request.compute_dtype)[0]._dry_run
    ours = run._run(request, towers(run._parts), inference=True)
    assert ordered(ours) == ordered(run._run(request, [], inference=True))


def test_all_layers_run_where_one_keeps_other_tensors_than_it_was_given() -> None:
    """After the fp32 upcast, bitsandbytes' layers cast their bias in their first forward, for good."""
    run, request = built("qwen2_5_vl", kbit_upcast=True)
    language = run._parts.language_backbone
    assert language not in [tower.owner for tower in towers(run._parts)]
    again, _ = built("qwen2_5_vl", kbit_upcast=True)
    assert ordered(run.run(request)) == ordered(again._run(request, [], inference=True))
    assert language in [tower.owner for tower in towers(run._parts)]


def test_all_layers_run_where_what_one_did_cannot_be_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing of the run that was given up is left."""
    run, request = built("qwen2_vl")
    expected = ordered(run._run(request, [], inference=True))

    def refuse(*_: Any) -> None:
        raise NotRepeatingError("a layer leaves something behind")

    monkeypatch.setattr(repeats._Writing, "_check", refuse)
    assert ordered(run.run(request)) == expected


def test_what_a_layer_keeps_for_good_is_noticed() -> None:
    """A layer that keeps its result: those that it stands for would keep theirs."""
    run, request = built("qwen2_vl")
    shortened = towers(run._parts)
    keeper = shortened[1].runs[2]
    kept: list[Any] = []
    hook = run._parts.language_backbone.layers[keeper].register_forward_hook(lambda *found: kept.append(found[2] * 2))
    with pytest.raises(NotRepeatingError, match="leaves something behind"):
        run._run(request, shortened, inference=True)
    hook.remove()


def test_chunks_that_do_not_do_the_same_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that keeps what a few of its calls return."""
    run, request = built("qwen2_5_vl")
    attend, kept = kernels.attention, []

    def attends(*args: Any, **kwargs: Any) -> Any:
        result = attend(*args, **kwargs)
        kept.append(result * 2 if len(kept) % 3 else None)
        return result

    monkeypatch.setattr(kernels, "attention", attends)
    with pytest.raises(NotRepeatingError, match="chunks of one length do different things"):
        run._run(request, towers(run._parts), inference=True)


def split_in(lengths: list[int]) -> tuple[Attention, tuple[torch.Tensor, ...]]:
    attention = Attention(AllocationTrace(), lambda: attention)
    return attention, attention.split(torch.arange(float(sum(lengths))), lengths, 0)


def test_chunks_of_one_length_are_stood_for_by_the_first_and_the_last() -> None:
    attention, chunks = split_in([2, 2, 2, 1, 2, 1, 3])
    assert [chunk.tolist() for chunk in chunks] == [[0, 1], [6], [7, 8], [9], [10, 11, 12]]
    for _ in chunks:
        attention.begins()
    assert attention.joined(chunks, 0).shape == (13,)


def test_an_attention_of_other_calls_than_its_chunks_is_refused() -> None:
    attention, chunks = split_in([2, 2, 2])
    with pytest.raises(NotRepeatingError, match="joins something else"):
        attention.joined(chunks, 0)
    with pytest.raises(NotRepeatingError, match="not split alike"):
        attention.split(torch.zeros(6), [3, 3], 0)
    for _ in chunks:
        attention.begins()
    with pytest.raises(NotRepeatingError, match="attends more often"):
        attention.begins()


def test_an_attention_whose_chunks_are_joined_otherwise_is_refused() -> None:
    chunks, module = Chunks(AllocationTrace), torch.nn.Identity()
    module.register_forward_hook(lambda *_: chunks.attention.split(torch.zeros(6), [2, 2, 2], 0))
    with chunks.shortened([module]), pytest.raises(NotRepeatingError, match="does not join its chunks"):
        module(torch.zeros(6))


@given(st.lists(st.sampled_from("ab"), min_size=3, max_size=40), st.sets(st.integers(0, 2)))
def test_layers_that_run_have_the_neighbours_that_they_have_among_all(kinds: list[str], must_run: set[int]) -> None:
    runs, around = chosen(kinds, must_run), surroundings(kinds)
    assert {0, len(kinds) - 1} | must_run <= {*runs}
    assert {around[index] for index in runs} == {*around}
    for before, after in pairwise(runs):
        assert kinds[after] == kinds[before + 1]
        assert kinds[before] == kinds[after - 1]


def test_a_tower_of_equal_layers_runs_five() -> None:
    assert chosen("a" * 36) == (0, 1, 2, 34, 35)
