"""Faults on a family whose first layers do not attend, with other norms and constants, whose releases sample and think."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_qvl.faults.catalogue import find
from pytest_qvl.faults.matrix.work import Plan, Task, _case, do
from pytest_qvl.faults.subject import Subject
from pytest_qvl.models.families import FAMILIES

pytestmark = pytest.mark.skipif(not FAMILIES["qwen3_5"].installed, reason="this release of Transformers has no Qwen3.5")
SUBJECT = Subject.of("embedded:qwen3.5")
CAUGHT = (
    *("attention-not-causal", "mean-and-deviation-wrong", "epsilon-of-the-language-layers"),
    *("attention-scaling-5-percent-off", "end-biased-away", "video-times-exchanged", "thought-half-taught"),
)
LONG = (
    *("attention-scaling-off", "key-heads-exchanged", "cache-one-step-stale", "adapter-learned-no-end"),
    *("thought-block-missing", "thought-end-not-taught", "thought-behind-an-empty-one"),
)
REASONS = {
    "type-ids-dropped": "this one's forward raises",
    "replies-at-random": "this family's draw replies at random",
    "packing-ignored-by-attention": "needs attention in every layer",
}


@pytest.fixture(scope="module")
def case() -> Any:
    return _case(SUBJECT)


@pytest.mark.parametrize("name", REASONS)
def test_what_the_family_cannot_carry_says_so(case: Any, name: str) -> None:
    assert REASONS[name] in (find(name).missing(case) or "")


@pytest.mark.parametrize("name", [*CAUGHT, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)])
def test_fault_is_caught_in_the_modules_that_this_family_has(name: str) -> None:
    found = do(Plan(SUBJECT, (*CAUGHT, *LONG), named_only=True), Task("fault", name)).found
    assert (found["broken"], found["named"]) == ("", True), found
