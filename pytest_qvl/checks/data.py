"""The user's own data: what any collator made of it, judged in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.batches.answers import judge_labels
from pytest_qvl.checks.batches.conversations import conversations
from pytest_qvl.checks.batches.dummies import dummies, judge_dealt
from pytest_qvl.checks.batches.facts import View, facts
from pytest_qvl.checks.batches.findings import Findings
from pytest_qvl.checks.batches.ids import judge_ids
from pytest_qvl.checks.batches.joined import judge_joined, note_system_turns
from pytest_qvl.checks.batches.layout import lay_out
from pytest_qvl.checks.batches.masks import judge_mask, judge_types
from pytest_qvl.checks.batches.paired import judge_answers, pair, units
from pytest_qvl.checks.batches.pictures import judge_images
from pytest_qvl.checks.batches.pixels import judge_pixels
from pytest_qvl.checks.batches.places import judge_packing, judge_positions, judge_time
from pytest_qvl.checks.batches.times import judge_times
from pytest_qvl.checks.registry import check, refuse_no_batch
from pytest_qvl.evidence import CannotJudge, Evidence, InputError, Judge

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_qvl.checks.batches.conversations import Conversation
    from pytest_qvl.checks.batches.layout import Layout
    from pytest_qvl.checks.batches.paired import Pair


@check(promise=10, guarded=False)
def batch(
    batch: Mapping[str, Any],
    processor: Any,
    model_or_config: Any,
    samples: Sequence[Any] | None = None,
    *,
    training: bool | None = None,
) -> Evidence:
    """A batch of any collator is what the model takes: placeholders, pixels, masks, token types, positions, labels.

    No forward pass and no weights: what a batch must be follows from its tokens, its grids and the model's
    configuration. Judged row by row are placeholders against grids (images and videos), grids against pixels, their
    dtype, range and normalisation, ``attention_mask`` against padding on either side, ``mm_token_type_ids`` against
    placeholders, positions that the batch brings against the papers' definition, packed rows (with `samples`, also
    rows that hold several of them and nothing that keeps them apart), the time of videos, and of labels that answers
    are learned, whole, and nothing else. Each finding is a :class:`pytest_qvl.checks.batches.findings.BatchFinding`:
    kind, row, token, what is there, what should be, and the usual cause; ``findings_of(evidence)`` returns them. What
    could not be judged is noted with its reason and counted.
    All comparisons are exact, but for pixels: docs/limits.md#batches.

    Args:
        batch: What the collator returned, a mapping from names to tensors: ``input_ids`` ``(rows, length)`` and
            whatever else the model is given, on any device.
        processor: The processor that made it, or the tokenizer.
        model_or_config: The model (bare or wrapped by PEFT, DistributedDataParallel or torch.compile), its
            configuration, or the folder of one.
        samples: What the batch was made of, row by row: :class:`pytest_qvl.samples.Sample`, or mappings with
            ``"messages"`` and, where the messages do not hold them, ``"images"``.
        training: Whether labels are judged; None: where there are any.

    Raises:
        CheckFailed: There are findings; all of them, the most telling first.
        CannotJudge: The model is of a family that is not known, or the batch has no ``input_ids``.
        InputError: An argument is not what it should be.
    """
    if processor is None:
        raise InputError("batch: processor is the processor (or tokenizer) that made the batch, got None")
    known = facts(model_or_config)
    if hasattr(batch, "keys") and "input_ids" not in batch and "inputs_embeds" in batch:
        raise CannotJudge("the batch has inputs_embeds in place of input_ids: which token is what cannot be told")
    refuse_no_batch("batch", "batch", batch, grids=False)
    if not batch["input_ids"].numel():
        raise InputError(f"batch: input_ids of shape {tuple(batch['input_ids'].shape)} hold no token")
    judge, findings = Judge("batch", "a collated batch is what the model takes"), Findings()
    learning = batch.get("labels") is not None if training is None else training
    view = View(batch, processor, known, training=learning)
    given = None if samples is None else conversations(samples)
    findings.judged["rows"] = view.rows
    images, videos = _judge(view, findings)
    if given is None:
        note_system_turns(view, findings)
    elif (pairs := _paired(view, findings, given)) is not None:
        if videos.grids:
            findings.unjudged["images against samples"] = "the batch holds videos, which samples are not compared with"
        else:
            judge_images(view, findings, images, pairs)
        judge_answers(view, findings, pairs)
    findings.hand_over(judge)
    return judge.verdict()


def _paired(view: View, findings: Findings, given: Sequence[Conversation]) -> list[Pair] | None:
    found = list(units(view))
    judge_joined(view, findings, found, given)
    return pair(view, findings, found, given)


def _judge(view: View, findings: Findings) -> tuple[Layout, Layout]:
    """Judge all that needs no samples; returns where images and videos are."""
    judge_ids(view, findings)
    images, videos = (lay_out(view, findings, kind) for kind in view.known.kinds)
    for layout in (images, videos):
        judge_pixels(view, findings, layout)
    unseen = dummies(view, images)
    judge_mask(view, findings, unseen)
    judge_types(view, findings)
    judge_dealt(view, findings, images, unseen.numbers)
    seconds = judge_time(view, findings, videos)
    judge_times(view, findings, videos)
    judge_packing(view, findings)
    judge_positions(view, findings, images, videos, seconds)
    judge_labels(view, findings)
    return images, videos
