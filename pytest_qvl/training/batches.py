"""A batch on its way into the model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_qvl import checks
from pytest_qvl.checks.batches.findings import findings_of
from pytest_qvl.evidence import CannotJudge, CheckFailed, Evidence

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_qvl.checks.batches.findings import BatchFinding
    from pytest_qvl.training.settings import Learned
    from pytest_qvl.training.subject import Subject


def no_processor(given: Any) -> str:
    """Why batches are not judged where the trainer's ``processing_class`` makes no images; empty where it does."""
    if hasattr(given, "image_processor"):
        return ""
    had = "no processor" if given is None else f"a {type(given).__name__} without an image processor"
    return (
        f"the trainer was given {had} (processing_class), so its batches are not judged: "
        "Guard(processor=AutoProcessor.from_pretrained(...))"
    )


def judge_batch(subject: Subject, batch: Mapping[str, Any], learned: Learned) -> Evidence:
    """Hold a batch to be what the model takes, and its labels to answers (:func:`pytest_qvl.checks.batch`).

    Args:
        subject: What is trained.
        batch: The tensors that the trainer hands to the model.
        learned: ``"everything"`` where prompts are learned on purpose; placeholders and padding never are.

    Raises:
        CheckFailed: There are findings.
        CannotJudge: Nobody said which processor made the batch.
    """
    if reason := no_processor(subject.processor):
        raise CannotJudge(reason)
    try:
        evidence: Evidence = checks.batch(batch, subject.processor, subject.parts.wrapped)
    except CheckFailed as error:
        found = findings_of(error.evidence)
        wanted = {finding.kind for finding in found if learned == "everything" and _of_prompts(finding)}
        if not wanted:
            raise
        evidence = _without(error.evidence, wanted)
        if evidence.problems:
            raise CheckFailed(evidence) from None
    return evidence


def _of_prompts(finding: BatchFinding) -> bool:
    return finding.kind == "prompt-learned" or (
        finding.kind == "whole-row-learned" and "placeholders included" not in finding.found
    )


def _without(evidence: Evidence, kinds: set[str]) -> Evidence:
    return replace(
        evidence,
        figures=tuple(figure for figure in evidence.figures if figure.name not in kinds),
        problems=tuple(problem for problem in evidence.problems if problem.partition(":")[0] not in kinds),
        notes=(*evidence.notes, f"learned on purpose: {', '.join(sorted(kinds))}"),
    )
