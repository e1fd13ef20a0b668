"""A user's own optimizer, judged by its direction and not by its speed."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.descent import descent, take_step
from pytest_qvl.checks.support.lora import RANK_COUNT
from pytest_qvl.checks.support.teaching import optimizer_of
from pytest_qvl.checks.support.wording import some, tally
from pytest_qvl.models.quantized import dtype_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence, Sized

    from torch import nn

    from pytest_qvl.checks.support.descent import Lesson, Move
    from pytest_qvl.checks.support.teaching import MakeOptimizer
    from pytest_qvl.evidence import Judge


def too_small_steps(parameters: Mapping[str, nn.Parameter], optimizer: Any) -> list[str]:
    """Names of the tensors of which float32 keeps no plain gradient step at the optimizer's learning rate.

    Such a tensor stands still although its gradient is right and the optimizer holds it: A matrices under plain SGD at
    1e-6, while B is near zero. Of float32 only: in 16 bits a training stands still with it, which is worth a finding.
    Adaptive optimizers step further than that, so of them a tensor that is named here may have been left out as well.

    Args:
        parameters: Tensors by name, their gradient in ``.grad``.
        optimizer: What should move them.
    """
    import torch

    rates = {id(p): float(group.get("lr") or 0.0) for group in optimizer.param_groups for p in group["params"]}
    small = []
    for name, parameter in parameters.items():
        rate, grad, value = rates.get(id(parameter), 0.0), parameter.grad, parameter.detach()
        if value.dtype == torch.float32 and rate > 0 and grad is not None and bool(grad.any()):
            small.extend([name] if torch.equal(value - rate * grad, value) else [])
    return small


def note_too_small(judge: Judge, small: Sequence[str], of: Sized) -> None:
    """Say which tensors stand still and have gradients so small that float32 keeps no plain step along them."""
    if small:
        judge.note(
            f"{len(small)} of {len(of)} tensors stand still under your optimizer, because float32 keeps no step as "
            f"small as its learning rate times their gradient: {some(small)}"
        )


def judge_optimizer(
    judge: Judge, lesson: Lesson, trained: Mapping[str, nn.Parameter], make_optimizer: MakeOptimizer
) -> None:
    """Hold one real step of a user's optimizer to what any optimizer owes, at any learning rate.

    It holds every trained tensor; its learning rates are above 0; a step moves every tensor that has a gradient
    and leaves it finite; each tensor moves downhill, ``<gradient, move> < 0``, and along the move the loss falls
    as promised. Why that holds for every usual rule is derived in docs/limits.md#first-order-descent. Weight decay is
    switched off for the step. An optimizer may spend its first step on setting itself up, so a second one is allowed
    where nothing moved.

    Args:
        judge: Takes figures and problems.
        lesson: At weights where every trained tensor has a gradient.
        trained: The trained tensors by name, in the order of ``lesson.weights``.
        make_optimizer: The user's.
    """
    optimizer = optimizer_of(make_optimizer, list(lesson.weights))
    _judge_held(judge, trained, optimizer)
    _judge_rates(judge, optimizer)
    with _without_decay(optimizer):
        move = take_step(lesson, optimizer)
        if not any(_moved(move)):
            move = take_step(lesson, optimizer)
    _judge_moves(judge, trained, move, optimizer)
    if judge.problems:
        return
    found = descent(lesson, move)
    judge.equal(
        "the loss falls along your optimizer's step",
        found.agrees,
        True,
        else_say=(
            "the loss does not fall along your optimizer's step as its gradient promises: "
            f"{found.promised:+.3g} nat to first order, {found.seen:+.3g} nat seen"
        ),
    )


def _judge_held(judge: Judge, trained: Mapping[str, nn.Parameter], optimizer: Any) -> None:
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    own = {id(parameter) for parameter in trained.values()}
    missing = [name for name, parameter in trained.items() if id(parameter) not in held]
    others = sum(key not in own for key in held)
    where = f"; it holds {others} tensors that are not trained here: was it made for another model?" if others else ""
    judge.every(
        "trained tensors that your optimizer holds",
        trained,
        missing,
        else_say=lambda off: f"your optimizer does not hold {off} trained tensors: {some(missing)}{where}",
    )
    twice = len(held) - len(set(held))
    if twice:
        judge.problem(f"your optimizer holds {twice} tensors more than once, so it moves them twice per step")


def _judge_rates(judge: Judge, optimizer: Any) -> None:
    """Adafactor may go without a rate (``None``); any rate that there is must be above 0."""
    rates = [float(group["lr"]) for group in optimizer.param_groups if group.get("lr") is not None]
    still = [rate for rate in rates if not rate > 0]
    judge.equal(
        "learning rates of your optimizer at 0 or below",
        len(still),
        0,
        else_say=(
            f"{len(still)} of {len(rates)} parameter groups of your optimizer have the learning rate "
            f"{', '.join(f'{rate:g}' for rate in still[:1])}: a warm-up schedule that is attached when the optimizer "
            "is made sets it to 0; hand the optimizer over without one"
        ),
    )
    if rates:
        judge.report("largest learning rate of your optimizer", max(rates))


@contextmanager
def _without_decay(optimizer: Any) -> Iterator[None]:
    groups = [group for group in optimizer.param_groups if "weight_decay" in group]
    before = [group["weight_decay"] for group in groups]
    for group in groups:
        group["weight_decay"] = 0.0
    try:
        yield
    finally:
        for group, value in zip(groups, before, strict=True):
            group["weight_decay"] = value


def _moved(move: Move) -> list[bool]:
    import torch

    return [not torch.equal(before, after) for before, after in zip(move.before, move.after, strict=True)]


def too_small_to_see(parameters: Mapping[str, nn.Parameter], optimizer: Any) -> list[str]:
    """Names of the tensors in which float32 keeps no step of the optimizer's learning rate along the gradient.

    At such a rate (plain SGD at 1e-6) a tensor stands still although its gradient is right and the optimizer holds it.
    Only of float32: in 16 bits training stands still as well, which is worth a finding.

    Args:
        parameters: Tensors by name, their gradient in ``.grad``.
        optimizer: The optimizer that should move them.
    """
    import torch

    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"] if group.get("lr")}
    asked = {name: p for name, p in parameters.items() if id(p) in rates and p.grad is not None and bool(p.grad.any())}
    return [
        name
        for name, p in asked.items()
        if p.dtype == torch.float32 and torch.equal(p.detach() - rates[id(p)] * p.grad, p.detach())
    ]


def _judge_moves(judge: Judge, trained: Mapping[str, nn.Parameter], move: Move, optimizer: Any) -> None:
    import torch

    moved = dict(zip(trained, _moved(move), strict=True))
    steep = [
        name
        for name, grad in zip(trained, move.grads, strict=True)
        if grad is not None and bool(grad.any()) and RANK_COUNT not in name.split(".")
    ]
    still = [name for name in steep if not moved[name]]
    if len(still) < len(steep):  # an optimizer that moves nothing at all trains nothing, whatever the reason
        small = too_small_steps({name: trained[name] for name in still}, optimizer)
        note_too_small(judge, small, steep)
        still, steep = ([name for name in names if name not in small] for names in (still, steep))
    dtypes = tally(dtype_name(trained[name].dtype) for name in still)
    judge.every(
        "tensors that your optimizer's step moves",
        steep,
        still,
        else_say=lambda off: (
            f"your optimizer's step does not move {off} tensors that have a gradient: {some(still)}; it does "
            f"not hold them, its learning rate is 0 there, or the step is below the resolution of {dtypes}"
        ),
    )
    wild = [name for name, after in zip(trained, move.after, strict=True) if not bool(torch.isfinite(after).all())]
    judge.equal(
        "tensors that your optimizer's step leaves not finite",
        len(wild),
        0,
        else_say=f"your optimizer's step leaves {len(wild)} of {len(trained)} tensors not finite: {some(wild)}",
    )
    slopes = dict(zip(trained, move.slopes(), strict=True))
    uphill = [name for name in steep if moved[name] and name not in wild and not slopes[name] < 0]
    judge.equal(
        "tensors that your optimizer moves uphill",
        len(uphill),
        0,
        else_say=(
            f"your optimizer moves {len(uphill)} of {len(steep)} tensors uphill, along their gradient and not "
            f"against it (maximize=True, or a loss with the wrong sign?): {some(uphill)}"
        ),
    )
