"""Gradient accumulation: the micro-batches of one optimizer step, by a user's own trainer or as Transformers' does."""

from __future__ import annotations

import inspect
import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.evidence import CannotJudge, InputError, InputTypeError
from pytest_qvl.samples.batch import IGNORED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from pytest_qvl.checks.support.head_replay import HeadReplay
    from pytest_qvl.checks.support.teaching import Batch
    from pytest_qvl.models.anatomy import Parts

TRAINER = ("get_batch_samples", "training_step", "args")
TAKES = (
    "trainer (qvl_trainer) is a transformers.Trainer over the model, or a function of the model and the list of "
    "micro-batches of one optimizer step that leaves their gradients"
)


@dataclass(frozen=True)
class Accumulated:
    """A gradient that was accumulated over micro-batches beside that of the same rows in one batch.

    Attributes:
        factor: The first in units of the second, along the second.
        rows: The same for each row that has labels: how many times its tokens count as much as they should.
        apart: Norm of their difference, relative to the second.
        losses: Sum of the losses of the micro-batches, and the loss of one batch; ``None`` where nothing says so.
        dtype: That the gradients were made in.
    """

    factor: float
    rows: dict[int, float]
    apart: float
    losses: tuple[float, float] | None
    dtype: torch.dtype

    def __str__(self) -> str:
        low, high = (choose(self.rows, key=self.rows.__getitem__) for choose in (min, max))
        if self.rows[high] - self.rows[low] <= 0.01 * abs(self.factor):
            return f"the gradient is {self.factor:.3g} of one batch's"
        return (
            f"tokens of row {low} count {self.rows[low]:.3g} times and those of row {high} {self.rows[high]:.3g} times "
            "what they do in one batch"
        )


def compared(accumulated: torch.Tensor, one: torch.Tensor, losses: tuple[float, float] | None) -> Accumulated:
    """How an accumulated gradient, ``(rows, length, width)``, compares with that of one batch, in float64.

    Raises:
        CannotJudge: One batch has no gradient.
    """
    along = (accumulated.double() * one.double()).sum(dim=(1, 2)).tolist()
    sizes = one.double().square().sum(dim=(1, 2)).tolist()
    off = (accumulated.double() - one.double()).square().sum().item()
    if not sum(sizes) > 0:
        raise CannotJudge("the loss of one batch has no gradient at the hidden states, so none can be compared with it")
    rows = {row: dot / size for row, (dot, size) in enumerate(zip(along, sizes, strict=True)) if size}
    return Accumulated(sum(along) / sum(sizes), rows, math.sqrt(off / sum(sizes)), losses, one.dtype)


def gradient_limit(dtype: torch.dtype, vocabulary: int) -> float:
    """How far the two gradients of :class:`Accumulated` may be apart: docs/limits.md#gradient-accumulation.

    Args:
        dtype: Of the hidden states, in which gradients are kept.
        vocabulary: Terms of each sum that makes an element of the gradient.
    """
    import torch

    from pytest_qvl.checks.support.rounding import rounded_sums

    return 3 * torch.finfo(dtype).eps * rounded_sums(dtype, vocabulary)


def counts_tokens(parts: Parts) -> bool:
    """Whether ``transformers.Trainer`` hands this model the number of tokens of the whole step.

    Its own rule (``Trainer.__init__``): what ``accepts_loss_kwargs`` says, else whether ``forward`` takes ``**kwargs``.
    """
    declared = getattr(parts.base, "accepts_loss_kwargs", None)
    if declared is not None:
        return bool(declared)
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(parts.base.forward).parameters.values())


