"""Each row of a batch for training against the answer of its sample, and its mask against its padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.packing import refuse_packed
from pytest_qvl.checks.support.placeholders import attended, model_inputs
from pytest_qvl.checks.support.teaching import NO_LABELS
from pytest_qvl.checks.support.turns import plain
from pytest_qvl.checks.support.wording import some
from pytest_qvl.evidence import CannotJudge, Evidence, InputError, Judge
from pytest_qvl.samples.batch import END_OF_TURN, IGNORED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from pytest_qvl.checks.support.teaching import Batch
    from pytest_qvl.samples import Sample


@check(promise=10)
def training_collation(processor: Any, samples: Sequence[Sample], batch: Batch) -> Evidence:
    """Each row of a training batch teaches its own sample's answer, and attends to all of itself and to no padding.

    An answer that stands in another row fits everywhere: the loss falls, and the model learns wrong answers. Here
    the text under the labels of each row is compared with the answers. A longer text that holds the row's own answer
    (JSON, reasoning before it) is right, and noted.

    The ``attention_mask`` must be 0 on every pad token and 1 on every other token; without one there must be no
    padding. Causal attention alone makes up for a missing mask behind right padding; padding on the left, attention
    without a mask of its own and kernels that take rows apart by their mask do not. A pad token that is supervised (an
    end of text that is taught) is no padding. Where the pad token is ``<|im_end|>``, padding is what stands at either
    end of a row, and the first one behind an answer may be its end.

    Prompts, images and grids of the same batch are for :func:`pytest_qvl.checks.picture_pairing`, whether only
    answers are taught is for :func:`pytest_qvl.checks.label_mask`. All comparisons are exact. No forward pass.

    Args:
        processor: The processor (or tokenizer) that made the batch.
        samples: What the batch was made of, row by row.
        batch: ``input_ids`` and ``labels``, (rows, length) int64, padded on either side, with or without an
            ``attention_mask`` of (rows, length).

    Raises:
        CheckFailed: Names row and sample, what it is taught and whose answer that is; or row and number of the pad
            tokens that are attended to, or of the other tokens that are not.
        CannotJudge: Several samples are packed into a row, the mask has another shape, or no row has a label.
        ValueError: No labels, or not one sample per row.
    """
    judge = Judge("training_collation", "each row teaches its own answer and attends to itself only")
    if "labels" not in batch:
        raise InputError(f"training_collation: {NO_LABELS}")
    inputs, labels = model_inputs(batch), batch["labels"]
    if labels.shape != inputs["input_ids"].shape:
        raise InputError(f"labels are {tuple(labels.shape)} but input_ids are {tuple(inputs['input_ids'].shape)}")
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape != labels.shape:
        raise CannotJudge(
            f"the attention_mask is {tuple(mask.shape)} where input_ids are {tuple(labels.shape)}: which tokens are "
            "padding is for a mask of (rows, length) to say"
        )
    refuse_packed(inputs, "which answer belongs to which sample cannot be told")
    if len(samples) != len(labels):
        raise InputError(f"training_collation needs the sample of each row: {len(samples)} samples, {len(labels)} rows")
    tokenizer = getattr(processor, "tokenizer", processor)
    _judge_answers(judge, tokenizer, samples, labels)
    _judge_mask(judge, tokenizer, inputs, labels)
    return judge.verdict()


def _judge_answers(judge: Judge, tokenizer: Any, samples: Sequence[Sample], labels: torch.Tensor) -> None:
    taught = [_taught(tokenizer, row) for row in labels.tolist()]
    if not any(taught):
        raise CannotJudge("no row has a supervised token: label_mask says so of each")
    wrong: list[str] = []
    longer: list[int] = []
    for row, (sample, texts) in enumerate(zip(samples, taught, strict=True)):
        answer = plain(sample.answer)
        if not texts or answer in texts:
            continue
        owner = _owner(samples, row, texts)
        if owner is None and any(answer in text for text in texts):
            longer.append(row)
            continue
        whose = "" if owner is None else f" (of row {owner}, sample {samples[owner].id!r})"
        wrong.append(f"row {row} (sample {sample.id!r}) is taught {texts[-1]!r}{whose} where its answer is {answer!r}")
    judge.report("rows with an answer", sum(map(bool, taught)))
    judge.equal(
        "rows that are taught another answer",
        len(wrong),
        0,
        else_say=f"{'; '.join(wrong[:3])}: does the collator keep each answer with its own prompt and images?",
    )
    if longer:
        judge.note(f"{len(longer)} rows are taught a longer text that holds their answer, first row {longer[0]}")


def _taught(tokenizer: Any, labels: list[int]) -> list[str]:
    """The text of each unbroken run of supervised tokens in a row, without what ends it."""
    runs: list[list[int]] = [[]]
    for label in labels:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    pad = tokenizer.pad_token or ""  # that ends an answer where it is taught
    texts = [tokenizer.decode(run, skip_special_tokens=False) for run in runs if run]
    return [plain(text.strip().removesuffix(pad).removesuffix(END_OF_TURN)) for text in texts]


def _owner(samples: Sequence[Sample], row: int, texts: Sequence[str]) -> int | None:
    """Another row whose answer is what this one is taught; the first of several."""
    return next((other for other, each in enumerate(samples) if other != row and plain(each.answer) in texts), None)


def _judge_mask(judge: Judge, tokenizer: Any, inputs: Mapping[str, Any], labels: torch.Tensor) -> None:
    if tokenizer.pad_token_id is None:
        judge.note("the tokenizer has no pad token: whether padding is attended to is not judged")
        return
    padding, text = _padding_and_text(tokenizer, inputs["input_ids"], labels)
    seen = attended(inputs)
    why = "the batch has no attention_mask" if inputs.get("attention_mask") is None else "the attention_mask is 1 there"
    for name, wrong, say in (
        ("pad tokens attended to", padding & seen, f"padding is attended to, since {why}"),
        (
            "tokens not attended to",
            text & ~seen,
            "tokens of samples are not attended to, the attention_mask is 0 there",
        ),
    ):
        counts = [f"row {row}: {count}" for row, count in enumerate(wrong.sum(dim=1).tolist()) if count]
        judge.equal(
            name,
            int(wrong.sum()),
            0,
            else_say=f"{say}: tokens of {some(counts)}; hand on the attention_mask that the processor returns, 0 "
            "exactly where input_ids are padded",
        )
    judge.report("pad tokens", int(padding.sum()))


def _padding_and_text(tokenizer: Any, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens are padding and which are not, ``(rows, length)`` bool; neither where that cannot be told."""
    pads = (ids == tokenizer.pad_token_id) & (labels == IGNORED)
    if tokenizer.pad_token_id != tokenizer.convert_tokens_to_ids(END_OF_TURN):
        return pads, ids != tokenizer.pad_token_id
    leading = pads.long().cumprod(dim=1).bool()
    trailing = pads.flip(1).long().cumprod(dim=1).flip(1).bool()
    behind_first = trailing & trailing.roll(1, dims=1)
    behind_first[:, 0] = False
    return leading | behind_first, ~(leading | trailing)
