"""Faults on a model that is not the embedded one: of another depth, with a tied head and without knowledge."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qvl.faults import catalogue
from pytest_qvl.faults.case import damaged
from pytest_qvl.faults.catalogue import find
from pytest_qvl.faults.matrix.doses import GRADED
from pytest_qvl.faults.matrix.graded import Graded, Smallest, smallest_doses
from pytest_qvl.faults.matrix.random_models import RANDOM_FAMILIES, random_model
from pytest_qvl.faults.matrix.restored import state
from pytest_qvl.faults.matrix.work import Plan, Task, _case, do
from pytest_qvl.faults.requirements import unmet
from pytest_qvl.faults.sizes import sizes_of
from pytest_qvl.faults.subject import Subject

if TYPE_CHECKING:
    from pathlib import Path

NEED_KNOWLEDGE = {
    "end-forgotten",
    "says-token-zero",
    "placeholder-before-the-end",
    "rotary-base-wrong",
    "pictures-grey",
    "adapter-of-another-base",
}
# Quick ones whose words count layers, or that load the model again.
CAUGHT = (
    *("seven-names-hit-vision", "regex-matches-half", "optimizer-before-adapter", "type-fp4", "skip-list-too-greedy"),
    *("eos-setting-wrong", "scatter-off-by-one", "one-dimensional-in-training", "one-block-size-off"),
    "several-rows-scale-logits",
)


@pytest.fixture(scope="module")
def subject(random_folder: Path) -> Subject:
    return Subject.of(str(random_folder), dtype="float32")


@pytest.fixture(scope="module")
def case(subject: Subject) -> Any:
    """The one that faults are made of here, loaded once."""
    return _case(subject)


def test_what_a_model_without_knowledge_cannot_carry_says_so(case: Any) -> None:
    reasons = {name: fault.missing(case) for name, fault in catalogue().items() if fault.missing(case)}
    knowledge = {name for name, reason in reasons.items() if "needs knowledge" in (reason or "")}
    assert knowledge >= NEED_KNOWLEDGE
    assert knowledge == {n for n, f in catalogue().items() if f.check == "alignment" or "knowledge" in f.requires}
    assert reasons["skip-list-without-head"] == "needs an untied head: here the head is the embedding table"
    assert "windows-everywhere" not in reasons


def test_sizes_are_the_models_own(case: Any) -> None:
    sizes = sizes_of(case.model)
    assert (sizes.layers, sizes.language, sizes.vision) == (5, 35, 30)
    assert find("regex-matches-half").words(sizes)[0].startswith("21 modules")


@pytest.mark.parametrize("family", RANDOM_FAMILIES)
def test_counts_and_names_are_the_familys_own(family: str) -> None:
    import torch

    model = random_model(family, seed=0, dtype=torch.float32, quantization_config=None)
    sizes, linears = sizes_of(model), {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    first, block = "model.language_model.layers.0.", "model.visual.blocks.0."
    assert {first + sizes.first_input, first + sizes.first_output} <= linears
    assert {block + sizes.tower_up, block + sizes.tower_down} <= linears
    assert f"model.visual.merger.{sizes.merger_last}" in linears
    later = [
        n for n in linears if n.startswith("model.language_model.") and not n.startswith((first, first[:-2] + "1."))
    ]
    assert sizes.beyond_two_layers == len(later)
    assert sizes.with_attention == sum(n.endswith(".o_proj") for n in linears)


@pytest.mark.parametrize("model", ["", "embedded:qwen3-vl", "embedded:qwen3.5"])
def test_every_dose_can_be_made_of_every_family_and_is_undone(model: str, subject: Subject) -> None:
    case = _case(Subject.of(model) if model else subject)
    before = state(case)
    for graded in GRADED:
        for _, dose in () if unmet(graded.requires, "", case) else graded.doses:
            with damaged(case, dose):
                pass
    assert state(case) == before


def test_the_largest_dose_of_every_defect_is_undone(case: Any) -> None:
    before = state(case)
    for graded in GRADED:
        if not unmet(graded.requires, "", case):
            with damaged(case, graded.doses[-1][1]):
                pass
    assert state(case) == before


@pytest.mark.parametrize(
    ("defect", "smallest"),
    [
        ("offset of one layer's double quantization", "1 float32 step"),
        ("packed bytes of one 4-bit layer zeroed", "1 byte"),
        ("lora_alpha saved off by a factor", "0.01 %"),
        ("tokens that the loss counts and does not sum", "1 token"),
    ],
)
def test_what_can_be_counted_or_compared_is_caught_at_its_smallest_dose(case: Any, defect: str, smallest: str) -> None:
    graded = next(each for each in GRADED if each.defect == defect)
    check = graded.checks[0]
    assert smallest_doses(case, replace(graded, checks=(check,))) == [Smallest(defect, check, smallest, ())]


def test_a_defect_that_a_model_cannot_carry_says_why(case: Any) -> None:
    graded = Graded("d", ("alignment",), (), requires=("linear attention",))
    (found,) = smallest_doses(case, graded)
    assert found.undecided == "needs layers of linear attention: only Qwen3.5 has them"


@pytest.mark.parametrize("name", CAUGHT)
def test_fault_is_caught_on_a_folder_in_words_that_count_its_layers(subject: Subject, name: str) -> None:
    found = do(Plan(subject, CAUGHT, named_only=True), Task("fault", name)).found
    assert (found["broken"], found["named"]) == ("", True), found


def test_a_fault_in_a_faults_own_code_ends_no_run(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager
    from importlib import import_module

    module: Any = import_module("pytest_qvl.faults.catalogue")

    @contextmanager
    def broken(_case: Any) -> Any:
        raise RuntimeError("Expected all tensors to be on the same device")
        yield

    monkeypatch.setitem(module._FAULTS, "rank-halved", replace(find("rank-halved"), damage=broken))
    module.catalogue.cache_clear()
    try:
        found = do(Plan(subject, ("rank-halved",), named_only=True), Task("fault", "rank-halved")).found
    finally:
        monkeypatch.undo()
        module.catalogue.cache_clear()
    assert found["broken"] == "RuntimeError: Expected all tensors to be on the same device"
