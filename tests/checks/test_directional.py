"""Derivatives along directions, of segments whose gradient and noise are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pytest_qvl.checks.gradients import _judge_segments
from pytest_qvl.checks.support.directional import (
    MOST,
    Derivative,
    Noise,
    _differences,
    _vanishes,
    along_gradient,
    derivative,
    step_size,
    times_for,
)
from pytest_qvl.checks.support.segments import Layer, _Call
from pytest_qvl.checks.support.student import deviations
from pytest_qvl.evidence import CannotJudge, Judge
from pytest_qvl.models.anatomy import anatomy


@pytest.fixture(scope="module")
def parts(fresh_model: Any) -> Any:
    """What the noise is scaled by: dtype and width."""
    return anatomy(fresh_model(lora=True))


class Quartic:
    """A segment of one matrix and no hidden states: the sum of fourth powers, whose gradient is known."""

    name = "quartic"
    gradient: Any = None
    outgoing = None
    dtype = torch.float32
    adds_up = False

    def __init__(self, factor: float) -> None:
        self.x = torch.zeros(1, 1, 1)
        self.matrix = torch.nn.Parameter(torch.arange(1.0, 7.0))
        self.matrix.grad = factor * 4 * self.matrix.detach() ** 3
        self.parameters = {"matrix": self.matrix}

    def value(self, _x: torch.Tensor) -> float:
        return float((self.matrix.detach().double() ** 4).sum())

    def noise(self, times: int) -> torch.Tensor:
        return torch.zeros(times, 1)


@pytest.mark.parametrize("factor", [1.0, 1.05, -1.0, 1e-3])
def test_a_derivative_over_its_promise_is_the_inverse_of_the_factor(factor: float) -> None:
    segment: Any = Quartic(factor)
    seen = derivative(segment, along_gradient(segment, {"matrix": 1.0}), 2.0**-5, Noise(0.0, 0.0))
    assert seen is not None
    assert seen.ratio == pytest.approx(1 / factor, rel=1e-5)
    assert seen.is_off == (factor != 1.0)


class Wide(Quartic):
    """Bends within a move of a thousandth, as a layer does whose A reads thousands of numbers."""

    def __init__(self, factor: float) -> None:
        super().__init__(factor)
        self.start = self.matrix.detach().clone().double()
        self.matrix.grad = factor * torch.ones(6)

    def value(self, _x: torch.Tensor) -> float:
        return float((1000 * (self.matrix.detach().double() - self.start)).tanh().sum() / 1000)


@pytest.mark.parametrize("factor", [1.0, 1.25, -1.0, 1e-3])
def test_steps_are_halved_until_rounding_ends_it(factor: float) -> None:
    """Of a gradient that is nearly lost the ratio is a thousand, and settles within its own size."""
    segment: Any = Wide(factor)
    seen = derivative(segment, along_gradient(segment, {"matrix": 1.0}), 1.0, Noise(1e-7, 0.0))
    assert seen is not None
    assert seen.ratio == pytest.approx(1 / factor, rel=0.02)
    assert seen.is_off == (factor != 1.0)


class Saturating(Quartic):
    """Half of what it promises is flat beyond a move of a hundredth, as attention is that large steps saturate."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.start = self.matrix.detach().clone().double()
        self.matrix.grad = torch.ones(6)

    def value(self, _x: torch.Tensor) -> float:
        moved = self.matrix.detach().double() - self.start
        return float((0.5 * moved + 0.005 * (100 * moved).tanh()).sum())


def test_a_ratio_that_is_off_at_large_steps_only_is_no_wrong_gradient() -> None:
    for segment, step, is_wrong in ((Saturating(), 0.5, False), (Quartic(1.9), 2**-6, True)):
        given: Any = segment
        direction = along_gradient(given, {"matrix": 1.0})
        off = abs(_differences(given, direction, step).ratio - 1)
        assert off > 0.4
        assert _vanishes(given, direction, step, Noise(1e-6, 0.0), off) is not is_wrong


