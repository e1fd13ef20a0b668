"""Which tensors a step has to move: asked of the real optimizers, on tensors of a dtype that keeps it or loses it."""

from __future__ import annotations

import pytest
import torch

from pytest_qvl.training import Guard, GuardError
from pytest_qvl.training.replay import CannotReplayError, rule_stands_still, rule_takes_no_step, state_of

from .test_guard import record_of


def after_steps(optimizer_class, dtype, rate, *, steps, value=1.0, **settings):
    """A tensor with momentum, and the optimizer's state before a further step."""
    parameter = torch.nn.Parameter(torch.full((8,), value, dtype=dtype))
    optimizer = optimizer_class([parameter], lr=rate, **settings)
    for step in range(steps):
        parameter.grad = torch.full_like(parameter, (-1) ** step)
        optimizer.step()
    state = state_of(optimizer, parameter, copied=True)
    parameter.grad = torch.ones_like(parameter)
    return optimizer, parameter, state


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adafactor, {}),
    ],
    ids=["adamw", "momentum", "adafactor"],
)
@pytest.mark.parametrize("steps", [0, 3])
def test_a_dtype_that_loses_a_step_is_told_from_one_that_keeps_it(optimizer, settings, steps):
    lost = after_steps(optimizer, torch.bfloat16, 1e-6, steps=steps, **settings)
    kept = after_steps(optimizer, torch.float32, 1e-3, steps=steps, **settings)
    assert rule_stands_still(*lost)
    assert not rule_stands_still(*kept)


def test_the_answer_is_what_the_optimizer_then_does():
    stood, asked = [], []
    for rate in torch.logspace(-3.5, -1.5, 25).tolist():  # half of a last place below 1 is 2^-9 in bfloat16
        optimizer, parameter, state = after_steps(torch.optim.AdamW, torch.bfloat16, rate, steps=2, weight_decay=0.0)
        before = parameter.detach().clone()
        asked.append(rule_stands_still(optimizer, parameter, state))
        optimizer.step()
        stood.append(torch.equal(before, parameter.detach()))
    assert asked == stood
    assert set(stood) == {True, False}


def test_an_optimizer_that_takes_no_step_does_not_pass_for_a_small_one():
    class Never(torch.optim.AdamW):
        def step(self, closure=None):
            return None

    assert rule_takes_no_step(*after_steps(Never, torch.float32, 1e-3, steps=1))
    assert not rule_takes_no_step(*after_steps(torch.optim.AdamW, torch.bfloat16, 1e-6, steps=1))


def test_a_class_that_cannot_be_made_again_says_so():
    class OfItsOwn(torch.optim.AdamW):
        def __init__(self, parameters, *, lr, must):
            super().__init__(parameters, lr=lr)

    with pytest.raises(CannotReplayError, match="OfItsOwn cannot be made a second time"):
        rule_stands_still(*after_steps(OfItsOwn, torch.float32, 1e-3, steps=1, must=0))


@pytest.mark.parametrize(("dtype", "rate"), [("bfloat16", 1e-6), ("float32", 1e-30)])
def test_a_learning_rate_too_small_for_the_dtype_is_no_finding(bench, tmp_path, dtype, rate):
    with bench.model(dtype) as model:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(getattr(torch, dtype))
        settings = {"bf16": dtype == "bfloat16", "max_steps": 3, "per_device_train_batch_size": 1}
        bench.trainer(model, tmp_path, Guard(), learning_rate=rate, **settings).train()
    record = record_of(tmp_path)
    assert "adapter_moved" not in record["not_judged"]
    notes = record["judged"]["adapter_moved"]["last"]["notes"]
    assert any("keeps no step as small" in note for note in notes)


def test_a_tensor_that_is_put_back_is_found_at_the_step_that_decides(bench, tmp_path):
    from transformers import TrainerCallback

    class PutsBack(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.before = {n: p.detach().clone() for n, p in model.named_parameters() if "0.mlp.up_proj.lora_A" in n}

        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            for name, value in self.before.items():
                model.get_parameter(name).data.copy_(value)

    with bench.model() as model:
        trainer = bench.trainer(model, tmp_path, PutsBack(), Guard(), max_steps=4, per_device_train_batch_size=1)
        with pytest.raises(GuardError, match="step [23] did not move 1 of 56") as stopped:
            trainer.train()
    assert stopped.value.check == "adapter_moved"


@pytest.mark.parametrize("takes_steps", [False, True])
def test_an_optimizer_with_a_constructor_of_its_own(bench, tmp_path, takes_steps):
    class OfTheModel(torch.optim.SGD):
        def __init__(self, model):
            super().__init__([p for p in model.parameters() if p.requires_grad], lr=1e-2)

        def step(self, closure=None):
            return super().step(closure) if takes_steps else None

    with bench.model() as model:
        trainer = bench.trainer(model, tmp_path, Guard(), max_steps=1, optimizers=(OfTheModel(model), None))
        if takes_steps:
            trainer.train()
        else:
            with pytest.raises(GuardError, match="its step is not taken") as stopped:
                trainer.train()
            assert stopped.value.check == "adapter_moved"
