"""Teaching an adapter something for a moment: what to train, with which optimizer, on which answers."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.placeholders import validate_batch
from pytest_qvl.evidence import CannotJudge, InputError, InputTypeError
from pytest_qvl.models.adapters import adapter_parameters, is_merged
from pytest_qvl.models.training import is_checkpointing, is_reentrant
from pytest_qvl.samples.batch import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch import nn

    from pytest_qvl.models.anatomy import Parts

    Batch = Mapping[str, torch.Tensor]
    MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

NO_LABELS = (
    "the batch needs labels (rows, length), -100 at what is not to be learned: take them from your collator, "
    "make_batch(..., answers=True) or qvl_batch(samples, answers=True)"
)
WRONG_RANK = 3


def adamw(learning_rate: float | Sequence[float]) -> MakeOptimizer:
    """Makes a ``torch.optim.AdamW`` without weight decay, so that only a gradient can move a weight.

    Args:
        learning_rate: For all parameters, or one for each.
    """
    import torch

    def make(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        if isinstance(learning_rate, float | int):
            return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
        groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters, learning_rate, strict=True)]
        return torch.optim.AdamW(groups, weight_decay=0.0)

    return make


def optimizer_of(make_optimizer: MakeOptimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that a user's function makes.

    Raises:
        InputTypeError: It is no function, or makes no optimizer.
    """
    takes = "make_optimizer (qvl_make_optimizer) is a function from the list of trainable parameters to an optimizer"
    if not callable(make_optimizer):
        raise InputTypeError(f"{takes}, got a value of type {type(make_optimizer).__name__}")
    optimizer = make_optimizer(parameters)
    if not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "step")):
        raise InputTypeError(f"{takes}, and this one returned {_shown(optimizer)}")
    return optimizer


def _shown(value: Any) -> str:
    return "None: is its return missing?" if value is None else f"a value of type {type(value).__name__}"


def text_tokens(parts: Parts, batch: Batch) -> list[int]:
    """The tokens of a batch that stand for text, in order of their ids."""
    return sorted({*batch["input_ids"].flatten().tolist()} - {*parts.vision_token_ids})


def trainable_parameters(parts: Parts) -> dict[str, nn.Parameter]:
    """Everything that an optimizer made the usual way would train, by name in the base model.

    Raises:
        ValueError: The model has no adapter, or nothing of it requires grad, or it is merged into the base weights.
    """
    adapters = adapter_parameters(parts)
    if not adapters:
        raise InputError("the model carries no adapter; wrap it with peft.get_peft_model first")
    if not any(parameter.requires_grad for parameter in adapters.values()):
        raise InputError(
            "no adapter parameter requires grad: the adapter was loaded for inference (is_trainable=False) "
            "or is switched off"
        )
    if is_merged(parts):
        raise InputError(
            "the adapter is merged into the base weights, so that PEFT computes without its matrices and a training "
            "step reaches none of them: call unmerge_adapter() before training"
        )
    return {name: p for name, p in parts.base.named_parameters() if p.requires_grad}


def check_labels(parts: Parts, batches: list[Batch]) -> None:
    """Refuse batches that cannot teach anything about images, or are malformed.

    Raises:
        ValueError: No batch, or one without labels or without a supervised token, or whose pixels and placeholders
            do not fit (:func:`pytest_qvl.checks.support.placeholders.validate_batch`).
        CannotJudge: No batch has images.
    """
    if not batches or any("labels" not in batch for batch in batches):
        raise InputError(f"training is judged on batches with labels: {NO_LABELS}")
    if any(bool((batch["labels"][:, 1:] == IGNORED).all()) for batch in batches):
        raise InputError("a batch has no supervised token: all of its labels are -100")
    if not any("pixel_values" in batch for batch in batches):
        raise CannotJudge("no batch has images (pixel_values), so training would never touch the vision tower")
    problems = [problem for batch in batches for problem in validate_batch(parts.wrapped, batch)]
    if problems:
        raise InputError(f"the batch is malformed: {problems[0]}")


def with_wrong_labels(parts: Parts, batch: Batch) -> dict[str, torch.Tensor]:
    """The batch with one plausible wrong answer for all its labels, so that there is something left to learn.

    Every supervised label is replaced by the same token, so that any model can learn it, also one with random
    weights that cannot yet tell its inputs apart. It is the third likeliest by mean log-probability over all
    supervised places (of the model as it is, in eval mode), right labels left out. Hence the mean loss begins at
    ``ln 3`` nat or above, whatever the model knows: docs/limits.md#learning.

    Args:
        parts: The model; left in eval mode.
        batch: Model inputs with ``labels`` (rows, length) int64.
    """
    import torch

    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    parts.wrapped.eval()
    with torch.no_grad():
        logits = forward(parts, inputs).logits
    labels = batch["labels"].clone()
    rows, places = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    likely = logits[rows, places].float().log_softmax(-1).mean(0)
    likely[labels[rows, places + 1]] = float("-inf")
    labels[rows, places + 1] = likely.topk(WRONG_RANK).indices[-1]
    return {**batch, "labels": labels}


def forward(parts: Parts, batch: Batch) -> Any:
    """One forward without a cache and without positions of an earlier call."""
    parts.core.rope_deltas = None
    with warnings.catch_warnings():
        # Both from torch.utils.checkpoint: a frozen vision tower has no input that requires grad, and should
        # have none; prepare_model_for_kbit_training leaves use_reentrant open.
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True", UserWarning)
        warnings.filterwarnings("ignore", "torch.utils.checkpoint: the use_reentrant parameter", UserWarning)
        return parts.wrapped(**{**batch, "use_cache": False})


def reentrant_hint(parts: Parts) -> str:
    """What reentrant checkpointing has to do with a gradient that has no path, as the end of a sentence; or nothing."""
    if not (is_checkpointing(parts) and is_reentrant(parts)):
        return ""
    return (
        "; reentrant checkpointing drops the gradient where no input requires grad: pass "
        "gradient_checkpointing_kwargs={'use_reentrant': False}, or call model.enable_input_require_grads()"
    )
