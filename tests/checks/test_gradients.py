"""Autograd's gradient against directional derivatives of the loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pytest_qvl.checks.gradients import _judge_segments, gradient_arithmetic
from pytest_qvl.checks.support.directional import Noise, _differences, _vanishes, along_gradient, derivative, step_size
from pytest_qvl.checks.support.student import deviations
from pytest_qvl.evidence import CannotJudge, CheckFailed, InputError, Judge
from pytest_qvl.faults import apply, find
from pytest_qvl.faults.case import Case
from pytest_qvl.faults.definitions.gradients import gradient_times
from pytest_qvl.faults.subject import embedded
from pytest_qvl.models.adapters import LANGUAGE_ONLY
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.samples import make_batch, scenes

FAULTS = (
    *("gradient-lost-in-one-layer", "gradient-a-quarter-too-large", "gradient-sign-wrong-in-one-layer"),
    *("gradient-halved-on-its-way", "gradient-of-one-row-lost", "mlp-input-detached"),
)
MASK = "checkpointing-with-other-dropout"


@pytest.fixture(scope="module")
def model(fresh_model: Any) -> Any:
    return fresh_model(lora=True)


@pytest.fixture(scope="module")
def batch(processor: Any) -> dict[str, torch.Tensor]:
    rows = [sample for sample in scenes(seed=5, per_skill=1) if sample.skill in ("nth_colour", "text", "list")]
    return make_batch(processor, rows, padding_side="right", answers=True)


def case_of(model: Any, processor: Any, dtype: str = "float32") -> Case:
    """As much of a case as faults of gradients look at."""
    nothing: Any = None
    return Case(model, processor, nothing, nothing, [], [], nothing, nothing, embedded(dtype))


def figures(evidence: Any) -> dict[str, Any]:
    return {figure.name: figure.value for figure in evidence.figures}


# --- healthy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_right_gradients_pass_in_float32(model: Any, batch: Any, gradient_checkpointing: bool) -> None:
    found = figures(gradient_arithmetic(model, batch, gradient_checkpointing=gradient_checkpointing))
    assert found["layers judged"] == len(anatomy(model).language_backbone.layers) + 1
    assert found["coarsest limit of a layer"] < 1e-3


@pytest.mark.parametrize(
    ("dtype", "lora"),
    [
        ("bfloat16", {"use_dora": True, "lora_dropout": 0.1, "use_rslora": True}),
        pytest.param(
            "float16",
            {"target_modules": LANGUAGE_ONLY + "|lm_head", "init_lora_weights": False, "lora_dropout": 0.1},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["bfloat16, DoRA, rsLoRA, dropout", "float16, trained, head adapted, dropout"],
)
def test_right_gradients_pass_in_16_bits(fresh_model: Any, batch: Any, dtype: str, lora: Any) -> None:
    found = figures(gradient_arithmetic(fresh_model(dtype=dtype, lora=lora), batch, gradient_checkpointing=True))
    assert found["coarsest limit of a layer"] < 0.25


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_users_own_checkpointing_with_dropout(fresh_model: Any, batch: Any, use_reentrant: bool) -> None:
    model = fresh_model(lora={"lora_dropout": 0.1})
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert gradient_arithmetic(model, batch, gradient_checkpointing=True).ok


def test_an_adapter_that_begins_above_the_first_layer_is_judged_from_there(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora={"target_modules": r".*language_model\.layers\.[23]\..*(q|up)_proj"})
    evidence = gradient_arithmetic(model, batch, gradient_checkpointing=False)
    assert figures(evidence)["layers judged"] == 3
    (note,) = evidence.notes
    assert note.startswith("nothing to judge in ")
    assert "layers.0, " in note
    assert "layers.1: " in note
    parameter = next(p for n, p in model.named_parameters() if "layers.2.mlp.up_proj.lora_B" in n)
    handle = parameter.register_hook(lambda gradient: gradient * 1.1)
    try:
        with pytest.raises(CheckFailed, match=r"in 1 of 3 layers: in \S*layers\.2 mlp.up_proj.lora_B"):
            gradient_arithmetic(model, batch, gradient_checkpointing=False)
    finally:
        handle.remove()


def test_a_layer_that_no_gradient_reaches_is_not_judged_as_nothing(model: Any, batch: Any) -> None:
    layer = anatomy(model).language_backbone.layers[1]
    handle = layer.register_forward_hook(
        lambda _m, _a, out: out.detach() if torch.is_tensor(out) else (out[0].detach(),)
    )
    try:
        with pytest.raises(CannotJudge, match=r"no gradient behind \S*layers\.0"):
            gradient_arithmetic(model, batch, gradient_checkpointing=False)
    finally:
        handle.remove()


def test_one_forward_is_run_of_the_whole_model(model: Any, batch: Any) -> None:
    calls: list[int] = []
    handle = anatomy(model).vision_tower.register_forward_pre_hook(lambda _m, _a: calls.append(1))
    try:
        gradient_arithmetic(model, batch, gradient_checkpointing=True)
    finally:
        handle.remove()
    assert len(calls) == 1


def test_what_lies_outside_of_the_layers_is_named(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora={"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]})
    (note,) = gradient_arithmetic(model, batch, gradient_checkpointing=False).notes
    assert note.startswith("not judged: 2 trained tensors")
    assert "embed_tokens" in note


def test_the_model_is_left_as_it_was(model: Any, batch: Any) -> None:
    before = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    gradient_arithmetic(model, batch, gradient_checkpointing=True)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters() if name in before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


# --- damaged ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [FAULTS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in FAULTS[1:])])
def test_faults_of_gradients_are_named(model: Any, processor: Any, batch: Any, name: str) -> None:
    with apply(name, case_of(model, processor)) as damaged, pytest.raises(CheckFailed) as caught:
        gradient_arithmetic(damaged.model, batch, gradient_checkpointing=False)
    assert all(word in str(caught.value) for word in find(name).expected_words), str(caught.value)


def test_another_dropout_mask_is_named_only_where_checkpointing_makes_it(
    model: Any, processor: Any, batch: Any
) -> None:
    with apply(MASK, case_of(model, processor)) as damaged:
        assert gradient_arithmetic(damaged.model, batch, gradient_checkpointing=False).ok
        with pytest.raises(CheckFailed) as caught:
            gradient_arithmetic(damaged.model, batch, gradient_checkpointing=True)
    assert all(word in str(caught.value) for word in find(MASK).expected_words), str(caught.value)


@pytest.mark.parametrize("factor", [1.02])
def test_one_tensors_gradient_off_by_a_fiftieth_is_seen_in_float32(model: Any, batch: Any, factor: float) -> None:
    name, parameter = next((n, p) for n, p in model.named_parameters() if "layers.1.mlp.up_proj.lora_B" in n)
    handle = parameter.register_hook(lambda gradient: gradient * factor)
    try:
        with pytest.raises(CheckFailed, match=rf"layers\.1 mlp.up_proj.lora_B\S* has {factor} times its gradient"):
            gradient_arithmetic(model, batch, gradient_checkpointing=False)
    finally:
        handle.remove()
    assert "lora_B" in name


@pytest.mark.slow
def test_a_twentieth_in_one_layer_is_seen_in_float16(fresh_model: Any, processor: Any, batch: Any) -> None:
    damaged = case_of(fresh_model(dtype="float16", lora=True), processor, "float16")
    with gradient_times(damaged, 1.05):
        with pytest.raises(CheckFailed, match=r"layers\.2"):
            gradient_arithmetic(damaged.model, batch, gradient_checkpointing=False)


def test_a_row_that_the_loss_forgets_is_named(model: Any, batch: Any) -> None:
    base = model.get_base_model()
    right = base.loss_function
    base.loss_function = lambda logits, labels, **kwargs: right(
        torch.cat([logits[:1], logits[1:2].detach(), logits[2:]]), labels, **kwargs
    )
    try:
        with pytest.raises(CheckFailed, match="1 of 3 rows with labels give no gradient: row 1"):
            gradient_arithmetic(model, batch, gradient_checkpointing=False)
    finally:
        del base._loss_function


def test_batches_without_labels_are_refused(model: Any, batch: Any) -> None:
    with pytest.raises(InputError, match="needs labels"):
        gradient_arithmetic(
            model, {**batch, "labels": torch.full_like(batch["labels"], -100)}, gradient_checkpointing=False
        )


def test_a_loss_that_is_not_finite_has_no_derivative(model: Any, batch: Any) -> None:
    base = model.get_base_model()
    base.loss_function = lambda logits, labels, **_: logits.float().sum() * math.inf
    try:
        with pytest.raises(CannotJudge, match="has no derivative"):
            gradient_arithmetic(model, batch, gradient_checkpointing=False)
    finally:
        del base._loss_function


# --- arithmetic ------------------------------------------------------------------------------------------------


class Quartic:
    """A segment of one matrix and no hidden states: the sum of fourth powers, whose gradient is known."""

    name = "quartic"
    gradient: Any = None
    outgoing = None

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
        found.append(Noise.of(segment, torch.finfo(torch.float32).eps, 1.0).value * math.sqrt(3) / 1e-3)
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


def test_layers_that_are_not_judged_are_counted(model: Any) -> None:
    judge = Judge("gradient_arithmetic", "")
    segments: list[Any] = [Quartic(1.0), Noisy(1.0, 1e3)]
    _judge_segments(judge, anatomy(model), segments)
    found = {figure.name: figure.value for figure in judge.figures}
    assert (found["layers judged"], found["layers not judged"]) == (1, 1)
    assert judge.notes == ["NOT JUDGED in 1 of 2 layers, where rounding hides it: noisy (adapter)"]


def test_where_no_layer_is_judged_the_check_cannot_judge(model: Any) -> None:
    segments: list[Any] = [Noisy(1.0, 1e3)]
    with pytest.raises(
        CannotJudge, match=r"in each of 1 layers, or in a part of it: noisy \(adapter\); longer answers"
    ):
        _judge_segments(Judge("gradient_arithmetic", ""), anatomy(model), segments)


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


def test_a_layer_of_which_a_part_is_hidden_is_not_judged(model: Any) -> None:
    segments: list[Any] = [Half()]
    with pytest.raises(CannotJudge, match=r"noisy \(adapter\);"):
        _judge_segments(Judge("gradient_arithmetic", ""), anatomy(model), segments)


def test_beyond_a_quarter_neither_right_nor_wrong_is_judged(model: Any) -> None:
    """A ratio of 3 that is sure to 1.2 only: what is off by less would have passed as well."""
    for noise, is_judged in ((1e-4, True), (0.12, False)):
        segments: list[Any] = [Quartic(1.0), Noisy(1 / 3, noise)]
        judge = Judge("gradient_arithmetic", "")
        _judge_segments(judge, anatomy(model), segments)
        assert bool(judge.problems) is is_judged
        assert ("layers not judged" in {figure.name for figure in judge.figures}) is not is_judged


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
