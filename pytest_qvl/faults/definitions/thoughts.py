"""Thoughts in training rows that are left out, taught in part or found in the wrong place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.thoughts import put_thoughts, thought_of
from pytest_qvl.samples.batch import CLOSES, OPENS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_qvl.faults.case import Case


@fault(
    "thought-block-missing",
    "Answers are rendered without the empty thought that the generation prompt puts in front of every reply.",
    target="batch",
    check="label_mask",
    expected_words=("do not begin as a generation prompt of the chat template ends", "row 0 begins with"),
    source="hiyouga/LlamaFactory#10326, hiyouga/LlamaFactory#8352",
    requires=("thoughts in the template",),
)
def _missing(case: Case) -> Iterator[None]:
    put_thoughts(case, lambda _answer: [])
    yield


@fault(
    "thought-end-not-taught",
    "Thoughts and replies are taught, and </think> between them is masked as a token of the template's.",
    target="batch",
    check="label_mask",
    expected_words=("thoughts are taught without the </think> behind them", "does not learn to stop thinking: row 0"),
    requires=("thoughts in the template",),
)
def _end_not_taught(case: Case) -> Iterator[None]:
    put_thoughts(
        case, lambda answer: [(f"{OPENS}\n", False), (f"{thought_of(answer)}\n", True), (f"{CLOSES}\n\n", False)]
    )
    yield


@fault(
    "thought-half-taught",
    "The mask of the prompt is some tokens too long: it hides the beginning of every thought.",
    target="batch",
    check="label_mask",
    expected_words=("thoughts are taught in part", "row 0, "),
    requires=("thoughts in the template",),
)
def _half_taught(case: Case) -> Iterator[None]:
    put_thoughts(
        case,
        lambda answer: [
            (f"{OPENS}\n{thought_of('')}".rstrip(), False),
            (f" {answer}\n{CLOSES}\n\n", True),
        ],
    )
    yield


@fault(
    "thought-behind-an-empty-one",
    "The template does not find the thought of a reply, puts an empty one in front, and leaves its </think> behind.",
    target="batch",
    check="label_mask",
    expected_words=("answers hold <think> or </think> elsewhere than around one thought in front", "row 0"),
    source="huggingface/trl#6361",
    requires=("thoughts in the template",),
)
def _behind_an_empty_one(case: Case) -> Iterator[None]:
    put_thoughts(
        case,
        lambda answer: [(f"{OPENS}\n\n{CLOSES}\n\n", False), (f"{thought_of(answer)}\n{CLOSES}\n\n", True)],
    )
    yield
