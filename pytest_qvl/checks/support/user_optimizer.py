"""A user's own optimizer, judged by its direction and not by its speed."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.descent import descent, take_step
from pytest_qvl.checks.support.lora import RANK_COUNT
from pytest_qvl.checks.support.teaching import optimizer_of
from pytest_qvl.checks.support.wording import some, tally
from pytest_qvl.models.quantized import dtype_name
from pytest_qvl.models.training import weights_restored

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence, Sized

    from torch import nn

    from pytest_qvl.checks.support.descent import Lesson, Move
    from pytest_qvl.checks.support.teaching import MakeOptimizer
    from pytest_qvl.evidence import Judge


def too_small_steps(parameters: Mapping[str, nn.Parameter], optimizer: Any) -> list[str]:
    """Names of the tensors of which float32 keeps no step that the optimizer itself takes along their gradient.

    Such a tensor stands still although its gradient is right and the optimizer steps it: A matrices under plain SGD at
    1e-6, while B is near zero. What the step is, the optimizer shows on zeros in the tensor's place, of which float32
    keeps every step: its first one, without state of earlier ones, as momentum makes later ones larger. Added to the
    tensor it has to change no element. A tensor that the optimizer leaves out stays zero and is not named. Of float32
    only: in 16 bits a training stands still with it, which is worth a finding.

    Args:
        parameters: Tensors by name, their gradient in ``.grad``; like all that the optimizer holds they are put back.
        optimizer: What should move them.
    """
    import torch

    asked = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.dtype == torch.float32 and parameter.grad is not None and bool(parameter.grad.any())
    }
    if not asked:
        return []
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    small = []
    with weights_restored([*held, *asked.values()]), torch.no_grad():
        before = {name: parameter.detach().clone() for name, parameter in asked.items()}
        states = {parameter: optimizer.state.pop(parameter, None) for parameter in asked.values()}
        for parameter in asked.values():
            parameter.zero_()
        optimizer.step()
        for parameter, state in states.items():
            optimizer.state.pop(parameter, None)
            if state is not None:
                optimizer.state[parameter] = state
        for name, parameter in asked.items():
            if bool(parameter.any()) and torch.equal(before[name] + parameter, before[name]):
                small.append(name)
    return small


def note_too_small(judge: Judge, small: Sequence[str], of: Sized) -> None:
    """Say which tensors stand still because float32 keeps no step of the optimizer along their gradients."""
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
