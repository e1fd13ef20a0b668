"""What is judged at a step beside gradients and weights: loss, learning rate, optimizer, loss scale, memory, vision."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.wording import some, tally
from pytest_qvl.evidence import CannotJudge, Evidence, Judge
from pytest_qvl.training.movement import no_path_hint
from pytest_qvl.vram.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from pytest_qvl.training.subject import Subject


def all_finite(losses: Sequence[torch.Tensor]) -> bool:
    """Whether every one of these losses is a finite number."""
    return all(math.isfinite(float(loss)) for loss in losses)


def losses_finite(losses: Sequence[torch.Tensor]) -> Evidence:
    """Hold the loss of every micro-batch since the last look to be a finite number.

    ``TrainingArguments.logging_nan_inf_filter`` (on unless switched off) keeps a NaN out of the log.

    Raises:
        CheckFailed: Says how many are not, and the first of them.
        CannotJudge: The model computed no loss.
    """
    import torch

    if not losses:
        raise CannotJudge("the model returns no loss (a loss function of the trainer's own, or label smoothing)")
    values = torch.stack([loss.detach().float().reshape(()).to(losses[0].device) for loss in losses]).tolist()
    judge = Judge("loss", "every loss is a finite number")
    wild = [value for value in values if not math.isfinite(value)]
    judge.equal(
        "losses not finite",
        len(wild),
        0,
        else_say=f"{len(wild)} of {len(values)} losses are not finite, first {wild[0] if wild else 0}: a batch without "
        "a supervised token, an overflow in float16, or weights that are NaN already",
    )
    judge.report("last loss", values[-1], "nat")
    return judge.verdict()


def loss_has_path(subject: Subject) -> Evidence:
    """Hold the loss of a training forward to lead back to some parameter; else its backward pass raises.

    Raises:
        CheckFailed: It leads nowhere.
    """
    judge = Judge("gradients", "the loss leads back to the adapter")
    trained = subject.trained
    judge.problem(
        f"the loss has no path to any of the {len(trained)} trained tensors, so that a backward pass has nothing to do"
        f"{no_path_hint(subject)}"
    )
    return judge.verdict()


def learning_rates(subject: Subject, step: int, *, first: bool) -> Evidence:
    """Hold every parameter group to a learning rate above 0 at this step.

    But for the first of a run: a warm-up begins at 0, and a run that resumes one which was over takes a step with the
    rate of that one's end (``optimizer.pt`` keeps it).

    Args:
        subject: What is trained.
        step: The step that is about to be taken, counted from 1.
        first: Whether it is the first of this run.

    Raises:
        CheckFailed: Says how many groups stand still.
        CannotJudge: The optimizer has no rates.
    """
    rates = subject.group_rates()
    judge = Judge("learning_rate", "a step is taken with a learning rate above 0")
    still = [rate for rate in rates if not (rate > 0 or (rate == 0 and first))]
    judge.equal(
        "parameter groups at a learning rate of 0",
        len(still),
        0,
        else_say=f"step {step} is taken with a learning rate of {still[0] if still else 0:g} in {len(still)} of "
        f"{len(rates)} parameter groups, which moves nothing: look at learning_rate, the schedule, and the number of "
        "steps that it was made for",
    )
    judge.report("largest learning rate", max(rates))
    return judge.verdict()


def optimizer_holds(subject: Subject) -> Evidence:
    """Hold the optimizer to hold exactly what is trained, by identity, each tensor once.

    Raises:
        CheckFailed: It misses some, or holds others.
        CannotJudge: There is no optimizer to look into.
    """
    if not subject.groups:
        raise CannotJudge("the optimizer has no parameter groups to look into")
    judge = Judge("optimizer", "the optimizer holds exactly what is trained")
    held = Counter(id(parameter) for group in subject.groups for parameter in group["params"])
    trained = subject.trained
    missing = [name for name, parameter in trained.items() if id(parameter) not in held]
    others = {id(p): name for name, p in subject.base.items() if id(p) in held}
    unknown = held.keys() - {id(p) for p in subject.allowed.values()} - others.keys()
    twice = [name for name, parameter in trained.items() if held[id(parameter)] > 1]
    judge.every(
        "trained tensors that the optimizer holds",
        trained,
        missing,
        else_say=lambda off: (
            f"the optimizer does not hold {off} trained tensors ({some(missing)}), which then never move: was it made "
            "before the adapter was attached, or from another copy of the model?"
        ),
    )
    judge.equal(
        "other tensors in the optimizer",
        len(others) + len(unknown),
        0,
        else_say=f"the optimizer holds {len(others)} tensors of the base "
        f"({tally(map(subject.parts.group_of, others.values()))}: {some(list(others.values()))}) and {len(unknown)} "
        "that are not in the model: hand it the adapter's parameters alone",
    )
    if twice:
        judge.problem(f"the optimizer holds {len(twice)} tensors more than once, so it moves them twice: {some(twice)}")
    return judge.verdict()


def was_skipped(optimizer: Any, scale: float) -> bool:
    """Whether a float16 loss scaler has kept an optimizer from its step.

    Accelerate's ``step_was_skipped`` is whether the optimizer's ``step`` was not called; a fused AdamW, the default of
    Transformers 5, is called always and skips in its kernel (``_step_supports_amp_scaling``). The scale tells both:
    ``torch.amp.GradScaler`` makes it smaller exactly when a step was skipped.

    Args:
        optimizer: As Accelerate wraps it, with its scaler, after the step.
        scale: The scaler's before it.
    """
    return bool(optimizer.step_was_skipped) or float(optimizer.scaler.get_scale()) < scale


def scaler_steps(optimizer: Any, skipped: int) -> Evidence:
    """Hold a float16 loss scaler to take steps once its scale has come down to 1.

    ``torch.amp.GradScaler`` begins at 65,536 and halves with every step that it skips: gradients that overflow at a
    scale of 1 and below do so by themselves, and no further halving is a matter of finding the scale.

    Args:
        optimizer: As Accelerate wraps it, with its scaler.
        skipped: Steps skipped one after the other.

    Raises:
        CheckFailed: Every step is skipped.
    """
    judge = Judge("loss_scaler", "the loss scaler lets steps happen")
    scale = float(optimizer.scaler.get_scale())
    judge.report("steps skipped one after the other", skipped)
    judge.at_least(
        "loss scale",
        scale,
        1.0,
        else_say=f"the float16 loss scaler has skipped {skipped} steps one after the other and its scale is down to "
        f"{scale:g}: the gradients themselves overflow or are NaN, and nothing is trained; train in bfloat16, or find "
        "the layer that overflows (pytest --pyargs pytest_qvl.suite -k vision_stability)",
    )
    return judge.verdict()


def vision_spared(calls: int, followed: int, hooks: Sequence[str], pixels_require_grad: bool) -> Evidence:
    """Hold autograd not to follow the frozen vision tower in the training's own forwards.

    Args:
        calls: Calls of the vision tower.
        followed: Those whose output requires grad.
        hooks: Names of the forward hooks on the patch embedding.
        pixels_require_grad: Whether ``pixel_values`` themselves do.

    Raises:
        CheckFailed: It is walked back through for gradients that train nothing.
        CannotJudge: The tower was not called.
    """
    if not calls:
        raise CannotJudge("no batch had images so far, so the vision tower did not run")
    judge = Judge("vision_not_backpropagated", "training spares the frozen vision tower")
    why = ""
    if pixels_require_grad:
        why = " because pixel_values do"
    elif hooks:
        why = (
            f"; forward hooks on the patch embedding: {tally(hooks)}, registered by gradient_checkpointing_enable "
            'or prepare_model_for_kbit_training; Guard(vision_gradients="spare") removes them when training begins'
        )
    judge.equal(
        "vision tower calls that autograd follows",
        followed,
        0,
        else_say=f"the frozen vision tower is back-propagated through: its output requires grad{why}. The adapter "
        "learns the same, and on Qwen2.5-VL-7B steps take 1.7 to 2.8 times as long",
    )
    return judge.verdict()


def peak_memory(limit: int, device: torch.device) -> Evidence:
    """Hold the largest memory that torch has had allocated since the training began to a limit.

    Raises:
        CheckFailed: It is above.
        CannotJudge: No CUDA.
    """
    import torch

    if device.type != "cuda":
        raise CannotJudge(f"the model is on {device.type}; peaks are read from torch's CUDA allocator")
    judge = Judge("peak_vram", "the training stays below its limit of memory")
    peak = torch.cuda.max_memory_allocated(device)
    judge.at_most(
        "peak allocated",
        peak,
        limit,
        unit="bytes",
        else_say=f"the training has had {format_bytes(peak)} allocated where {format_bytes(limit)} are allowed: "
        "smaller batches or images, gradient checkpointing, or see pytest-qvl forecast",
    )
    return judge.verdict()
