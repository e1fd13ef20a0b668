"""Whether a loss falls, to first order, as its gradient promises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.teaching import forward
from pytest_qvl.models.training import backward

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

    from pytest_qvl.checks.support.teaching import Batch
    from pytest_qvl.models.anatomy import Parts

_FIRST_SHARE = 1 / 4
_HALVINGS = 10
_AGREES = 1 / 2


@dataclass(frozen=True)
class Lesson:
    """A batch to learn, computed with the same dropout every time so that two losses can be compared.

    Attributes:
        parts: The model, in train mode.
        batch: Model inputs with labels.
        weights: What is trained.
        scale: Loss scale of float16 gradients; 1 for none.
        seed: Of dropout.
    """

    parts: Parts
    batch: Batch
    weights: Sequence[nn.Parameter]
    scale: float
    seed: int

    def _loss(self) -> torch.Tensor:
        import torch

        torch.manual_seed(self.seed)
        loss: torch.Tensor = forward(self.parts, self.batch).loss
        return loss

    def loss(self) -> float:
        """The loss in nats, without a gradient."""
        import torch

        with torch.no_grad():
            return float(self._loss())

    def backward(self) -> float:
        """The loss in nats; leaves unscaled gradients in :attr:`weights`."""
        return backward(self._loss, list(self.weights), scale=self.scale)[0]


@dataclass(frozen=True)
class Move:
    """One optimizer step: where each weight was, its gradient there (``None`` for none), and where it went."""

    before: list[torch.Tensor]
    grads: list[torch.Tensor | None]
    after: list[torch.Tensor]

    def slopes(self, weights: Sequence[torch.Tensor] | None = None) -> list[float]:
        """First-order change of the loss by each tensor, in nats: ``<gradient, weights - before>`` in float64."""
        import torch

        sums = [
            before.new_zeros((), dtype=torch.float64)
            if grad is None
            else (grad.double() * (now.double() - before.double())).sum()
            for before, grad, now in zip(self.before, self.grads, weights or self.after, strict=True)
        ]
        slopes: list[float] = torch.stack(sums).tolist()
        return slopes


def take_step(lesson: Lesson, optimizer: Any) -> Move:
    """One backward and one optimizer step."""
    lesson.backward()
    weights = lesson.weights
    before = [weight.detach().clone() for weight in weights]
    grads = [None if weight.grad is None else weight.grad.detach().clone() for weight in weights]
    optimizer.step()
    return Move(before, grads, [weight.detach().clone() for weight in weights])


@dataclass(frozen=True)
class Descent:
    """What the loss does along a move, in nats, at the first length at which it does what was promised, or the last.

    Attributes:
        promised: By the gradient, to first order; negative where the move goes downhill.
        seen: Half the difference between the losses ahead and behind.
        agrees: Whether the loss falls as promised.
    """

    promised: float
    seen: float
    agrees: bool


def descent(lesson: Lesson, move: Move) -> Descent:
    """Follow a move until the loss does what the gradient promises: a proof that the gradient is the loss's own.

    The length of the move begins where the promise is a quarter of the loss and is halved up to ten times; losses are
    compared ahead and behind, so that curvature cancels. It agrees where the deviation is at most half of the promise
    twice in a row. Derived in docs/limits.md#first-order-descent. The weights are put back where the move began.

    Args:
        lesson: Computes the loss.
        move: Begins where the gradient was taken.
    """
    _place(lesson.weights, move.before)  # an optimizer's step may have been a long one
    start, slope = lesson.loss(), sum(move.slopes())
    promised = seen = 0.0
    agreed = False
    length = _FIRST_SHARE * start / abs(slope) if slope else 0.0
    try:
        for _ in range(_HALVINGS + 1 if length else 0):
            (ahead, loss_ahead), (behind, loss_behind) = (_probe(lesson, move, way * length) for way in (1, -1))
            promised, seen = (ahead - behind) / 2, (loss_ahead - loss_behind) / 2
            agrees = promised < 0 and abs(seen - promised) <= _AGREES * abs(promised)
            if agrees and agreed:
                return Descent(promised, seen, True)
            agreed, length = agrees, length / 2
    finally:
        _place(lesson.weights, move.before)
    return Descent(promised, seen, False)


def _probe(lesson: Lesson, move: Move, length: float) -> tuple[float, float]:
    """First-order change of the loss at ``length`` times the move, of the weights as rounded there, and the loss."""
    import torch

    with torch.no_grad():
        for weight, before, after in zip(lesson.weights, move.before, move.after, strict=True):
            weight.copy_(before + length * (after - before))
    return sum(move.slopes(lesson.weights)), lesson.loss()


def _place(weights: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    import torch

    with torch.no_grad():
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)
