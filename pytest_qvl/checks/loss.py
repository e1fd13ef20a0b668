"""The loss is the cross-entropy of the answers' tokens, each counted once, in one batch and over micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.accumulation import (
    Accumulated,
    as_trainer_does,
    by_trainer,
    counts_tokens,
    divisor_of_accelerator,
    gradient_limit,
    steps_of,
)
from pytest_qvl.checks.support.cross_entropy import (
    TokenLosses,
    explained,
    telling_labels,
    token_losses,
    usual_mistakes,
)
from pytest_qvl.checks.support.head_replay import HeadReplay
from pytest_qvl.checks.support.rounding import step
from pytest_qvl.checks.support.teaching import NO_LABELS, text_tokens
from pytest_qvl.checks.support.unpacked_weights import require_unpacked_weights
from pytest_qvl.evidence import CannotJudge, Evidence, InputError, Judge
from pytest_qvl.models.adapters import orthogonality_penalty_off
from pytest_qvl.models.anatomy import Parts, anatomy
from pytest_qvl.models.state import preserved
from pytest_qvl.models.training import without_dropout
from pytest_qvl.samples.batch import IGNORED

if TYPE_CHECKING:
    import torch

    from pytest_qvl.checks.support.teaching import Batch

_SEED = 20_311
AVERAGES = (
    "averages the means of micro-batches (the model declares accepts_loss_kwargs = False: "
    "https://github.com/huggingface/transformers/pull/40333), so that tokens count more the fewer a micro-batch has"
)
DIVIDES = (
    "its accelerator divides by {divisor} once more (https://github.com/huggingface/transformers/issues/45305): "
    "set trainer.accelerator.gradient_accumulation_steps = 1"
)
REMEDY = "set accepts_loss_kwargs = True on the base model (model.get_base_model()) before the Trainer is made"


@check(promise=10)
def loss_arithmetic(model: Any, batch: Batch, *, trainer: Any = None) -> Evidence:
    """Prove that the loss is the mean cross-entropy of the supervised tokens, also when gradients are accumulated.

    One forward in train mode; head and loss then run again and again over its hidden states, with other labels. The
    labels' tokens are exchanged at random, so that the loss of every place and row is another one. The loss is compared
    with cross-entropy from the model's own logits, in float64: shifted by one, without ignored labels. AdaLoRA's
    penalty is left out.

    ============================ ============================================== ====================================
    judged                       has to be                                      limit
    ============================ ============================================== ====================================
    loss of the batch            mean over its supervised tokens                docs/limits.md#cross-entropy
    same, labels exchanged       mean over its supervised tokens                docs/limits.md#cross-entropy
    loss of each row by itself   mean over the row's supervised tokens          docs/limits.md#cross-entropy
    with ``num_items_in_batch``  sum over tokens / that number; or the mean, if docs/limits.md#cross-entropy
                                 the model says that it does not take it
    accumulated row by row       loss and gradient of one batch, if the model   docs/limits.md#gradient-accumulation
                                 takes ``num_items_in_batch``; else a note
    accumulated by your trainer  loss and gradient of one batch                 docs/limits.md#gradient-accumulation
    ============================ ============================================== ====================================

    Args:
        model: The model, wrapped by PEFT or not.
        batch: Model inputs with ``labels`` (rows, length) int64, -100 at what is not learned.
        trainer: Your ``transformers.Trainer`` (or a subclass, as TRL's ``SFTTrainer``) over this model, of whose
            ``gradient_accumulation_steps`` the rows are made one optimizer step; or a function of the model and a list
            of micro-batches that runs forward and backward of each. None: nothing is known of how you accumulate.

    Raises:
        CheckFailed: Says what the loss is instead, of which row, or which part of one batch's gradient accumulates.
        CannotJudge: Logits that are not finite, a model whose core is not called, or weights repacked for the CPU.
        ValueError: No labels, nothing supervised, or a trainer that is none.
    """
    parts = anatomy(model)
    _require_labels(batch)
    if trainer is not None:
        steps_of(trainer)
    require_unpacked_weights(parts)
    judge = Judge("loss_arithmetic", "the loss is the mean cross-entropy of the answers' tokens")
    with (
        preserved(model, training=True, seed=_SEED),
        without_dropout(parts.lm_head),
        orthogonality_penalty_off(parts),
    ):
        replay = HeadReplay(parts, batch)
        labels = telling_labels(batch["labels"], text_tokens(parts, batch), _SEED)
        _judge_value(judge, "loss of the batch", replay, batch["labels"])
        right = _judge_value(judge, "loss, labels exchanged", replay, labels)
        if not judge.problems:
            _judge_rows(judge, replay, labels, right)
        honoured = not judge.problems and _judge_items(judge, parts, replay, labels, right)
        if not judge.problems:
            _judge_accumulation(judge, parts, replay, labels, right, honoured=honoured)
        if trainer is not None and not judge.problems:
            _judge_trainer(judge, by_trainer(parts, replay, {**batch, "labels": labels}, trainer), right, trainer)
    return judge.verdict()


def _require_labels(batch: Batch) -> None:
    labels = batch.get("labels")
    if labels is None:
        raise InputError(f"loss_arithmetic: {NO_LABELS}")
    if labels.shape != batch["input_ids"].shape:
        raise InputError(f"labels are {tuple(labels.shape)} but input_ids are {tuple(batch['input_ids'].shape)}")
    if bool((labels[:, 1:] == IGNORED).all()):
        raise InputError("the batch has no supervised token: all of its labels are -100")


@dataclass(frozen=True)
class _Right:
    """What the loss has to be.

    Attributes:
        losses: Cross-entropy of each supervised token.
        limit: How far the model's loss may be off, in nats.
        slack: What is in it for logits that are not those of the loss.
    """

    losses: TokenLosses
    limit: float
    slack: float

    def of_row(self, row: int, dtype: torch.dtype) -> _Right:
        """The same for one row by itself."""
        own = self.losses.of_row(row)
        return _Right(own, own.limit(dtype) + self.slack, self.slack)


def _loss(replay: HeadReplay, labels: torch.Tensor, **extra: Any) -> torch.Tensor:
    import torch

    with torch.no_grad():
        found: torch.Tensor = replay(labels, **extra).loss.detach()
    return found


def _judge_value(judge: Judge, what: str, replay: HeadReplay, labels: torch.Tensor) -> _Right:
    """Hold a loss to its own logits, or to those of a forward without labels where a fused loss keeps none."""
    import torch

    with torch.no_grad():
        output = replay(labels)
        loss, logits, slack = output.loss.detach(), getattr(output, "logits", None), 0.0
        if not isinstance(logits, torch.Tensor) or logits.shape[:2] != labels.shape:
            logits = replay(None).logits
            slack = 4 * step(logits.dtype, float(logits.abs().max()))
    losses = token_losses(logits, labels)
    if not math.isfinite(losses.largest):
        raise CannotJudge("logits are not finite, so they have no cross-entropy; training_step says where it begins")
    right = _Right(losses, losses.limit(loss.dtype) + slack, slack)
    _hold(judge, what, float(loss), right, usual_mistakes(logits, labels))
    return right


def _hold(judge: Judge, what: str, loss: float, right: _Right, mistakes: dict[str, float]) -> None:
    expected = right.losses.mean
    judge.at_most(
        f"{what}, off by",
        abs(loss - expected),
        right.limit,
        unit="nat",
        else_say=(
            f"the {what} is {loss:.6g} nat where its logits and labels have a mean cross-entropy of "
            f"{expected:.6g}{explained(loss, expected, mistakes, right.limit)}"
        ),
    )


def _judge_rows(judge: Judge, replay: HeadReplay, labels: torch.Tensor, right: _Right) -> None:
    for row in dict.fromkeys(right.losses.rows):
        alone = labels.clone()
        alone[[other for other in range(len(labels)) if other != row]] = IGNORED
        loss = _loss(replay, alone)
        _hold(judge, f"loss of row {row} by itself", float(loss), right.of_row(row, loss.dtype), {})


def _judge_items(judge: Judge, parts: Parts, replay: HeadReplay, labels: torch.Tensor, right: _Right) -> bool:
    """Whether the loss is divided by ``num_items_in_batch`` where a trainer gives it; a problem if it is by neither."""
    items = 2 * len(right.losses.values) + 1
    loss = float(_loss(replay, labels, num_items_in_batch=(labels[:, 1:] != IGNORED).sum() * 2 + 1))
    divided = right.losses.total / items
    ignored = abs(loss - right.losses.mean) <= right.limit
    if ignored and not counts_tokens(parts):
        judge.note("the loss ignores num_items_in_batch, and says so (accepts_loss_kwargs = False)")
        return False
    found = "the mean over this batch's own tokens, so that number is ignored" if ignored else f"{loss:.6g} nat"
    times = "as many times one batch's loss as there are micro-batches" if ignored else "another loss than one batch's"
    return judge.at_most(
        "loss by num_items_in_batch, off by",
        abs(loss - divided),
        right.limit,
        unit="nat",
        else_say=(
            f"given num_items_in_batch = {items}, the loss has to be the sum over tokens divided by that "
            f"({divided:.6g} nat) and is {found}: micro-batches then add up to {times} "
            "(https://github.com/huggingface/transformers/issues/47688)"
        ),
    )


def _judge_accumulation(
    judge: Judge, parts: Parts, replay: HeadReplay, labels: torch.Tensor, right: _Right, *, honoured: bool
) -> None:
    """What ``transformers.Trainer`` would accumulate over the rows, one at a time."""
    if len(set(right.losses.rows)) < 2:
        judge.note("accumulation was not judged: only one row has labels")
        return
    counting = counts_tokens(parts)
    found = as_trainer_does(replay, labels, counting=counting)
    if counting:
        _judge_accumulated(judge, "row by row, with num_items_in_batch", found, right)
        return
    judge.report("gradient of rows accumulated by their means, of one batch's", found.factor)
    remedy = f"; if you accumulate, {REMEDY}, and override qvl_trainer to have it judged" if honoured else ""
    judge.note(
        f"with gradient accumulation, transformers.Trainer {AVERAGES}: over the rows of this batch, one at a time, "
        f"{found}{remedy}"
    )


def _judge_trainer(judge: Judge, found: Accumulated | None, right: _Right, trainer: Any) -> None:
    if found is None:
        judge.note("your trainer takes one batch per optimizer step (gradient_accumulation_steps = 1)")
        return
    steps = steps_of(trainer)
    means = steps is not None and not getattr(trainer, "model_accepts_loss_kwargs", True)
    who = f"by your {'function' if steps is None else type(trainer).__name__}"
    cause = f"; it {AVERAGES}: {REMEDY}" if means else ""
    if steps is not None and (divisor := divisor_of_accelerator(trainer)) > 1:
        cause += "; " + DIVIDES.format(divisor=divisor)
    _judge_accumulated(judge, who, found, right, cause)


def _judge_accumulated(judge: Judge, who: str, found: Accumulated, right: _Right, cause: str = "") -> None:
    judge.report(f"gradient accumulated {who}, of one batch's", found.factor)
    fine = judge.at_most(
        f"gradient accumulated {who}, apart from one batch's",
        found.apart,
        gradient_limit(found.dtype, right.losses.columns),
        else_say=f"accumulated over micro-batches {who}, {found}{cause}",
    )
    if found.losses is not None and fine:
        summed, one = found.losses
        judge.at_most(
            f"loss accumulated {who}, apart from one batch's",
            abs(summed - one),
            2 * right.limit,
            unit="nat",
            else_say=f"accumulated over micro-batches {who}, the loss is {summed / one:.4g} of one batch's{cause}",
        )
