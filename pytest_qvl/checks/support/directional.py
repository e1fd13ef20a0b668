"""Directional derivatives by central differences, beside what a gradient says they are."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.rounding import a_last_place_off
from pytest_qvl.checks.support.student import deviations

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch import nn

    from pytest_qvl.checks.support.segments import Segment

DEVIATIONS = 5.0
PLACES = 66 + 12  # forward and backward, and inputs that are a whole step off: eps**2 is twelve times eps**2 / 12
COMMON = 1 / 20  # of the roundings: attention's sum with the stream, which inputs a last place apart round alike
FIRST = 4
FREEDOM = 16
HALVINGS = 32  # none gets there: rounding ends it long before
MOST = 8  # differences in a mean: they are all of the time that the check takes
SETTLED = 3  # the first change has nothing to be compared with, and counts
LITTLE = 1 / 32
HIDDEN = 0.5


@dataclass(frozen=True)
class Direction:
    """Where to move: the hidden states that go into a segment, and parameters of it by name."""

    x: torch.Tensor | None
    parameters: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Derivative:
    """A derivative as seen, over what the gradient promises; 1 for a right gradient.

    Attributes:
        ratio: Seen over promised.
        limit: How far a right gradient's ratio may be from 1.
        step: The smaller of the two steps that it was seen at.
    """

    ratio: float
    limit: float
    step: float

    @property
    def blur(self) -> float:
        """The limit as a share of the larger of seen and promised: where a gradient is nearly lost both are large."""
        return self.limit / max(1.0, abs(self.ratio)) if math.isfinite(self.ratio) else 0.0

    @property
    def is_off(self) -> bool:
        """Whether the gradient is not the loss's."""
        return not self.off <= self.limit

    @property
    def off(self) -> float:
        """Distance from 1; infinite for what is not finite."""
        return abs(self.ratio - 1) if math.isfinite(self.ratio) else math.inf


def step_size(eps: float) -> float:
    """The largest step, relative to what is moved: four times the power of two nearest to the cube root of ``eps``.

    At the cube root what a central difference leaves out (as the square of the step) and what rounding adds (as ``eps``
    over the step) are alike: docs/limits.md#directional-derivatives.
    """
    return math.ldexp(4.0, round(math.log2(eps) / 3))


def along_gradient(segment: Segment, names: Mapping[str, float]) -> Direction:
    """Parameters along their gradients, each by its own size, so that the loss moves as far as it can.

    Args:
        segment: What is moved.
        names: Parameters to move, each with a factor.
    """
    moves: dict[str, torch.Tensor] = {}
    for name, factor in names.items():
        parameter = segment.parameters[name]
        assert parameter.grad is not None
        size, slope = float(parameter.detach().float().norm()), parameter.grad.float()
        norm = float(slope.norm())
        if size and norm:
            moves[name] = slope * (factor * size / norm)
    return Direction(None, moves)


def along_stream(segment: Segment) -> Direction:
    """Hidden states along their gradient, each token by itself and by its own norm.

    Along its gradient here and at what comes out, which is nearly the same by the residual connection: a token whose
    gradient was lost on its way through is moved too.
    """
    gradient = segment.gradient
    assert gradient is not None
    along = _unit(gradient)
    if segment.outgoing is not None:
        along = _unit(along + _unit(segment.outgoing.to(along.device)))
    return _of_hidden_states(segment, along)


def into_branches(segment: Segment) -> Direction | None:
    """Hidden states along the gradients at what the norms before attention and MLP put out; ``None`` without any.

    In a wide layer what these two give back is nearly orthogonal to the gradient that the residual connection carries:
    a derivative along that is the same with them and without.
    """
    gradients = segment.branch_gradients()
    if not gradients:
        return None
    return _of_hidden_states(segment, _unit(sum(_unit(each.float()) for each in gradients)))


def _of_hidden_states(segment: Segment, along: torch.Tensor) -> Direction:
    return Direction(along * (HIDDEN * segment.x.float().norm(dim=-1, keepdim=True)), {})


def _unit(vectors: Any) -> torch.Tensor:
    import torch

    tiny = torch.finfo(torch.float32).tiny
    units: torch.Tensor = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(tiny)
    return units


