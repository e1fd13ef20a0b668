"""Adapters that learned the wrong thing: weights and arithmetic are right, the answers are not."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_qvl.checks.support.teaching import adamw, forward, trainable_parameters
from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.tools import all_of, values
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.samples.batch import IGNORED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_qvl.faults.case import Batch, Case
    from pytest_qvl.samples import Sample

STEPS = 14
# The end is unlearned from what follows an answer instead alone; the embedded Qwen3.5 has lost it after 20 steps.
STEPS_WITHOUT_END = 2 * STEPS
RATE = 3e-3
ROWS = 6


@contextmanager
def _taught(case: Case, samples: Sequence[Sample], *, ends: bool = True, steps: int = STEPS) -> Iterator[None]:
    """Train the adapter for some steps on samples, and put its values back on leaving.

    Args:
        case: Its adapter is trained.
        samples: With the answers that it learns.
        ends: Whether the tokens that end an answer have labels.
        steps: Steps of the optimizer.
    """
    import torch

    parts = anatomy(case.model)
    parameters = list(trainable_parameters(parts).values())
    with all_of([values(parameter, lambda weight: weight) for parameter in parameters]):
        optimizer = adamw(RATE)(parameters)
        with torch.enable_grad(), torch.random.fork_rng(devices=case.subject.random_devices()):
            for step in range(steps):
                first = step * ROWS % len(samples)
                batch = case.batch(samples[first : first + ROWS], padding_side="right", answers=True)
                forward(parts, batch if ends else _without_ends(batch)).loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        yield


def _without_ends(batch: Batch) -> Batch:
    """The batch without the label at the end of each row."""
    labels = batch["labels"].clone()
    for row in labels:
        row[(row != IGNORED).nonzero()[-1]] = IGNORED
    return {**batch, "labels": labels}


@fault(
    "adapter-learned-one-answer",
    "The adapter was trained by a collator that gave every row the first row's answer: it says that to everything.",
    target="adapter",
    check="alignment",
    expected_words=("with the adapter on, answers are lost", "answers are right"),
)
def _one_answer(case: Case) -> Iterator[None]:
    with _taught(case, [replace(sample, answer=case.probes[0].answer) for sample in case.probes]):
        yield


@fault(
    "adapter-learned-no-end",
    "The adapter was trained on answers without <|im_end|>: it says the right one, and says it over and over.",
    target="adapter",
    check="generation_wellformed",
    expected_words=("tokens without one of", "an adapter trained without <|im_end|> forgets to"),
    source="KempnerInstitute/KempnerForge#156, hiyouga/LlamaFactory#7943",
    requires=("knowledge",),
)
def _no_end(case: Case) -> Iterator[None]:
    endless = [replace(sample, answer=" ".join([sample.answer] * 3)) for sample in case.probes]
    with _taught(case, endless, ends=False, steps=STEPS_WITHOUT_END):
        yield
