"""Every fault is caught by the check that names it, in words that point at the cause; healthy models are not."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_qvl.faults import apply, catalogue, healthy_case
from pytest_qvl.faults.catalogue import FAMILIES, find
from pytest_qvl.faults.matrix.healthy import (
    ADAPTERS,
    ALWAYS,
    BIASES,
    DTYPES,
    KNOWLEDGE,
    OPTIMIZERS,
    ROTATING,
    Healthy,
    variations,
)
from pytest_qvl.faults.matrix.panel import PASS, UNDECIDED, all_checks, judge, judge_all, smoke
from pytest_qvl.faults.matrix.restored import state
from pytest_qvl.faults.sizes import EMBEDDED, sizes_of

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:torch.utils.checkpoint:UserWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
]
HEALTHY = 10
# Random weights of another family, in float32; the shipped suite judges the embedded model in bfloat16, and the others, of
# which 16-bit products take most of the time, are the nightly job's.
ALWAYS_RUN = (9,)
# Public functions that judge no model: parts of checks, and what is about a card.
NO_CHECKS = (
    *("mrope_oracle", "record_reference", "validate_batch"),
    *("forecast_agrees", "forecast_fits_card"),  # proved on wrong numbers and small cards in test_forecast.py
)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """The case as it was before any fault."""
    return {}


@pytest.fixture(scope="module")
def case(found: dict[str, Any], pytestconfig: pytest.Config) -> Any:
    """In float32, which every CPU multiplies in hardware; with ``--slow`` in bfloat16, as on the committed page."""
    torch.set_num_threads(1)
    case = healthy_case(dtype="bfloat16" if pytestconfig.getoption("slow") else "float32")
    found["state"] = state(case)
    return case


def faults() -> list[Any]:
    """Every fault; of each check the first that every machine can make runs always, the others are slow.

    That none of them is missed is shown for each state of the code by the committed page as well, see test_page.py.
    """
    by_need = sorted(catalogue().values(), key=lambda fault: len(fault.requires))
    first = {fault.check: fault.name for fault in reversed(by_need)}
    return [
        pytest.param(name, marks=() if first[fault.check] == name else pytest.mark.slow)
        for name, fault in catalogue().items()
    ]


@pytest.mark.parametrize("name", faults())
def test_fault_is_caught_by_the_named_check(case: Any, name: str) -> None:
    fault = find(name)
    if reason := fault.missing(case):
        pytest.skip(reason)
    with apply(name, case) as damaged:
        verdict = judge(damaged, fault.check)
    assert verdict.noticed, f"{fault.check} does not notice {name}: {verdict}"
    for words in fault.words():
        assert words in verdict.message


def _measured(case: Any, check: str) -> list[Any]:
    """What a check measures rounding in (docs/limits.md#own-rounding): inputs of plain forwards."""
    if check == "generation_cache_invariance":
        return [case.batch()]
    if check == "gradient_arithmetic":
        return [case.batch(padding_side="right", answers=True)]
    return [case.batch([sample]) for sample in case.rows]


def _logits(case: Any, inputs: Sequence[Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [case.model(**each, use_cache=False).logits for each in inputs]


HELD_TO_OWN_ROUNDING = (
    *("packing_isolation", "generation_batch_invariance", "generation_cache_invariance"),
    "gradient_arithmetic",
)


@pytest.mark.parametrize("name", [f.name for f in catalogue().values() if f.check in HELD_TO_OWN_ROUNDING])
def test_a_fault_is_not_in_what_its_own_limit_is_measured_in(case: Any, name: str) -> None:
    """Else it may widen the limit: rounding to few levels answers a last place with a whole level."""
    inputs = _measured(case, find(name).check)
    right = _logits(case, inputs)
    with apply(name, case) as damaged:
        found = _logits(damaged, inputs)
    for number, (ours, theirs) in enumerate(zip(found, right, strict=True)):
        assert torch.equal(ours, theirs), number


def test_expected_words_count_the_embedded_models_layers(case: Any) -> None:
    assert sizes_of(case.model) == EMBEDDED


def test_thoughts_need_a_template_that_opens_them(case: Any) -> None:
    assert (
        find("thought-half-taught").missing(case) == "needs a chat template that opens thoughts: only Qwen3.5 has one"
    )


@pytest.mark.slow
def test_everything_is_put_back(case: Any) -> None:
    before = state(case)
    for name, fault in catalogue().items():
        if fault.missing(case) is None and fault.target != "load":
            with apply(name, case):
                pass
            assert state(case) == before, name


def test_the_case_is_as_it_was_after_all_of_that(case: Any, found: dict[str, Any]) -> None:
    """And passes every check as it is: the first healthy variation below."""
    assert state(case) == found["state"]
    assert smoke(case).outcome == PASS


@pytest.mark.parametrize(
    "variation",
    [pytest.param(v, marks=() if v.number in ALWAYS_RUN else pytest.mark.slow) for v in variations(HEALTHY)],
    ids=str,
)
def test_healthy_variation_raises_no_alarm(variation: Any) -> None:
    with HEALTHY_CASES.case(variation) as made:
        verdicts = judge_all(made, variation.checks)
    assert {name: v for name, v in verdicts.items() if v.outcome != PASS} == {}


HEALTHY_CASES = Healthy()


@pytest.mark.slow
def test_random_weights_are_held_to_a_noise_floor_of_their_own() -> None:
    """`packing_isolation` compares with it in every variation; that of the embedded model says nothing of these."""
    random_weights = variations(ALWAYS_RUN[0] + 1)[-1]
    with HEALTHY_CASES.case(random_weights) as made, HEALTHY_CASES.case(replace(random_weights, family="")) as embedded:
        assert made.reference != embedded.reference.floor


RARE = ("copy of the head", "token rows", "biases trained", "biases of its own", "a second one at rest", "AdaLoRA")


@pytest.mark.parametrize("adapter", RARE)
def test_an_adapter_that_the_first_variations_do_not_have_raises_no_alarm(adapter: str) -> None:
    checks = ("adapter_census", "adapter_roundtrip", "adapter_neutrality")
    variation = replace(variations(1)[0], dtype="float32", adapter=adapter, checks=checks)
    with HEALTHY_CASES.case(variation) as made:
        verdicts = judge_all(made, checks)
    undecided = {"adapter_census"} if adapter == "AdaLoRA" else set()
    assert {name for name, verdict in verdicts.items() if verdict.outcome != PASS} == undecided
    assert all(verdicts[name].outcome == UNDECIDED for name in undecided)


def test_every_kind_comes_up_and_knowledge_is_asked_for_in_every_dtype() -> None:
    every = variations(1000)
    known = [variation for variation in every if KNOWLEDGE[0] in variation.checks]
    assert {v.dtype for v in known} == set(DTYPES)
    assert {v.eager for v in known} == {True, False}
    assert {(v.adapter, v.dtype) for v in every if not v.family} == {
        (adapter, dtype) for adapter in ADAPTERS for dtype in DTYPES if (adapter, dtype) != (BIASES, "float16")
    }


def test_every_optimizer_meets_both_training_checks() -> None:
    every = variations(1000)
    assert {v.optimizer for v in every if "training_step" in v.checks} == set(OPTIMIZERS)
    assert {v.optimizer for v in every if "frozen_vision" in v.checks} == set(OPTIMIZERS)


def test_every_check_has_a_fault_of_its_own() -> None:
    from pytest_qvl import checks

    named = {fault.check for fault in catalogue().values()}
    assert named == set(all_checks("cuda"))
    functions = {name for name in checks.__all__ if name[0].islower()}
    assert functions - set(NO_CHECKS) == set(all_checks("cuda"))
    assert {*ALWAYS, *chain(*ROTATING), *KNOWLEDGE} == set(all_checks())


def test_every_family_has_faults() -> None:
    """How many there are in all is held by the committed page and the README, see test_page.py."""
    assert {fault.family for fault in catalogue().values()} == set(FAMILIES.values())


def test_an_unknown_fault_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'scatter-off-by-one'"):
        find("scater-of-by-one")