@dataclass(frozen=True)
class Noise:
    """What rounding does to one segment.

    Attributes:
        value: Standard deviation of the difference of two values at the same place. As it is estimated, it stands for
            so much more that :data:`DEVIATIONS` of it are exceeded no more often than of the true one.
        gradient: Relative standard deviation of an element of the gradient.
    """

    value: float
    gradient: float

    def of_mean(self, times: int) -> Noise:
        """Of a mean of several differences: what the gradient lacks stays, and what all of them round alike."""
        return replace(self, value=self.value * math.sqrt((1 - COMMON) / times + COMMON))

    @classmethod
    def of(cls, segment: Segment, sums: float) -> Noise:
        """Measured for the value, counted for the gradient: docs/limits.md#directional-derivatives.

        Args:
            segment: Where.
            sums: How many times more than its result a product is rounded.
        """
        import torch

        moved = segment.noise(FIRST)
        more = math.ceil(FREEDOM * FIRST / _freedom(moved)) - FIRST
        if more > 0:
            moved = torch.cat([moved, segment.noise(more)])
        response = math.sqrt(float(moved.square().mean(dim=0).sum()))
        unsure = deviations(DEVIATIONS, int(_freedom(moved))) / DEVIATIONS
        return cls(
            response * unsure / math.sqrt(3) * sums,
            torch.finfo(segment.dtype).eps * math.sqrt(PLACES / 12) * sums,
        )


def _freedom(moved: torch.Tensor) -> float:
    """Degrees of freedom of a sum over tokens of variances that are estimated from ``(times, tokens)`` deviations.

    Welch, Biometrika 34 (1947), and Satterthwaite: as many as there are times where all of it is one token's, that
    many for each token where all move alike.
    """
    variances = moved.square().mean(dim=0)
    squares = float(variances.square().sum())
    return len(moved) * float(variances.sum()) ** 2 / squares if squares else float(len(moved))


def derivative(
    segment: Segment, direction: Direction, step: float, noise: Noise, *, times: int = 1, settled: int = 0
) -> Derivative | None:
    """The derivative of the loss along a direction, extrapolated over step sizes (Richardson 1911).

    The step is halved until the ratio of seen and promised settles: it changes by little, and twice in a row by half as
    much as before at most (that of a central difference does by a quarter), or within the noise:
    docs/limits.md#directional-derivatives. It ends where rounding hides all of the ratio.

    Args:
        segment: Where.
        direction: Along what.
        step: The largest step.
        noise: Of this segment.
        times: Mean of so many differences, each from other inputs a last place away, that round independently.
        settled: How many changes are known to have settled at larger steps.

    Returns:
        The extrapolation with the smallest limit; ``None`` where the ratio settles nowhere, or nothing is promised and
        nothing seen.
    """
    noise = noise.of_mean(times)
    large = _differences(segment, direction, step, times)
    if not large.promised:
        return Derivative(math.inf, 0.0, step) if abs(large.seen) > DEVIATIONS * noise.value else None
    best: Derivative | None = None
    change = math.inf
    for halving in range(1, HALVINGS + 1):
        small = _differences(segment, direction, step / 2**halving, times)
        if not small.promised:
            break
        rounding, previous = DEVIATIONS * _rounding(large, small, noise), change
        size = max(1.0, abs(small.ratio))  # of a gradient that is nearly lost the ratio is a thousand
        change = abs(small.ratio - large.ratio)
        settled = settled + 1 if change <= max(previous / 2, rounding) else 0
        if settled >= SETTLED and change <= max(LITTLE * size, rounding):
            left_out = max(change, previous / 2)
            if best is None or rounding + left_out < best.limit:
                best = Derivative((4 * small.ratio - large.ratio) / 3, rounding + left_out, step / 2**halving)
            if left_out <= rounding:
                break
        if rounding > size:
            break
        large = small
    if best is None or not best.is_off or not _vanishes(segment, direction, step, noise, best.off, times=times):
        return best
    return None


def times_for(seen: Derivative, fine: float) -> int:
    """Of how many differences the mean has a limit as fine as this; at most :data:`MOST`."""
    return min(MOST, math.ceil((seen.blur / fine) ** 2))


