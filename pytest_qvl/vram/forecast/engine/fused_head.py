"""The head that TRL's ``SFTTrainer`` (1.15) puts in place of the model's: log-probabilities without all logits.

It allocates what ``add_fused_lm_head`` (``trl/trainer/utils.py``) and ``ChunkedLogProbFunction``
(``trl/kernels/chunked_logprob.py``) allocate, in their order. Their Triton kernels, which only fill what is there
already, are left out, so that it runs where Triton and TRL are not installed; its values mean nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytest_qvl.models.autocast import autocast_dtype
from pytest_qvl.samples.batch import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_qvl.models.anatomy import Parts

# ``TOKEN_CHUNK_SIZE`` and ``_CHUNKED_LOGPROB_CHUNK_SIZE``: tokens and vocabulary of one tile of logits.
TOKENS, VOCABULARY = 4096, 32768


class FusedHead:
    """In place of ``model.forward``.

    Args:
        parts: The model.
        entered: Called before the head begins.

    Raises:
        ValueError: The head has an adapter, which ``SFTTrainer`` refuses, or is trained itself, which is not followed.
    """

    def __init__(self, parts: Parts, entered: Callable[[], None]) -> None:
        head: Any = parts.lm_head
        if hasattr(head, "lora_A"):
            raise ValueError(
                "lora_targets reaches lm_head and trainer is 'trl': SFTTrainer refuses it, as its fused head reads the "
                "weight directly and the adapter would never be trained; name other targets"
            )
        if head.weight.requires_grad:
            raise ValueError(
                "lm_head is trained itself and trainer is 'trl', whose fused head's gradient of its weight is not "
                "followed: leave lm_head out of modules_to_save, or use trainer='hf'"
            )
        self._parts = parts
        self._entered = entered

    def forward(self, *args: Any, labels: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Each token's log-probability, entropy and whether it was the likeliest, and where there are labels.

        All of shape (batch, sequence - 1).
        """
        backbone_outputs = self._parts.core(*args, **kwargs)
        self._entered()
        hidden, labels = backbone_outputs.last_hidden_state[:, :-1], labels[:, 1:]
        mask = labels != IGNORED
        head: Any = self._parts.lm_head
        per_token = _ChunkedLogProbs.apply(hidden[mask], head.weight, labels[mask])  # type: ignore[no-untyped-call]
        log_probs, entropy, is_top1 = (x.new_zeros(mask.shape).masked_scatter(mask, x) for x in per_token)
        return {"log_probs": log_probs, "entropy": entropy, "is_top1": is_top1, "label_mask": mask}


class _ChunkedLogProbs(torch.autograd.Function):
    """Log-probabilities of (n, width) hidden states by a frozen head of (vocabulary, width)."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Any:
        """Tiles of logits, one in the place of the other, and seven statistics of each token in fp32."""
        ctx.set_materialize_grads(False)
        ctx.compute_dtype = autocast_dtype(hidden.device.type) or hidden.dtype
        statistics = [hidden.new_zeros((hidden.shape[0],), dtype=torch.float32) for _ in range(7)]
        running_max, sum_exp, x_sum_exp, before_target, target = statistics[:5]
        buffer = _tiles(hidden, weight, ctx.compute_dtype)
        log_z = running_max + torch.log(sum_exp)
        log_probs = target - log_z
        entropy = log_z - x_sum_exp / sum_exp
        is_top1 = (target >= running_max) & (target > before_target)
        ctx.save_for_backward(hidden, weight, targets, log_z, entropy)
        ctx.mark_non_differentiable(is_top1)
        del buffer  # until here, as in TRL
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, grad_log_probs: torch.Tensor, *_: Any) -> Any:
        """The tiles again, and the gradient of the hidden states in fp32, then in their dtype."""
        hidden, weight = ctx.saved_tensors[:2]
        gradient = hidden.new_zeros(hidden.shape, dtype=torch.float32)
        grad_log_probs = grad_log_probs.float().contiguous()
        buffer = _tiles(hidden, weight, ctx.compute_dtype)
        gradient = gradient.to(hidden.dtype)
        del buffer  # until here, as in TRL
        return gradient, None, None


def _tiles(hidden: Any, weight: Any, dtype: torch.dtype) -> Any:
    """Every product of some tokens with a part of the vocabulary, into one buffer."""
    buffer = hidden.new_empty((min(hidden.shape[0], TOKENS), VOCABULARY), dtype=dtype)
    for rows in hidden.split(TOKENS):
        rows_in_dtype = rows.to(dtype)
        for part in weight.split(VOCABULARY):
            torch.mm(rows_in_dtype, part.to(dtype).t(), out=buffer[: rows.shape[0], : part.shape[0]])
    return buffer
