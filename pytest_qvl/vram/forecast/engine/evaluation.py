"""What ``Trainer.evaluate`` does between two training steps.

Followed from source: ``transformers/trainer.py`` (``evaluation_loop``, ``prediction_step``), whose own
``EvalLoopContainer`` keeps what ``compute_metrics`` is to be given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_qvl.vram.forecast.engine.trainers import Loop
    from pytest_qvl.vram.forecast.request import Request

# Batches that run: of more, those between the second and the last only leave what the second left.
BATCHES_RUN = 3


class Evaluation:
    """An evaluation of as many batches as the request says.

    Args:
        trainer: Computes losses, and logits where metrics want them.
        request: Whose samples make one of its batches.
        draw: Puts the next batch, with labels, on the device.
    """

    def __init__(self, trainer: Loop, request: Request, draw: Callable[[], dict[str, Any]]) -> None:
        from transformers.trainer_pt_utils import EvalLoopContainer

        self._trainer, self._request, self._draw = trainer, request, draw
        self._losses, self._logits, self._labels = (
            EvalLoopContainer(request.eval_do_concat_batches, padding_index=-100) for _ in range(3)
        )
        self._leaves: list[Any] = []  # of what a batch left: shape and dtype of tensors, and everything else
        self._structure: Any = None

    def run(self) -> None:
        """Every batch; what one leaves is there until the next one has its own, as in ``evaluation_loop``."""
        batch: Any = None
        left: Any = None
        for number in range(1, self._request.evaluation_batches + 1):
            batch = self._draw()
            runs = number < BATCHES_RUN or number == self._request.evaluation_batches
            left = self._predicted(batch) if runs else self._left_out(batch)
            left = self._kept(*left)
            if self._goes_to_host(number):
                if not self._request.batch_eval_metrics:  # which keep no logits, and leave losses where they are
                    self._to_host()
                batch = left = None
                self._trainer.stage.empty_cache()
        self._to_host()

    def _predicted(self, batch: dict[str, Any]) -> tuple[Any, ...]:
        """Loss, logits and labels, as ``prediction_step`` returns them; ``None`` for what no metric wants."""
        with torch.no_grad():
            if not self._request.keeps_logits:
                return self._trainer.loss(batch).detach().mean(), None, None
            labels = batch["labels"].detach()
            loss, logits = self._trainer.loss_and_logits(batch)
            leaves, self._structure = tree_flatten(logits)
            self._leaves = [
                (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves
            ]
            return loss.detach().mean(), logits, labels

    def _left_out(self, batch: dict[str, Any]) -> tuple[Any, ...]:
        """The same of a batch that does not run."""
        stage = self._trainer.stage
        loss = stage.place(torch.zeros(()))
        if not self._request.keeps_logits:
            return loss, None, None

        def left(leaf: Any) -> Any:
            if not isinstance(leaf, tuple):
                return leaf
            shape, dtype = leaf
            if dtype.is_floating_point:
                return stage.pixels(shape, dtype)
            return stage.place(torch.zeros(shape, dtype=dtype))

        return loss, tree_unflatten(map(left, self._leaves), self._structure), batch["labels"].detach()

    def _kept(self, loss: torch.Tensor, logits: Any, labels: Any) -> tuple[Any, ...]:
        """What is left of a batch, after metrics got or the containers kept it."""
        loss = loss.repeat(self._request.evaluation)
        self._losses.add(loss)
        if logits is None:
            return loss, None, None
        logits = logits[0] if len(logits) == 1 else logits
        if self._request.preprocess_logits == "argmax":
            logits = (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)
        if not self._request.batch_eval_metrics:
            self._logits.add(logits)
            self._labels.add(labels)
        return loss, logits, labels

    def _goes_to_host(self, number: int) -> bool:
        steps = self._request.eval_accumulation_steps
        return self._request.batch_eval_metrics or bool(steps and number % steps == 0)

    def _to_host(self) -> None:
        """Nothing of what was kept stays on the device (``to_cpu_and_numpy``)."""
        for container in (self._losses, self._logits, self._labels):
            container.tensors = None
