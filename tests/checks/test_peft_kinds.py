"""Every kind of adapter that PEFT makes: what it adds is the adapter's, and the base model is what it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch

from pytest_qvl.checks import adapter_neutrality, adapter_roundtrip, checkpoint_complete, frozen_vision, training_step
from pytest_qvl.checks.support.adapter_effect import judge_effect
from pytest_qvl.evidence import CheckFailed, Judge
from pytest_qvl.models.adapters import adapter_parameters, remove_peft_layers
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.quantized import base_tensors
from pytest_qvl.models.training import trained_copies
from pytest_qvl.samples import make_batch, scenes

QV = r".*language_model.*\.(q_proj|v_proj)"
ADALORA = {"init_r": 6, "target_r": 4, "total_step": 20, "tinit": 2, "tfinal": 2, "deltaT": 1, "target_modules": QV}
KINDS = {
    "LoRA": lambda: peft.LoraConfig(r=4, target_modules=QV),
    "DoRA": lambda: peft.LoraConfig(r=4, target_modules=QV, use_dora=True),
    "AdaLoRA": lambda: peft.AdaLoraConfig(**ADALORA),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=QV),
    "VB-LoRA": lambda: peft.VBLoRAConfig(r=4, num_vectors=8, vector_length=32, target_modules=QV),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=QV),
    "IA3": lambda: peft.IA3Config(target_modules=r".*language_model.*\.(k_proj|v_proj)", feedforward_modules=[]),
    "token rows": lambda: peft.LoraConfig(r=4, target_modules=QV, trainable_token_indices={"embed_tokens": [1, 2]}),
    "copies": lambda: peft.LoraConfig(r=4, target_modules=QV, modules_to_save=["lm_head"]),
}


@pytest.fixture(scope="module")
def batch(processor: Any) -> dict[str, torch.Tensor]:
    return make_batch(processor, [scenes(seed=5, per_skill=1)[1]], answers=True)


@pytest.fixture(scope="module")
def base(fresh_model: Any) -> Any:
    return fresh_model(quantized=False)


@pytest.fixture(scope="module")
def bare_linears(base: Any) -> list[str]:
    return [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)]


@pytest.fixture(params=KINDS)
def adapted(base: Any, bare_linears: list[str], request: pytest.FixtureRequest) -> Iterator[Any]:
    yield peft.get_peft_model(base, KINDS[request.param]())
    remove_peft_layers(base)
    base.requires_grad_(False)


def test_a_parameter_is_the_bases_or_the_adapters(
    adapted: Any, bare_linears: list[str], batch: Any, tiny_dir: Any
) -> None:
    parts = anatomy(adapted)
    own = {id(p) for p in (*adapter_parameters(parts).values(), *trained_copies(parts).values())}
    of_base = {id(tensor) for _, tensor in base_tensors(parts)}
    assert own
    assert not own & of_base
    assert {id(p) for p in parts.base.parameters()} <= own | of_base
    assert [name for name, _ in parts.named_linears()] == bare_linears
    assert checkpoint_complete(adapted, tiny_dir).ok
    assert frozen_vision(adapted, batch).ok


@pytest.fixture(scope="module")
def adalora(fresh_model: Any) -> Any:
    """In bfloat16: PEFT casts the ranks to the dtype of the base, which makes them trainable parameters."""
    torch.manual_seed(0)
    model = peft.get_peft_model(fresh_model(quantized=False, dtype="bfloat16"), peft.AdaLoraConfig(**ADALORA))
    assert all(p.requires_grad for n, p in model.named_parameters() if "ranknum" in n)
    return model


def test_adaloras_ranks_are_no_base_tensors(adalora: Any, batch: Any) -> None:
    assert frozen_vision(adalora, batch).ok


def test_a_fresh_adalora_is_neutral_and_learns(adalora: Any, batch: Any) -> None:
    evidence = adapter_neutrality(adalora, batch)
    assert "adapter with B = 0, eval mode: largest logit change" in {figure.name for figure in evidence.figures}
    step = training_step(adalora, batch, gradient_checkpointing=False)
    assert "first step (E = 0): A and B matrices with a gradient" in {figure.name for figure in step.figures}


def test_a_penalised_adalora_whose_a_bypasses_e_is_named(base: Any, batch: Any) -> None:
    """With a task type PEFT's forward adds a penalty, whose gradient must not hide that of the answers."""
    model = peft.get_peft_model(base, peft.AdaLoraConfig(**ADALORA, task_type=peft.TaskType.CAUSAL_LM))
    name = "model.language_model.layers.1.self_attn.v_proj"
    layer = anatomy(model).base.get_submodule(name)
    hook = layer.register_forward_hook(
        lambda layer, args, out: out + (args[0] @ layer.lora_A["default"].T).mean(-1, keepdim=True)
    )
    try:
        with pytest.raises(CheckFailed) as failed:
            training_step(model, batch, gradient_checkpointing=False)
    finally:
        hook.remove()
        remove_peft_layers(base)
        base.requires_grad_(False)
    assert f"1 A and B matrices have a gradient although it is multiplied by E = 0, first {name}.lora_A" in str(
        failed.value
    )


def test_an_adalora_whose_singular_values_are_zero_does_nothing(adalora: Any) -> None:
    judge = Judge("adapter_roundtrip", "an adapter does something")
    judge_effect(judge, anatomy(adalora), "default", "the file")
    assert "(E is all zero in 8" in judge.problems[0]


def test_what_peft_does_not_save_of_adalora_is_a_note(adalora: Any) -> None:
    (note,) = adapter_roundtrip(adalora).notes
    assert "PEFT does not save ranknum" in note
    assert "rank allocation starts again; 8 of 8 ranknum require grad" in note
    assert "no longer" not in note
    number = next(p for n, p in adalora.named_parameters() if "ranknum" in n)
    with torch.no_grad():
        number.sub_(1)
    try:
        assert (
            "1 are no longer their layer's rank: model.language_model.layers.0.self_attn.q_proj (5, loaded as 6)"
            in (adapter_roundtrip(adalora).notes[0])
        )
    finally:
        with torch.no_grad():
            number.add_(1)