class OneToken(Quartic):
    """A segment of which one token of eight moves when all is a last place off, by 1e-3 on average."""

    def __init__(self, seed: int) -> None:
        super().__init__(1.0)
        self.generator = torch.Generator().manual_seed(seed)

    def noise(self, times: int) -> torch.Tensor:
        moved = torch.zeros(times, 8, dtype=torch.float64)
        moved[:, 3] = 1e-3 * torch.randn(times, generator=self.generator, dtype=torch.float64)
        return moved


def test_the_noise_of_few_tokens_is_no_underestimate() -> None:
    """One pair of values is a thirtieth of the right deviation apart in one of 40 cases."""
    found = []
    for seed in range(200):
        segment: Any = OneToken(seed)
        found.append(Noise.of(segment, 1.0).value * math.sqrt(3) / 1e-3)
    assert min(found) > 0.7
    assert sum(found) / len(found) == pytest.approx(8.0 / 5, rel=0.05)


class Noisy(Quartic):
    """Its values are said to be off by about so much."""

    name = "noisy"

    def __init__(self, factor: float, noise: float) -> None:
        super().__init__(factor)
        self.deviation = noise

    def noise(self, times: int) -> torch.Tensor:
        signs = torch.arange(times, dtype=torch.float64)[:, None] % 2 * 2 - 1
        return self.deviation * signs.expand(times, 50)


def test_layers_that_are_not_judged_are_counted(parts: Any) -> None:
    judge = Judge("gradient_arithmetic", "")
    segments: list[Any] = [Quartic(1.0), Noisy(1.0, 1e3)]
    _judge_segments(judge, parts, segments)
    found = {figure.name: figure.value for figure in judge.figures}
    assert (found["layers judged"], found["layers not judged"]) == (1, 1)
    assert judge.notes == ["NOT JUDGED in 1 of 2 layers, where rounding hides it: noisy (adapter)"]


def test_where_no_layer_is_judged_the_check_cannot_judge(parts: Any) -> None:
    segments: list[Any] = [Noisy(1.0, 1e3)]
    with pytest.raises(
        CannotJudge, match=r"in each of 1 layers, or in a part of it: noisy \(adapter\); longer answers"
    ):
        _judge_segments(Judge("gradient_arithmetic", ""), parts, segments)


class Half(Noisy):
    """What is lost in noise is the adapter alone."""

    gradient: Any = torch.ones(1, 1, 1)

    def __init__(self) -> None:
        super().__init__(1e-6, 1e-6)
        self.x = torch.ones(1, 1, 1)

    def value(self, x: torch.Tensor) -> float:
        return 1e-6 * super().value(x) + float(x.double().sum())

    def branch_gradients(self) -> list[torch.Tensor]:
        return []


def test_a_layer_of_which_a_part_is_hidden_is_not_judged(parts: Any) -> None:
    segments: list[Any] = [Half()]
    with pytest.raises(CannotJudge, match=r"noisy \(adapter\);"):
        _judge_segments(Judge("gradient_arithmetic", ""), parts, segments)


def test_beyond_a_quarter_neither_right_nor_wrong_is_judged(parts: Any) -> None:
    """A ratio of 3 that is sure to 1.2 only: what is off by less would have passed as well."""
    for noise, is_judged in ((1e-4, True), (0.12, False)):
        segments: list[Any] = [Quartic(1.0), Noisy(1 / 3, noise)]
        judge = Judge("gradient_arithmetic", "")
        _judge_segments(judge, parts, segments)
        assert bool(judge.problems) is is_judged
        assert ("layers not judged" in {figure.name for figure in judge.figures}) is not is_judged


class Rounding(Quartic):
    """What it promises, and a normal error of 1e-3 that is another one for inputs a last place apart."""

    adds_up = True

    def __init__(self) -> None:
        super().__init__(1.0)
        self.x = torch.ones(1, 1, 64)
        self.matrix.grad = torch.ones(6)

    def value(self, x: torch.Tensor) -> float:
        seed = hash((self.matrix.detach().double().sum().item(), *x.flatten().tolist()))
        error = torch.randn((), generator=torch.Generator().manual_seed(seed % 2**63), dtype=torch.float64)
        return float(self.matrix.detach().double().sum() + 1e-3 * error)