def micro_batches(labels: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The labels ``(rows, length)`` once for each micro-batch, those of all other rows ignored.

    Rows stay where they are, so that every micro-batch runs through the same kernels with the same shapes as the whole
    batch. The rows that have labels are dealt out in order, into ``count`` micro-batches or as many as there are rows.
    """
    rows = (labels != IGNORED).any(dim=1).nonzero().flatten().tolist()
    count = min(count, len(rows))
    shares = [rows[number * len(rows) // count : (number + 1) * len(rows) // count] for number in range(count)]
    made = []
    for share in shares:
        kept = labels.clone()
        kept[[row for row in range(len(labels)) if row not in share]] = IGNORED
        made.append(kept)
    return made


def as_trainer_does(replay: HeadReplay, labels: torch.Tensor, *, counting: bool) -> Accumulated:
    """Accumulate row by row as ``transformers.Trainer`` does, on the gradient of the hidden states.

    Args:
        replay: The model behind its core.
        labels: ``(rows, length)``.
        counting: Hand each micro-batch the number of tokens of the step; otherwise average their means.
    """
    import torch

    micro = micro_batches(labels, len(labels))
    items = (labels[:, 1:] != IGNORED).sum()
    total = 0.0
    hidden = replay.leaf()
    gradient = torch.zeros_like(hidden, dtype=torch.float32)
    for each in micro:
        extra = {"num_items_in_batch": items} if counting else {}
        loss = replay(each, hidden=hidden, **extra).loss / (1 if counting else len(micro))
        gradient += torch.autograd.grad(loss, hidden)[0]
        total += float(loss.detach())
    whole = replay(labels, hidden=hidden).loss
    return compared(gradient, torch.autograd.grad(whole, hidden)[0], (total, float(whole.detach())))


def steps_of(trainer: Any) -> int | None:
    """Micro-batches of each optimizer step by a trainer's own arguments; ``None`` of a function, which takes any.

    Raises:
        InputTypeError: Neither a trainer nor a function.
    """
    if all(hasattr(trainer, name) for name in TRAINER):
        return int(trainer.args.gradient_accumulation_steps)
    if callable(trainer) and not isinstance(trainer, type):
        return None
    raise InputTypeError(f"{TAKES}; got a value of type {type(trainer).__name__}")


def by_trainer(parts: Parts, replay: HeadReplay, batch: Batch, trainer: Any) -> Accumulated | None:
    """Let a user's own trainer accumulate, and run the same rows as one batch; ``None`` if it takes one batch per step.

    One batch is run as with ``gradient_accumulation_steps = 1``, or a division that is there in both would be in
    neither's difference.

    Args:
        parts: The model, which has to be the trainer's.
        replay: The model behind its core.
        batch: Model inputs with labels.
        trainer: See :func:`steps_of`.

    Raises:
        InputError: The trainer is over another model, or leaves no gradient.
    """
    steps, labels = steps_of(trainer), batch["labels"]
    if steps is not None and steps < 2:
        return None
    micro = micro_batches(labels, len(labels) if steps is None else steps)
    hidden = replay.leaf()
    found: list[tuple[torch.Tensor, float | None]] = []
    for each in (micro, [labels]):
        hidden.grad = None
        with replay.serving(hidden):
            losses = _one_step(parts, trainer, [{**batch, "labels": part} for part in each])
        if hidden.grad is None:
            raise InputError(f"{TAKES}; this one left no gradient: does it call backward on this model's loss?")
        found.append((hidden.grad.clone(), losses))
    (accumulated, sums), (one, whole) = found
    return compared(accumulated, one, None if sums is None or whole is None else (sums, whole))


def _one_step(parts: Parts, trainer: Any, batches: Sequence[dict[str, Any]]) -> float | None:
    """One optimizer step's forward and backward passes; the sum of the losses, where they are told."""
    if steps_of(trainer) is None:
        trainer(parts.wrapped, list(batches))
        return None
    if trainer.model is not parts.wrapped:
        raise InputError(f"{TAKES}; this one is over another model")
    samples, items = trainer.get_batch_samples(iter(batches), len(batches), parts.device)
    before = getattr(trainer, "current_gradient_accumulation_steps", None)
    trainer.current_gradient_accumulation_steps = len(batches)
    try:
        with _accelerator_divides_by(trainer, min(divisor_of_accelerator(trainer), len(batches))):
            return float(sum(float(trainer.training_step(trainer.model, each, items)) for each in samples))
    finally:
        trainer.current_gradient_accumulation_steps = before


def divisor_of_accelerator(trainer: Any) -> int:
    """By what Accelerate divides each loss before it goes backward, beside what the trainer does; 1 without one."""
    return int(getattr(getattr(trainer, "accelerator", None), "gradient_accumulation_steps", 1))


@contextmanager
def _accelerator_divides_by(trainer: Any, steps: int) -> Iterator[None]:
    """Let Accelerate divide by this many steps for the length of a block."""
    before = divisor_of_accelerator(trainer)
    if steps == before:
        yield
        return
    trainer.accelerator.gradient_accumulation_steps = steps
    try:
        yield
    finally:
        trainer.accelerator.gradient_accumulation_steps = before
