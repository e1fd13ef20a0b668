"""Autograd's gradient against directional derivatives of the loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pytest_qvl.checks.gradients import gradient_arithmetic
from pytest_qvl.evidence import CannotJudge, CheckFailed, InputError
from pytest_qvl.faults import apply, find
from pytest_qvl.faults.case import Case
from pytest_qvl.faults.definitions.gradients import gradient_times
from pytest_qvl.faults.subject import embedded
from pytest_qvl.models.adapters import LANGUAGE_ONLY, adapted_layers
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


def norms_in_float32(model: Any) -> Any:
    """As QLoRA's own script sets a model up: it runs under autocast only."""
    for name, module in model.named_modules():
        if name.endswith("norm") and "visual" not in name:
            module.float()
    return model


@pytest.mark.parametrize("gradient_checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("setup", ["stream in float32", "norms in float32"])
def test_right_gradients_pass_under_autocast(
    fresh_model: Any, batch: Any, autocasting: Any, setup: str, gradient_checkpointing: bool
) -> None:
    """Layers run by themselves under the autocast that the model brought, and round as that does."""
    if setup == "stream in float32":
        model = fresh_model(dtype="float32", lora=True)
    else:
        model = norms_in_float32(fresh_model(dtype="bfloat16", quantized=False, lora=True))
    with autocasting(model, torch.bfloat16):
        found = figures(gradient_arithmetic(model, batch, gradient_checkpointing=gradient_checkpointing))
    assert found["layers judged"] >= len(anatomy(model).language_backbone.layers)  # as many as in bfloat16
    assert 0.01 < found["coarsest limit of a layer"] < 0.25


def test_adapted_layers_that_autocast_by_themselves_are_judged(fresh_model: Any, batch: Any, autocasting: Any) -> None:
    """No autocast is around a layer then, and what goes on is float32 again."""
    model = fresh_model(dtype="float32", lora=True)
    kind = type(next(iter(adapted_layers(anatomy(model)).values())))
    with autocasting(kind, torch.bfloat16):
        found = figures(gradient_arithmetic(model, batch, gradient_checkpointing=False))
    assert found["layers judged"] >= len(anatomy(model).language_backbone.layers)
    assert 0.01 < found["coarsest limit of a layer"] < 0.25


@pytest.mark.parametrize("name", ["gradient-a-quarter-too-large", pytest.param(FAULTS[-1], marks=pytest.mark.slow)])
def test_faults_are_named_where_autocast_rounds_a_stream_in_float32(
    fresh_model: Any, processor: Any, batch: Any, autocasting: Any, name: str
) -> None:
    damaged = case_of(fresh_model(dtype="float32", lora=True), processor)
    with apply(name, damaged), autocasting(damaged.model, torch.bfloat16), pytest.raises(CheckFailed) as caught:
        gradient_arithmetic(damaged.model, batch, gradient_checkpointing=False)
    assert all(word in str(caught.value) for word in find(name).expected_words), str(caught.value)


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gradient-a-quarter-too-large", "mlp-input-detached"])
def test_faults_are_named_on_a_short_batch_in_bfloat16(fresh_model: Any, processor: Any, name: str) -> None:
    rows = [sample for sample in scenes(seed=5, per_skill=1) if sample.skill in ("nth_colour", "text")]
    short = make_batch(processor, rows, padding_side="right", answers=True)
    damaged = case_of(fresh_model(dtype="bfloat16", lora=True), processor, "bfloat16")
    assert figures(gradient_arithmetic(damaged.model, short, gradient_checkpointing=False))["layers judged"] == 5
    with apply(name, damaged), pytest.raises(CheckFailed) as caught:
        gradient_arithmetic(damaged.model, short, gradient_checkpointing=False)
    assert all(word in str(caught.value) for word in find(name).expected_words), str(caught.value)


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