def _vanishes(segment: Segment, direction: Direction, step: float, noise: Noise, off: float, *, times: int = 1) -> bool:
    """Whether the ratio is 1 after all at the smallest step at which rounding leaves half of `off` to be seen.

    What bends strongly (attention that large steps saturate) can have a ratio that settles twice, at another value
    first. A wrong gradient has a wrong one at every step.
    """
    half = min(off, 1.0) / 2
    visible = (
        half * abs(_differences(segment, direction, step, times).promised) / (DEVIATIONS * noise.value or math.inf)
    )
    halvings = math.floor(math.log2(visible)) if visible > 1 else 0
    small = _differences(segment, direction, step / 2**halvings, times)
    return bool(small.promised) and abs(small.ratio - 1) <= half


def _rounding(large: _Differences, small: _Differences, noise: Noise) -> float:
    """Standard deviation of an extrapolated ratio."""
    seen = math.hypot(noise.value / large.promised, 4 * noise.value / small.promised) / 3
    return math.hypot(seen, noise.gradient * small.spread / abs(small.promised))


@dataclass(frozen=True)
class _Differences:
    """Of the values ahead and behind, and what the gradient promises for where these really were.

    Attributes:
        seen: The difference.
        promised: The same by the gradient, a sum over all elements that are moved.
        spread: Root of the sum of the squares of its terms.
    """

    seen: float
    promised: float
    spread: float

    @property
    def ratio(self) -> float:
        """Seen over promised."""
        return self.seen / self.promised


def _differences(segment: Segment, direction: Direction, step: float, times: int = 1) -> _Differences:
    ahead, behind = (_moved(segment, direction, length, times) for length in (step, -step))
    return _Differences(
        ahead.seen - behind.seen, ahead.promised - behind.promised, math.sqrt(ahead.spread) + math.sqrt(behind.spread)
    )


def _moved(segment: Segment, direction: Direction, length: float, times: int) -> _Differences:
    """The value where everything is moved, its promised change as rounded there, and its terms' sum of squares."""
    import torch

    kept: list[tuple[nn.Parameter, torch.Tensor]] = []
    of_parameters: list[torch.Tensor] = []
    of_inputs: list[torch.Tensor] = []
    value = 0.0
    with torch.no_grad():
        try:
            for name, move in direction.parameters.items():
                parameter = segment.parameters[name]
                kept.append((parameter, parameter.detach().clone()))
                parameter.copy_(torch.add(kept[-1][1].float(), move, alpha=length))
                of_parameters.append(_terms(parameter.grad, parameter.detach(), kept[-1][1]))
            for begin in _inputs(segment, times):
                x = begin
                if direction.x is not None:
                    x = torch.add(begin.float(), direction.x, alpha=length).to(begin.dtype)
                    of_inputs.append(_terms(segment.gradient, x, begin))
                value += segment.value(x) / times
        finally:
            for parameter, before in kept:
                parameter.copy_(before)
    promised, squares = (a + b / times for a, b in zip(_sum(of_parameters), _sum(of_inputs), strict=True))
    return _Differences(value, promised, squares)


def _inputs(segment: Segment, times: int) -> Iterator[torch.Tensor]:
    """The hidden states that went in, or several, each a last place off in every element, the same every time.

    A last place of the dtype that is computed in: by less than that most roundings would stay what they are.
    """
    import torch

    if times == 1:
        yield segment.x
        return
    for number in range(times):
        torch.manual_seed(number)
        yield a_last_place_off(segment.x, torch.finfo(segment.dtype).eps)


def _terms(gradient: torch.Tensor | None, now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """What a move promises, and the sum of the squares of its terms; left where they are, as a GPU is asked once."""
    import torch

    assert gradient is not None
    terms = gradient.double() * (now.double() - before.double())
    return torch.stack([terms.sum(), terms.square().sum()])


def _sum(terms: list[torch.Tensor]) -> tuple[float, float]:
    import torch

    if not terms:
        return 0.0, 0.0
    first, second = torch.stack([each.to(terms[0].device) for each in terms]).sum(dim=0).tolist()
    return first, second
