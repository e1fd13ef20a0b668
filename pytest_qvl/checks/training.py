"""The training step: gradients reach the adapter, all of it and nothing else, and it learns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.descent import Lesson, descent, take_step
from pytest_qvl.checks.support.lora import SINGULAR_VALUES, layer_of, matrix_of, zero_initialised_matrices
from pytest_qvl.checks.support.not_finite import origin_of_not_finite
from pytest_qvl.checks.support.teaching import (
    adamw,
    check_labels,
    forward,
    reentrant_hint,
    trainable_parameters,
    with_wrong_labels,
)
from pytest_qvl.checks.support.unpacked_weights import require_unpacked_weights
from pytest_qvl.checks.support.user_optimizer import judge_optimizer
from pytest_qvl.checks.support.wording import some, tally
from pytest_qvl.evidence import Evidence, InputError, Judge
from pytest_qvl.models.adapters import adapter_parameters, orthogonality_penalty_off
from pytest_qvl.models.anatomy import Parts, anatomy
from pytest_qvl.models.policy import AdapterPolicy
from pytest_qvl.models.state import preserved
from pytest_qvl.models.training import (
    FIRST_FLOAT16_SCALE,
    backward,
    checkpointing,
    computes_in_float16,
    layer_gains,
    loss_floor,
    trained_copies,
    trained_on_purpose,
    weights_restored,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from pytest_qvl.checks.support.teaching import Batch, MakeOptimizer

FIRST_LOSS = 1.0  # nat per token, at least: with_wrong_labels makes it ln 3 = 1.0986 or above
_MOVE_PER_STEP = 0.2
_SEED = 20_311


@check(promise=10, needs=("time",))
def training_step(
    model: Any,
    batch: Batch,
    *,
    gradient_checkpointing: bool,
    steps_to_halve: int = 40,
    learning_rate: float | None = None,
    make_optimizer: MakeOptimizer | None = None,
    policy: AdapterPolicy | None = None,
) -> Evidence:
    """Prove that a training step reaches every adapter tensor and nothing else, and that the adapter learns.

    Starts from B = 0 (the adapter's own B is set aside; of AdaLoRA's B E A, E is what is zero), in train mode, with an
    AdamW of its own, on deliberately wrong answers. AdaLoRA's penalty (``orth_reg_weight``) is left out, so that
    gradients and loss tell of the answers alone. All trained weights are put back bitwise.

    ============================ ================================================== ==================================
    judged                       limit                                              derived in
    ============================ ================================================== ==================================
    first backward               finite; every B not zero, every A exactly zero     A's is multiplied by B
    second backward              finite; no A and no B without a gradient
    anything else                no gradient; nothing trained in float16
    loss at first                1 nat per token at least                           docs/limits.md#learning
    loss in `steps_to_halve`     half of the way to what the frozen head allows     docs/limits.md#learning
    same, adapter too small      falls as its gradient promises (a note says so)    docs/limits.md#first-order-descent
    your optimizer               moves every tensor, downhill, at any learning rate docs/limits.md#first-order-descent
    ============================ ================================================== ==================================

    With float16 compute the loss is scaled as ``torch.amp.GradScaler`` does.

    Args:
        model: The model wrapped by PEFT, its adapter trainable.
        batch: Model inputs with ``labels`` and ``pixel_values``.
        gradient_checkpointing: Train with it or without. A model that already checkpoints keeps its own kind
            (reentrant or not); otherwise it is switched on without reentry.
        steps_to_halve: Optimizer steps within which the loss must halve, at least 2.
        learning_rate: Of the check's own AdamW, at which the loss must then halve; derived for each layer if not given.
        make_optimizer: Makes your own optimizer from the list of trainable parameters.
        policy: Parts whose own weights may be trained beside the adapter; none if not given.

    Raises:
        CheckFailed: Names the parameter without a path, the gradient that is not finite, the loss that
            stays, or what your optimizer leaves out, leaves where it is or moves uphill.
        CannotJudge: No images, or weights repacked for the CPU.
        ValueError: No adapter, nothing trainable, no labels, or fewer than two steps.
    """
    import torch

    parts = anatomy(model)
    if steps_to_halve < 2:
        raise InputError(f"steps_to_halve must be at least 2, got {steps_to_halve}")
    trained = trainable_parameters(parts)
    check_labels(parts, [batch])
    require_unpacked_weights(parts)
    how = "with" if gradient_checkpointing else "without"
    judge = Judge("training_step", f"a training step {how} gradient checkpointing teaches the adapter")
    _judge_trained(judge, parts, trained, policy or AdapterPolicy())
    own = adamw(learning_rate) if learning_rate is not None else _derived_adamw(parts, trained)
    with (
        preserved(model, seed=_SEED),
        weights_restored(trained.values()),
        checkpointing(parts, gradient_checkpointing),
        orthogonality_penalty_off(parts),
    ):
        with torch.no_grad():
            for gate in zero_initialised_matrices(trained).values():
                gate.zero_()
        wrong = with_wrong_labels(parts, batch)
        parts.wrapped.train()
        lesson = Lesson(
            parts, wrong, list(trained.values()), FIRST_FLOAT16_SCALE if computes_in_float16(parts) else 1.0, _SEED
        )
        with weights_restored(trained.values()):
            course = _learn(judge, lesson, trained, own, steps_to_halve)
        if judge.problems:
            judge.note("learning was not judged, because the gradients are not right")
        else:
            _judge_learning(judge, lesson, course, own, derived=learning_rate is None)
        if make_optimizer is not None and not judge.problems:
            take_step(lesson, own(list(lesson.weights)))
            judge_optimizer(judge, lesson, trained, make_optimizer)
    if course.scale != 1:
        judge.report("loss scale", course.scale)
    return judge.verdict()


def _derived_adamw(parts: Parts, trained: Mapping[str, nn.Parameter]) -> MakeOptimizer:
    """AdamW at the rate of each adapted layer that moves its output by its share; the smallest for all else."""
    share = _MOVE_PER_STEP / parts.text_config.num_hidden_layers
    # The embeddings are the stream where it begins, so their share of it is the whole.
    rates = {
        layer: (_MOVE_PER_STEP if parts.group_of(layer) == "embeddings" else share) / gain
        for layer, gain in layer_gains(parts).items()
    }
    slowest = min(rates.values(), default=share)
    return adamw([rates.get(layer_of(name), slowest) for name in trained])


@dataclass(frozen=True)
class _Course:
    """How the learning went.

    Attributes:
        losses: Of each step, the last without a step after it, in nats.
        allowed: Optimizer steps that it was given.
        goal: The loss that counts as learned.
        floor: The smallest loss that the frozen head allows.
        scale: Loss scale at the end.
        rates: Smallest and largest learning rate.
    """

    losses: list[float]
    allowed: int
    goal: float
    floor: float
    scale: float
    rates: tuple[float, float]


def _learn(
    judge: Judge, lesson: Lesson, trained: Mapping[str, nn.Parameter], own: MakeOptimizer, steps: int
) -> _Course:
    """Step until the loss has halved, the gradients turn out wrong or the steps are used up."""
    parts, weights, scale = lesson.parts, list(lesson.weights), lesson.scale
    floor = loss_floor(parts, int(lesson.batch["labels"].max()))
    optimizer = own(weights)
    losses: list[float] = []
    goal = 0.0
    for step in range(steps + 1):
        loss, scale = backward(lambda: forward(parts, lesson.batch).loss, weights, scale=scale)
        losses.append(loss)
        goal = floor + (losses[0] - floor) / 2
        if not step and not _judge_loss(judge, lesson, loss):
            break
        if step < 2:
            _judge_gradients(judge, trained, step, reentrant_hint(parts))
        if step and (judge.problems or not math.isfinite(loss) or loss <= goal):
            break
        optimizer.step()
    rates = [group["lr"] for group in optimizer.param_groups]
    return _Course(losses, steps, goal, floor, scale, (min(rates), max(rates)))


def _judge_loss(judge: Judge, lesson: Lesson, loss: float) -> bool:
    """Whether the first loss is finite; if not, that is the problem, and gradients tell nothing more."""
    finite = math.isfinite(loss)
    origin = "" if finite else origin_of_not_finite(lesson.parts, lambda: forward(lesson.parts, lesson.batch))
    said = f"the first loss is {loss}{origin}"
    return judge.equal("losses not finite", 0 if finite else 1, 0, else_say=said)


def _judge_trained(judge: Judge, parts: Parts, trained: Mapping[str, nn.Parameter], policy: AdapterPolicy) -> None:
    import torch

    allowed = {**adapter_parameters(parts), **trained_copies(parts), **trained_on_purpose(parts, policy)}
    own = {id(parameter) for parameter in allowed.values()}
    stray = [name for name, parameter in trained.items() if id(parameter) not in own]
    judge.equal(
        "other tensors that are trained",
        len(stray),
        0,
        else_say=(
            f"{len(stray)} tensors that are not the adapter's take gradients, in "
            f"{tally(map(parts.group_of, stray))}: {some(stray)}"
        ),
    )
    half = [name for name, parameter in trained.items() if parameter.dtype == torch.float16]
    judge.equal(
        "trained tensors in float16",
        len(half),
        0,
        else_say=(
            f"{len(half)} of {len(trained)} trained tensors are float16: {some(half)}; there AdamW's epsilon "
            "of 1e-8 is zero, and torch.amp.GradScaler refuses their gradients: train them in float32"
        ),
    )


def _judge_gradients(judge: Judge, trained: Mapping[str, nn.Parameter], step: int, hint: str) -> None:
    """Hold the gradients of the first two steps to what reaches which matrix while one of them is zero."""
    import torch

    peaks: dict[str, float | None] = dict.fromkeys(trained)
    with_grad = {name: p.grad for name, p in trained.items() if p.grad is not None and p.grad.numel()}
    if with_grad:
        values = torch.stack([grad.abs().amax().float() for grad in with_grad.values()]).tolist()
        peaks |= dict(zip(with_grad, values, strict=True))
    starts_at_zero = zero_initialised_matrices(trained)
    by_values = any(matrix_of(name) == SINGULAR_VALUES for name in starts_at_zero)
    only_a = bool(starts_at_zero) and all(matrix_of(name) == "lora_A" for name in starts_at_zero)
    zero, others = ("E", "A and B") if by_values else ("A", "B") if only_a else ("B", "A")
    when = (f"first step ({zero} = 0)", "second step")[step]
    wild = [name for name, peak in peaks.items() if peak is not None and not math.isfinite(peak)]
    judge.equal(
        f"{when}: gradients not finite",
        len(wild),
        0,
        else_say=f"{when}: {len(wild)} of {len(peaks)} gradients are not finite, first {some(wild)}",
    )
    lora = [name for name in peaks if matrix_of(name)]
    # A times B: while B is zero, nothing but B itself (and DoRA's magnitude) can have a gradient; with AdaLoRA E.
    silent = [name for name in lora if step == 0 and name not in starts_at_zero and _is_matrix(name)]
    expected = [name for name in lora if name not in silent]
    unreached = [name for name in expected if not peaks[name]]
    copies = [name for name in peaks if name not in lora]
    cut_off = [name for name in copies if peaks[name] is None]
    if copies:
        judge.every(
            f"{when}: tensors trained beside LoRA that are reached",
            copies,
            cut_off,
            else_say=lambda off: (
                f"{when}: the gradient has no path to {off} tensors that are trained beside LoRA: {some(cut_off)}; is "
                "the output of their module detached (torch.no_grad, detach) on its way?"
            ),
        )
    pathless = [name for name in unreached if peaks[name] is None]
    kind = "has no path to" if pathless else "is exactly zero at"
    named = pathless or unreached
    judge.every(
        f"{when}: adapter tensors reached",
        expected,
        unreached,
        else_say=lambda _: (
            f"{when}: the gradient {kind} {len(named)} of {len(expected)} adapter tensors: {some(named)}{hint}"
        ),
    )
    if step == 0:
        loud = [name for name in silent if peaks[name]]
        judge.equal(
            f"{when}: {others} matrices with a gradient",
            len(loud),
            0,
            else_say=(
                f"{when}: {len(loud)} {others} matrices have a gradient although it is multiplied by {zero} = 0, first "
                f"{some(loud)}: the forward does not compute {'B E A x' if by_values else 'B A x'}"
            ),
        )
        judge.report(f"largest gradient at {zero} = 0", max((p for p in peaks.values() if p is not None), default=0.0))


def _is_matrix(name: str) -> bool:
    return matrix_of(name) in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


def _judge_learning(judge: Judge, lesson: Lesson, course: _Course, own: MakeOptimizer, *, derived: bool) -> None:
    losses = course.losses
    judge.at_least(
        "loss on wrong answers at first",
        losses[0],
        FIRST_LOSS,
        unit="nat",
        else_say="the loss on answers that the model finds wrong does not begin at 1 nat per token or above",
    )
    smallest = min(losses, key=lambda loss: math.inf if math.isnan(loss) else loss)
    low, high = (f"{rate:.3g}" for rate in course.rates)
    story = (
        f"the loss did not halve in {len(losses) - 1} optimizer steps at learning rate "
        f"{low if low == high else f'{low} to {high}'}: it went "
        f"{', '.join(f'{loss:.3g}' for loss in losses[:5])} ... {losses[-1]:.3g}"
    )
    judge.report("optimizer steps taken", len(losses) - 1)
    if course.floor:
        judge.report("smallest loss that the frozen head allows", course.floor, "nat")
    name = f"smallest loss within {course.allowed} steps"
    if smallest > course.goal and smallest < losses[0] and derived:
        found = descent(lesson, take_step(lesson, own(list(lesson.weights))))
        if found.agrees:
            judge.report(name, smallest, "nat")
            judge.note(
                f"{story}; it falls as its gradient promises ({found.promised:+.3g} nat to first order, "
                f"{found.seen:+.3g} nat seen), so this adapter is right and cannot teach more by itself in that time"
            )
            return
        story += (
            f"; to first order the gradient promises {found.promised:+.3g} nat where {found.seen:+.3g} nat are seen"
        )
    judge.at_most(name, smallest, course.goal, unit="nat", else_say=story)