def test_a_mean_of_several_differences_is_as_much_finer_as_it_says() -> None:
    segment: Any = Rounding()
    direction = along_gradient(segment, {"matrix": 1.0})
    promised = _differences(segment, direction, 2**-5).promised
    noise = Noise(math.sqrt(2) * 1e-3, 0.0)
    steps = [2**-5 * (1 + number / 100) for number in range(60)]
    for times in (1, MOST):
        off = [_differences(segment, direction, step, times) for step in steps]
        deviation = math.sqrt(sum((one.seen - one.promised) ** 2 for one in off) / len(off))
        assert 0.6 < deviation / noise.of_mean(times).value < 1.25
        assert off[0].promised == pytest.approx(promised)
    one, mean = (derivative(segment, direction, 2**-5, noise, times=times) for times in (1, MOST))
    assert one is not None
    assert mean is not None
    assert mean.limit < 0.6 * one.limit


def test_a_mean_is_taken_of_as_many_as_are_needed() -> None:
    for ratio, limit, times in ((1.0, 0.1, 1), (1.0, 0.17, 3), (1.0, 2.0, MOST), (1000.0, 60.0, 1)):
        assert times_for(Derivative(ratio, limit, 0.5), 0.1) == times


class Plateau(Noisy):
    """Nine tenths of what it promises at large steps, all of it at steps that only a mean of several can see."""

    adds_up = True

    def __init__(self) -> None:
        super().__init__(1.0, 1.3e-5)
        self.start = self.matrix.detach().clone().double()
        self.matrix.grad = torch.ones(6)

    def value(self, _x: torch.Tensor) -> float:
        moved = self.matrix.detach().double() - self.start
        return float((0.9 * moved + 0.1 / 350 * (350 * moved).tanh()).sum())


def test_a_ratio_that_goes_on_to_change_below_the_noise_is_no_wrong_gradient(parts: Any) -> None:
    segments: list[Any] = [Plateau(), Quartic(1.0)]
    _judge_segments(judge := Judge("gradient_arithmetic", ""), parts, segments)
    assert judge.problems == []
    segments[0].adds_up = False  # there is no mean to be had
    _judge_segments(judge, parts, segments)
    assert "in noisy matrix has" in judge.problems[0]


class Residual(torch.nn.Module):
    """A decoder layer in bfloat16 that adds a thousandth to a stream."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.self_attn, self.mlp = (torch.nn.Linear(8, 8, bias=False, dtype=torch.bfloat16) for _ in range(2))
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(x / x.norm())
        out: torch.Tensor = self.factor * (x + self.mlp(x / x.norm()))
        return out


def test_sums_with_the_residual_stream_are_not_rounded_in_a_layers_value() -> None:
    torch.manual_seed(0)
    x = 100 * torch.randn(1, 4, 8).bfloat16()
    for factor in (1.0, 1.5):
        module = Residual(factor)
        nothing: Any = (torch.get_rng_state(), {})
        following = _Call(x, {}, nothing, None, torch.ones(1, 4, 8))
        layer = Layer("layer", {}, torch.bfloat16, module, _Call(x, {}, nothing, None), following)
        with torch.no_grad():
            attended = module.self_attn(x / x.norm())
            summed = x + attended
            exact = float((x.double() + attended.double() + module.mlp(summed / summed.norm()).double()).sum())
            rounded = float(module(x).double().sum())
        assert layer.value(x) == (exact if factor == 1 else rounded)
        assert layer.adds_up is (factor == 1)
        assert exact != rounded


def test_estimated_deviations_are_those_of_students_t() -> None:
    """Two-sided quantiles of the tables: 1.96 normal deviations are 12.71, 4.30, 3.18, 2.23 and 2.13."""
    quantiles = [deviations(1.959964, freedom) for freedom in (1, 2, 3, 10, 15)]
    assert quantiles == pytest.approx([12.706, 4.303, 3.182, 2.228, 2.131], abs=1e-3)
    assert deviations(5.0, 10**6) == pytest.approx(5, abs=0.05)


def test_step_sizes() -> None:
    assert {name: step_size(torch.finfo(getattr(torch, name)).eps) for name in ("bfloat16", "float16", "float32")} == {
        "bfloat16": 2**0,
        "float16": 2**-1,
        "float32": 2**-6,
    }
