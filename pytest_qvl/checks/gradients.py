"""Autograd's gradient is the derivative of the loss, in every layer."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.cross_entropy import telling_labels
from pytest_qvl.checks.support.directional import (
    MOST,
    SETTLED,
    Derivative,
    Direction,
    Noise,
    along_gradient,
    along_stream,
    derivative,
    into_branches,
    step_size,
    times_for,
)
from pytest_qvl.checks.support.head_replay import HeadReplay, core_recorded
from pytest_qvl.checks.support.lora import layer_of, zero_initialised_matrices
from pytest_qvl.checks.support.rounding import rounded_sums
from pytest_qvl.checks.support.segments import Layers, Segment, layers_recorded, norms_held
from pytest_qvl.checks.support.teaching import NO_LABELS, forward, text_tokens, trainable_parameters
from pytest_qvl.checks.support.unpacked_weights import require_unpacked_weights
from pytest_qvl.checks.support.wording import some
from pytest_qvl.evidence import NOT_JUDGED, CannotJudge, Evidence, InputError, Judge
from pytest_qvl.models.adapters import orthogonality_penalty_off
from pytest_qvl.models.anatomy import Parts, anatomy
from pytest_qvl.models.state import preserved
from pytest_qvl.models.training import (
    FIRST_FLOAT16_SCALE,
    backward,
    checkpointing,
    computes_in_float16,
    layer_gains,
    weights_restored,
)
from pytest_qvl.samples.batch import IGNORED

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch
    from torch import nn

    from pytest_qvl.checks.support.teaching import Batch

RESOLVED = 0.25
FINE = 0.1  # half of what a gradient a quarter too large is off by
SHARE = 0.2
_SEED = 20_311
AHEAD = 4  # halvings: three have to settle, and one is for layers that are not quite alike
ADAPTER, STREAM, BRANCHES = "adapter", "what goes in", "what goes in by attention and MLP"
_NAMED = 2


@check(promise=10, needs=("time",))
def gradient_arithmetic(model: Any, batch: Batch, *, gradient_checkpointing: bool) -> Evidence:
    """Prove that the gradient that autograd computes is the derivative of the loss, layer by layer.

    One forward and backward pass in train mode, with random labels and B (or what starts at zero) set to random signs.
    Then each decoder layer, and norm, head and loss together, is run by itself from the hidden states that went in,
    with the same dropout, moved a little along directions of its own: in its adapter, in the hidden states along their
    gradient, and in these along what attention and MLP give back. What comes out, weighted with the gradient that came
    back from behind, has to move by what the layer's gradients promise.
    Errors do not add up from layer to layer, so that many layers are judged as sharply as few; and by the chain rule
    right layers make a right whole.

    ========================================= ===================================================
    judged                                    limit
    ========================================= ===================================================
    derivative of each layer over its promise docs/limits.md#directional-derivatives
    gradient of each row with labels          not exactly zero
    ========================================= ===================================================

    A layer in a part of which rounding hides a quarter of the derivative is not judged, and counted.

    Args:
        model: The model wrapped by PEFT, its adapter trainable.
        batch: Model inputs with ``labels``.
        gradient_checkpointing: Train with it or without, as :func:`training_step` does.

    Raises:
        CheckFailed: Names the layers, and of the first ones the tensors whose gradient is not the loss's, and a factor.
        CannotJudge: No layer can be judged, layers that are not called one by one, or weights repacked for the CPU.
        ValueError: No adapter, nothing trainable, or no labels.
    """
    parts = anatomy(model)
    trained = trainable_parameters(parts)
    if "labels" not in batch or bool((batch["labels"][:, 1:] == IGNORED).all()):
        raise InputError(f"gradient_arithmetic: {NO_LABELS}")
    require_unpacked_weights(parts)
    how = "with" if gradient_checkpointing else "without"
    judge = Judge("gradient_arithmetic", f"gradients {how} checkpointing are those of the loss")
    taught = {**batch, "labels": telling_labels(batch["labels"], text_tokens(parts, batch), _SEED)}
    with (
        preserved(model, training=True, seed=_SEED),
        weights_restored(trained.values()),
        orthogonality_penalty_off(parts),
        norms_held(parts),
    ):
        _leave_zero(parts, trained)
        with checkpointing(parts, gradient_checkpointing), core_recorded(parts) as recorded:
            layers, scale = _backward(parts, taught, trained)
        with checkpointing(parts, False):
            replay = HeadReplay(parts, taught, recorded)
            segments, before = layers.segments(replay, taught["labels"], scale)
            if before:
                judge.note(f"nothing to judge in {some(before)}: all that is trained begins behind")
            _judge_rows(judge, segments[-1], taught["labels"])
            _note_left_out(judge, segments, trained)
            _judge_segments(judge, parts, segments)
            if judge.problems and gradient_checkpointing:
                judge.problems[-1] += _changed_by_checkpointing(parts, taught, trained)
    return judge.verdict()


def _leave_zero(parts: Parts, trained: Mapping[str, nn.Parameter]) -> None:
    """Give matrices that are all zero random signs, of a size by which each layer adds a fifth of what goes into it."""
    import torch

    gains = layer_gains(parts)
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for name, matrix in zero_initialised_matrices(trained).items():
            if not bool(matrix.any()):
                signs = torch.randint(0, 2, matrix.shape, generator=generator) * 2 - 1
                matrix.copy_(signs * (SHARE / gains.get(layer_of(name), 1.0)))


def _backward(parts: Parts, batch: Batch, trained: Mapping[str, nn.Parameter]) -> tuple[Layers, float]:
    """One backward pass; what went into the layers, and the scale of the gradients that came back to them."""
    import torch

    with layers_recorded(parts) as layers:

        def loss() -> torch.Tensor:
            layers.calls.clear()
            torch.manual_seed(_SEED)
            found: torch.Tensor = forward(parts, batch).loss
            return found

        scale = FIRST_FLOAT16_SCALE if computes_in_float16(parts) else 1.0
        value, scale = backward(loss, list(trained.values()), scale=scale)
    if not math.isfinite(value):
        raise CannotJudge(f"the loss is {value}, which has no derivative; training_step says where it begins")
    return layers, scale


def _judge_rows(judge: Judge, end: Segment, labels: torch.Tensor) -> None:
    gradient = end.gradient
    if gradient is None:
        raise CannotJudge("the loss has no gradient at the last hidden states; training_step says what is not reached")
    taught = (labels[:, 1:] != IGNORED).any(dim=1).nonzero().flatten().tolist()
    lost = [row for row in taught if not bool(gradient[row].any())]
    judge.equal(
        "rows with labels that have a gradient",
        len(taught) - len(lost),
        len(taught),
        else_say=f"{len(lost)} of {len(taught)} rows with labels give no gradient: row {some([str(r) for r in lost])}",
    )


def _note_left_out(judge: Judge, segments: list[Segment], trained: Mapping[str, nn.Parameter]) -> None:
    judged = {id(parameter) for segment in segments for parameter in segment.parameters.values()}
    left = [name for name, parameter in trained.items() if id(parameter) not in judged]
    if left:
        judge.note(
            f"not judged: {len(left)} trained tensors in none of the layers, or in several, or without a gradient: "
            f"{some(left)}"
        )


def _judge_segments(judge: Judge, parts: Parts, segments: list[Segment]) -> None:
    found: list[_Found] = []
    hidden: dict[str, list[str]] = {}
    probe = _Probe(parts)
    for segment in segments:
        for what, direction in probe.directions(segment):
            seen = probe(segment, what, direction)
            if seen is None or seen.blur > RESOLVED:
                hidden.setdefault(segment.name, []).append(what)
            else:
                found.append(_Found(segment, what, seen))
    _count(judge, len(segments), found, hidden)
    worst = max(found, key=lambda one: one.seen.off / one.seen.limit if one.seen.limit else math.inf).seen
    judged = {one.segment.name for one in found}
    for name, into in (("of a layer", False), ("of what goes into attention and MLP", True)):
        limits = [one.seen.limit for one in found if (one.what == BRANCHES) is into]
        if limits:
            judge.report(f"coarsest limit {name}", max(limits))
    off = {one.segment.name: one for one in reversed(found) if one.seen.is_off}
    told = [f"in {name} {probe.explained(one)}" for name, one in list(off.items())[::-1][:_NAMED]]
    judge.at_most(
        "derivative of the worst layer over its promise, off 1 by",
        worst.off,
        worst.limit,
        else_say=f"the gradient is not the loss's in {len(off)} of {len(judged)} layers: {'; '.join(told)}",
    )


def _count(judge: Judge, layers: int, found: Sequence[_Found], hidden: Mapping[str, Sequence[str]]) -> None:
    """Say which layers were not judged, or not all of them; where that is every one, nothing is proved."""
    told = some([f"{name} ({', '.join(each)})" for name, each in hidden.items()])
    if not found or (len(hidden) == layers and not any(one.seen.is_off for one in found)):
        raise CannotJudge(
            f"rounding hides a quarter of the loss's derivative in each of {layers} layers, or in a part of it: "
            f"{told}; longer answers, more rows or float32 show more"
        )
    judge.report("layers judged", layers - len(hidden))
    if hidden:
        judge.report(f"layers{NOT_JUDGED}", len(hidden))
        judge.note(f"NOT JUDGED in {len(hidden)} of {layers} layers, where rounding hides it: {told}")


@dataclass(frozen=True)
class _Found:
    """A layer and the derivative of the loss along one of its directions."""

    segment: Segment
    what: str
    seen: Derivative


class _Probe:
    """Takes derivatives in layers: along the adapter's gradients, along hidden states', and into what branches off.

    One direction each: a factor of one of these gradients is all of the ratio then, however small its share is.
    """

    def __init__(self, parts: Parts) -> None:
        self._terms = max(parts.text_config.intermediate_size, parts.text_config.hidden_size)
        self._noise: dict[str, Noise] = {}
        self._steps: dict[str, float] = {}

    def directions(self, segment: Segment) -> Iterator[tuple[str, Direction]]:
        """What is judged of a layer, in the words of messages, and along what."""
        if segment.parameters:
            yield ADAPTER, self._of(segment, list(segment.parameters))
        if segment.gradient is not None:
            yield STREAM, along_stream(segment)
            inside = into_branches(segment)
            if inside is not None:
                yield BRANCHES, inside

    def _of(self, segment: Segment, names: Sequence[str]) -> Direction:
        """Each tensor is moved by a random multiple of its size, once to twice, so that no two count alike."""
        chance = random.Random(f"{_SEED} {segment.name}")
        return along_gradient(segment, {name: chance.uniform(1.0, 2.0) for name in names})

    def __call__(self, segment: Segment, what: str, direction: Direction) -> Derivative | None:
        """A mean of several where one alone is too coarse, and rounding is all that makes it so.

        What is off is looked at once more at all steps, by the finest mean: a ratio that has settled at the first look
        can go on to change below the noise of that, where a layer bends at several scales.
        """
        seen = self._once(segment, what, direction)
        if not segment.adds_up or (seen is not None and not seen.is_off and seen.blur <= FINE):
            return seen
        noise, largest = self._noise[segment.name], self._largest(segment)
        if seen is not None and not seen.is_off:
            begin = min(largest, seen.step * 2.0 ** (SETTLED - 1))
            mean = derivative(segment, direction, begin, noise, times=times_for(seen, FINE), settled=1)
            if mean is None or not mean.is_off:
                return seen if mean is None or seen.blur < mean.blur else mean
        return derivative(segment, direction, largest, noise, times=MOST)

    def _once(self, segment: Segment, what: str, direction: Direction) -> Derivative | None:
        """Begins a few steps above where the layer before was resolved: layers are alike, and most of it is waiting."""
        largest = self._largest(segment)
        if segment.name not in self._noise:
            self._noise[segment.name] = Noise.of(segment, rounded_sums(segment.dtype, self._terms))
        noise = self._noise[segment.name]
        begin = min(largest, self._steps.get(what, largest))
        seen = derivative(segment, direction, begin, noise)
        if begin < largest and (seen is None or seen.is_off or seen.blur > RESOLVED):
            seen = derivative(segment, direction, largest, noise)
        if seen is not None:
            self._steps[what] = seen.step * 2.0**AHEAD
        return seen

    def _largest(self, segment: Segment) -> float:
        import torch

        return step_size(torch.finfo(segment.dtype).eps)

    def explained(self, found: _Found) -> str:
        """Which gradients of a layer are wrong by themselves, by what factor; else that they are together."""
        segment = found.segment
        wrong = {}
        for name in segment.parameters:
            seen = self._once(segment, name, self._of(segment, [name]))
            if seen is not None and seen.is_off:
                wrong[name.removeprefix(f"{segment.name}.")] = seen
        told = [f"{name} has {_times(seen)} its gradient" for name, seen in wrong.items()]
        for what, direction in reversed(list(self.directions(segment))):
            passed = self(segment, what, direction) if what != ADAPTER else None
            if passed is not None and passed.is_off:
                told.insert(0, _passed(what, passed))
        return some(told) or f"all of it together has {_times(found.seen)} its gradient"


def _passed(what: str, seen: Derivative) -> str:
    behind = what.removeprefix(STREAM)
    return f"{STREAM} gets {_times(seen)} its gradient{behind}"


def _times(seen: Derivative) -> str:
    return f"{1 / seen.ratio:.3g} times" if seen.ratio and math.isfinite(seen.ratio) else f"1/{seen.ratio:.3g} of"


def _changed_by_checkpointing(parts: Parts, batch: Batch, trained: Mapping[str, nn.Parameter]) -> str:
    """What checkpointing does to the gradient of the same step, as the end of a sentence; empty if nothing."""
    import torch

    kept = {name: parameter.grad.float() for name, parameter in trained.items() if parameter.grad is not None}
    with checkpointing(parts, False):
        _backward(parts, batch, trained)
    pairs = [(kept[name], p.grad.float()) for name, p in trained.items() if name in kept and p.grad is not None]
    dot = sum(float((a * b).sum()) for a, b in pairs)
    sizes = [math.sqrt(sum(float(pair[side].square().sum()) for pair in pairs)) for side in (0, 1)]
    cosine = dot / (sizes[0] * sizes[1]) if all(sizes) else 0.0
    if cosine > 1 - torch.finfo(torch.bfloat16).eps:
        return ""
    return (
        f"; without checkpointing the same step has another gradient (cosine {cosine:.2f}): does checkpointing keep "
        "dropout's random state (preserve_rng_state=True) when it computes activations again?"
    )
