"""Frozen vision: real training steps on images move the adapter and nothing else, bit for bit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.lora import layer_of, matrix_of
from pytest_qvl.checks.support.not_finite import origin_of_not_finite
from pytest_qvl.checks.support.teaching import (
    adamw,
    check_labels,
    forward,
    optimizer_of,
    trainable_parameters,
    with_wrong_labels,
)
from pytest_qvl.checks.support.unpacked_weights import require_unpacked_weights
from pytest_qvl.checks.support.user_optimizer import note_too_small, too_small_steps
from pytest_qvl.checks.support.wording import some, tally
from pytest_qvl.evidence import CannotJudge, Evidence, InputError, Judge
from pytest_qvl.models.adapters import active_adapters, adapter_parameters
from pytest_qvl.models.anatomy import GROUPS, TOWER, Group, Parts, anatomy
from pytest_qvl.models.fingerprint.digests import Fingerprint, digests
from pytest_qvl.models.policy import AdapterPolicy
from pytest_qvl.models.quantized import base_tensors, dtype_name
from pytest_qvl.models.state import preserved
from pytest_qvl.models.taps import tapped
from pytest_qvl.models.training import (
    FIRST_FLOAT16_SCALE,
    backward,
    computes_in_float16,
    trained_copies,
    trained_on_purpose,
    weights_restored,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pytest_qvl.checks.support.teaching import Batch, MakeOptimizer

_SEED = 20_311


@check(promise=4, needs=("time",))
def frozen_vision(
    model: Any,
    batches: Batch | Sequence[Batch],
    *,
    steps: int = 2,
    learning_rate: float = 1e-3,
    make_optimizer: MakeOptimizer | None = None,
    policy: AdapterPolicy | None = None,
) -> Evidence:
    """Prove that training on images leaves the vision tower and the rest of the base bitwise as it was.

    Takes real optimizer steps in train mode on everything that requires grad, then compares, with no tolerance anywhere
    (docs/limits.md#frozen-vision, which also derives the defaults):

    - every tensor of the base model (parameters, buffers, and of each 4-bit weight packed data, absmax, code book,
      offset and the statistics of double quantization, base layers under adapters included), by position-sensitive
      64-bit digests, so that no second copy of the model is needed;
    - the visual tokens of each batch, bitwise, in eval mode;
    - every trainable adapter tensor, which must have moved.

    Labels are replaced by wrong answers. Weights are put back bitwise afterwards; what changed outside the trained
    tensors cannot be, and the model is then to be loaded again.

    Args:
        model: The model wrapped by PEFT, its adapter trainable, checkpointing as the user has it.
        batches: Model inputs with ``labels``, at least one with ``pixel_values``; used in turn.
        steps: Optimizer steps, at least 2.
        learning_rate: For the default optimizer.
        make_optimizer: Makes another optimizer from the list of trainable parameters.
        policy: Parts that are adapted or trained on purpose; the text side only if not given. Weights that it
            allows to be trained may move, and so may the visual tokens where vision tower or merger are adapted;
            everything else is held to every bit as before.

    Raises:
        CheckFailed: Names the tensors that moved and should not have, or the reverse.
        CannotJudge: No images, repacked weights, a loss that is not finite, or a vision tower whose kernels do not
            repeat themselves.
        ValueError: No adapter, nothing trainable, no labels, or fewer than two steps.
    """
    parts = anatomy(model)
    given = [batches] if isinstance(batches, Mapping) else list(batches)
    if steps < 2:
        raise InputError(f"steps must be at least 2, got {steps}: with B = 0 the first step leaves A where it is")
    trained = trainable_parameters(parts)
    check_labels(parts, given)
    require_unpacked_weights(parts)
    policy = policy or AdapterPolicy()
    adapters = {**adapter_parameters(parts), **trained_copies(parts), **trained_on_purpose(parts, policy)}
    judge = Judge("frozen_vision", "training moves the adapter and nothing else")
    with preserved(model, seed=_SEED), weights_restored(trained.values()):
        base, adapter = Fingerprint(), Fingerprint()
        _warm_up(judge, parts, given, adapters, base)
        if judge.problems:
            judge.verdict()
        features = _features(parts, given)
        if features != _features(parts, given):
            raise CannotJudge("two forwards of the vision tower differ: this device's kernels do not repeat bitwise")
        base_before = base.read(_frozen_tensors(parts, adapters))
        adapter_before = adapter.read(adapters.items())

        optimizer = optimizer_of(make_optimizer or adamw(learning_rate), list(trained.values()))
        wrong = [with_wrong_labels(parts, batch) for batch in given]
        loss = _train(parts, wrong, list(trained.values()), optimizer, steps)
        judge.report("loss at the first step", loss, "nat")

        base_after = base.read(_frozen_tensors(parts, adapters))
        adapter_after = adapter.read(adapters.items())
        own = {id(parameter) for parameter in adapters.values()}
        not_own = sorted(n.replace(".base_layer", "") for n, p in trained.items() if id(p) not in own)
        _judge_base(judge, parts, base_before, base_after, not_own, policy=policy)
        adapter_moved = set(_changed(adapter_before, adapter_after))
        _judge_adapter(judge, adapters, adapter_moved, steps, partial(_too_small, parts, wrong[0], optimizer))
        in_vision = _trained_in_vision(parts, adapters)
        undeclared = [name for name in in_vision if parts.group_of(name) not in (*policy.adapted, *policy.trained)]
        if in_vision and not undeclared:
            judge.note(
                f"visual tokens are not compared: {tally(map(parts.group_of, in_vision))} tensors are trained on "
                f"purpose (qvl_adapter_policy), first {in_vision[0]}"
            )
        else:
            cause = _adapted_in_vision(parts, undeclared, policy)
            _judge_features(judge, features, _features(parts, given), cause)
    if not math.isfinite(loss) and not judge.problems:
        origin = origin_of_not_finite(parts, lambda: forward(parts, wrong[0]))
        raise CannotJudge(f"the loss of the first step is {loss}{origin}; such a step trains nothing")
    all_of = Counter(parts.group_of(name) for name in base_before)
    moved = Counter(parts.group_of(name) for name in _changed(base_before, base_after))
    rows = [(group, all_of[group], moved[group]) for group in GROUPS if all_of[group]]
    return judge.verdict(("group", "tensors", "moved"), rows)


def _trained_in_vision(parts: Parts, adapters: Mapping[str, nn.Parameter]) -> list[str]:
    """Names of what is trained in vision tower and merger beside their own weights."""
    return [name for name, p in adapters.items() if p.requires_grad and parts.group_of(name) in TOWER]


def _adapted_in_vision(parts: Parts, names: Sequence[str], policy: AdapterPolicy) -> str:
    """Which modules of vision tower and merger carry these adapter tensors, and how to declare them.

    Returns:
        The end of a sentence; empty without names.
    """
    if not names:
        return ""
    modules = list(dict.fromkeys(layer_of(name) if matrix_of(name) else name.rpartition(".")[0] for name in names))
    adapted = ", ".join(repr(name) for name in active_adapters(parts))
    return (
        f"; the adapter {adapted} sits in {tally(map(parts.group_of, modules))}: {some(modules)}; let target_modules "
        "and modules_to_save name the language backbone only, or declare what is adapted on purpose: "
        f"{_declaration(policy, adapted={*map(parts.group_of, names)})}"
    )


def _declaration(policy: AdapterPolicy, adapted: Collection[Group] = (), trained: Collection[Group] = ()) -> str:
    """How a user declares these parts beside those of the policy."""

    def more(groups: Sequence[Group], others: Collection[Group]) -> tuple[Group, ...]:
        return (*groups, *(group for group in GROUPS if group in others and group not in groups))

    whole = AdapterPolicy(more(policy.adapted, {*adapted, *trained}), more(policy.trained, trained))
    return f"qvl_adapter_policy (--qvl-adapter-policy, ini or fixture) = {str(whole)!r}"


def _frozen_tensors(parts: Parts, adapters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, torch.Tensor]]:
    own = {id(parameter) for parameter in adapters.values()}
    return ((name, tensor) for name, tensor in base_tensors(parts) if id(tensor) not in own)


def _changed(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    return sorted(name for name in {*before, *after} if before.get(name) != after.get(name))


def _warm_up(
    judge: Judge,
    parts: Parts,
    batches: Sequence[Batch],
    adapters: Mapping[str, nn.Parameter],
    base: Fingerprint,
) -> None:
    """One forward per batch; whatever it changes in place must be a cast and nothing else."""
    import torch

    before = base.read(_frozen_tensors(parts, adapters))
    vectors = {
        name: tensor.detach().to("cpu", copy=True)
        for name, tensor in _frozen_tensors(parts, adapters)
        if tensor.ndim == 1 and tensor.is_floating_point() and name.endswith(".bias")
    }
    parts.wrapped.train()
    with torch.no_grad():
        for batch in batches:
            forward(parts, batch)
    changed = set(_changed(before, base.read(_frozen_tensors(parts, adapters))))
    if not changed:
        return
    now = {name: tensor for name, tensor in _frozen_tensors(parts, adapters) if name in changed}
    cast = [
        name
        for name in sorted(changed & vectors.keys() & now.keys())
        if now[name].dtype != vectors[name].dtype and torch.equal(vectors[name].to(now[name].dtype), now[name].cpu())
    ]
    if cast:
        dtypes = f"{dtype_name(vectors[cast[0]].dtype)} to {dtype_name(now[cast[0]].dtype)}"
        judge.note(
            f"{len(cast)} biases were cast in place from {dtypes} by bitsandbytes at the first forward "
            f"(first: {cast[0]}); equal after the same cast"
        )
    other = sorted(changed - set(cast))
    judge.equal(
        "base tensors changed by a forward alone",
        len(other),
        0,
        else_say=f"a forward without any training step changed {len(other)} base tensors: {some(other)}",
    )


def _features(parts: Parts, batches: Sequence[Batch]) -> dict[str, int]:
    """Digest of the visual tokens of each batch with images, in eval mode."""
    import torch

    parts.wrapped.eval()
    found: dict[str, int] = {}
    with torch.no_grad():
        for number, batch in enumerate(batches):
            if "pixel_values" not in batch:
                continue
            with tapped(parts) as tap:
                forward(parts, batch)
            found |= digests((f"batch {number}, call {n}", call.features) for n, call in enumerate(tap.vision))
    return found


def _train(
    parts: Parts,
    batches: Sequence[Batch],
    trained: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    steps: int,
) -> float:
    """Take the steps; returns the loss of the first."""
    parts.wrapped.train()
    scale = FIRST_FLOAT16_SCALE if computes_in_float16(parts) else 1.0
    losses = []
    for step in range(steps):
        loss, scale = backward(partial(_loss, parts, batches[step % len(batches)]), trained, scale=scale)
        losses.append(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses[0]


def _too_small(
    parts: Parts, batch: Batch, optimizer: torch.optim.Optimizer, still: Mapping[str, nn.Parameter]
) -> list[str]:
    """Which of these tensors stand still because the optimizer's steps are too small to see, by one more gradient."""
    parts.wrapped.train()
    scale = FIRST_FLOAT16_SCALE if computes_in_float16(parts) else 1.0
    backward(partial(_loss, parts, batch), list(still.values()), scale=scale)
    small = too_small_steps(still, optimizer)
    optimizer.zero_grad(set_to_none=True)
    return small


def _loss(parts: Parts, batch: Batch) -> torch.Tensor:
    loss: torch.Tensor = forward(parts, batch).loss
    return loss


def _judge_base(
    judge: Judge,
    parts: Parts,
    before: Mapping[str, int],
    after: Mapping[str, int],
    trained_base: list[str],
    *,
    policy: AdapterPolicy,
) -> None:
    judge.equal(
        "base tensors that are trained",
        len(trained_base),
        0,
        else_say=(
            f"{len(trained_base)} base tensors require grad and go to the optimizer, in "
            f"{tally(map(parts.group_of, trained_base))}: {some(trained_base)}; freeze the base "
            "(requires_grad_(False)) before the adapter is attached, or declare what is trained on purpose: "
            f"{_declaration(policy, trained={*map(parts.group_of, trained_base)})}"
        ),
    )
    moved = _changed(before, after)
    written = [name for name in moved if name not in trained_base]
    why = (
        f"{len(written)} of them do not require grad, so something wrote into them; load the model again"
        if written
        else "all of them require grad"
    )
    judge.equal(
        "base tensors that moved",
        len(moved),
        0,
        else_say=(
            f"{len(moved)} of {len(before)} base tensors moved, in {tally(map(parts.group_of, moved))}: "
            f"{some(written or moved)}; {why}"
        ),
    )


def _judge_adapter(
    judge: Judge,
    adapters: Mapping[str, nn.Parameter],
    moved: set[str],
    steps: int,
    too_small: Callable[[Mapping[str, nn.Parameter]], list[str]],
) -> None:
    """Hold the adapter's LoRA matrices to have moved, but those of which `too_small` says that no step can be seen."""
    trainable = [name for name, parameter in adapters.items() if parameter.requires_grad]
    # A trained copy of an embedding moves only where the batch has its tokens.
    lora = [name for name in trainable if matrix_of(name)]
    still = [name for name in lora if name not in moved]
    if still and len(still) < len(lora):
        small = too_small({name: adapters[name] for name in still})
        note_too_small(judge, small, lora)
        still, lora = ([name for name in names if name not in small] for names in (still, lora))
    judge.every(
        "adapter tensors that moved",
        lora,
        still,
        else_say=lambda off: (
            f"{off} adapter tensors did not move in {steps} steps: {some(still)}; no gradient reaches them, the "
            "optimizer does not hold them, or its steps are below the resolution of "
            f"{tally(dtype_name(adapters[name].dtype) for name in still)}"
        ),
    )
    astray = sorted(moved - set(trainable))
    if astray:
        judge.problem(f"{len(astray)} adapter tensors that do not require grad moved: {some(astray)}")


def _judge_features(judge: Judge, before: Mapping[str, int], after: Mapping[str, int], cause: str) -> None:
    changed = _changed(before, after)
    judge.equal(
        "batches whose visual tokens changed",
        len(changed),
        0,
        else_say=f"the vision tower's output is not bitwise what it was before training: {some(changed)}{cause}",
    )
