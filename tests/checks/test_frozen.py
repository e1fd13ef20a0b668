"""Frozen vision: nothing but the adapter moves in training, and every smallest move of anything else is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pytest_qvl.checks.backpropagation import vision_not_backpropagated
from pytest_qvl.checks.frozen import frozen_vision
from pytest_qvl.checks.training import training_step
from pytest_qvl.evidence import CannotJudge, CheckFailed, ModelCrashed
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.fingerprint.digests import digests
from pytest_qvl.models.policy import AdapterPolicy
from pytest_qvl.models.quantized import base_tensors
from pytest_qvl.samples import make_batch, scenes


@pytest.fixture(scope="module")
def batch(processor: Any) -> dict[str, torch.Tensor]:
    samples = scenes(seed=5, per_skill=1)
    return make_batch(processor, [samples[1], samples[9]], answers=True)


def refused(model: Any, batch: Any, **kwargs: Any) -> str:
    with pytest.raises(CheckFailed) as caught:
        frozen_vision(model, batch, **kwargs)
    return str(caught.value)


def core(model: Any) -> Any:
    return anatomy(model).core


class Meddling(torch.optim.AdamW):
    """A real optimizer that does one thing more in its first step."""

    def __init__(self, parameters: Any, meddle: Any) -> None:
        super().__init__(parameters, lr=1e-3, weight_decay=0.0)
        self.meddle = meddle

    def step(self, closure: Any = None) -> Any:
        first = not self.state
        loss = super().step(closure)
        if first:
            with torch.no_grad():
                self.meddle()
        return loss


def meddling(meddle: Any) -> Any:
    return lambda parameters: Meddling(parameters, meddle)


@pytest.mark.parametrize(
    ("load", "lora"),
    [
        ({}, {}),
        ({}, {"lora_dropout": 0.1, "use_dora": True, "modules_to_save": ["lm_head"]}),
        ({}, {"init_lora_weights": False, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        ({}, {"trainable_token_indices": [3, 4]}),
        ({"dtype": "float32"}, {"use_rslora": True}),
        ({"dtype": "float16"}, {}),
        ({"quantized": False}, {}),
    ],
    ids=str,
)
def test_healthy_models_pass(fresh_model: Any, batch: Any, load: Any, lora: Any) -> None:
    evidence = frozen_vision(fresh_model(lora=lora, **load), batch)
    assert evidence.ok
    assert not evidence.notes
    assert next(f for f in evidence.figures if f.name == "adapter tensors that moved").value > 0


@pytest.mark.parametrize(
    ("dtype", "compute"), [("float32", "bfloat16"), ("bfloat16", "float16"), ("bfloat16", "float32")]
)
def test_the_bias_cast_of_bitsandbytes_is_a_note(fresh_model: Any, batch: Any, dtype: str, compute: str) -> None:
    model = fresh_model(dtype=dtype, bnb_4bit_compute_dtype=getattr(torch, compute), lora=True)
    evidence = frozen_vision(model, batch)
    assert f"12 biases were cast in place from {dtype} to {compute}" in evidence.notes[0]
    if compute == "bfloat16":
        assert not frozen_vision(model, batch).notes  # the second time there is nothing left to cast


def test_prepared_for_kbit_training_with_checkpointing(fresh_model: Any, batch: Any, lora_config: Any) -> None:
    from peft import get_peft_model, prepare_model_for_kbit_training

    prepared = prepare_model_for_kbit_training(fresh_model(), gradient_checkpointing_kwargs={"use_reentrant": False})
    assert frozen_vision(get_peft_model(prepared, lora_config()), batch).ok


def test_several_batches_and_user_optimizers(fresh_model: Any, processor: Any) -> None:
    samples = scenes(seed=8, per_skill=1)
    batches = [
        make_batch(processor, samples[at : at + 2], answers=True, padding_side=side)
        for at, side in ((7, "left"), (0, "right"), (9, "left"))
    ]
    model = fresh_model(lora=True)
    evidence = frozen_vision(model, batches, steps=3, make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    assert evidence.ok


def test_everything_is_put_back_bitwise(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora={"init_lora_weights": False, "modules_to_save": ["lm_head"]})
    model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)

    def state() -> Any:
        return (
            digests(model.named_parameters()),
            digests(base_tensors(anatomy(model))),
            [(m.training, len(m._forward_hooks)) for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
            torch.get_rng_state().tolist(),
        )

    grads = [p.grad for p in model.parameters()]
    before = state()
    frozen_vision(model, batch)
    assert state() == before
    assert all(a is b for a, b in zip(grads, [p.grad for p in model.parameters()], strict=True))
    assert all(g is None or bool((g == 1).all()) for g in grads)


def test_weights_are_put_back_when_training_breaks(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora=True)
    before = digests(model.named_parameters())

    def explode() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(ModelCrashed, match="RuntimeError: out of memory"):
        frozen_vision(model, batch, make_optimizer=meddling(explode))
    assert digests(model.named_parameters()) == before


# --- trained on purpose ------------------------------------------------------------------------------------

VISION_TOO = {"target_modules": r".*(language_model|visual).*\.(q_proj|v_proj|qkv|attn\.proj)"}


def test_vision_adapted_on_purpose(fresh_model: Any, batch: Any) -> None:
    """Declared, its base still has to stay; not declared, it is red."""
    model = fresh_model(dtype="float32", lora=VISION_TOO)
    policy = AdapterPolicy(("language", "vision"))
    assert "visual tokens are not compared: vision (16) tensors" in frozen_vision(model, batch, policy=policy).notes[0]
    for other, declared in (
        (None, "language, lm_head, embeddings, vision"),
        ("language, merger", "language, merger, "),
    ):
        message = refused(model, batch, policy=other and AdapterPolicy.parse(other))
        assert "the vision tower's output is not bitwise what it was" in message
        assert "the adapter 'default' sits in vision (8): model.visual.blocks.0.attn.qkv, " in message
        assert f"qvl_adapter_policy (--qvl-adapter-policy, ini or fixture) = '{declared}" in message
    weight = core(model).visual.blocks[2].attn.qkv.base_layer.weight
    message = refused(model, batch, policy=policy, make_optimizer=meddling(flip(weight.data)))
    assert message.startswith("1 of ")
    assert "model.visual.blocks.2.attn.qkv.weight" in message.splitlines()[0]


def test_a_merger_trained_on_purpose(fresh_model: Any, batch: Any) -> None:
    copied = fresh_model(dtype="float32", lora={"modules_to_save": ["merger"]})
    assert "merger (5) tensors" in frozen_vision(copied, batch, policy=AdapterPolicy(("language", "merger"))).notes[0]
    message = refused(copied, batch)
    assert "output is not bitwise" in message
    assert "the adapter 'default' sits in merger (3): " in message
    assert "fixture) = 'language, lm_head, embeddings, merger'" in message

    own = fresh_model(dtype="float32", lora=True)
    for parameter in anatomy(own).merger.parameters():
        parameter.requires_grad_(True)
    policy = AdapterPolicy.parse("language, merger:full")
    assert "merger (5) tensors" in frozen_vision(own, batch, policy=policy).notes[0]
    assert training_step(own, batch, gradient_checkpointing=False, policy=policy).ok
    message = refused(own, batch, policy=AdapterPolicy(("language", "merger")))
    assert "5 base tensors require grad" in message
    assert "or declare what is trained on purpose: qvl_adapter_policy (--qvl-adapter-policy, ini" in message
    assert "= 'language, merger:full'" in message
    with pytest.raises(CannotJudge, match=r"not frozen as declared \(qvl_adapter_policy\): 5 of its tensors"):
        vision_not_backpropagated(own, batch, gradient_checkpointing=False, policy=policy)


# --- damaged -----------------------------------------------------------------------------------------------


def test_an_unfrozen_merger_is_named_even_if_rounding_holds_it_still(fresh_model: Any, batch: Any) -> None:
    """A bfloat16 weight near 1 does not move by 1e-3; that it is trained at all is the defect."""
    model = fresh_model(lora=True)
    core(model).visual.merger.ln_q.weight.requires_grad_(True)
    message = refused(model, batch)
    assert message.startswith(
        "1 base tensors require grad and go to the optimizer, in merger (1): model.visual.merger.ln_q.weight"
    )


def test_an_unfrozen_merger_that_moves_is_put_back(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(dtype="float32", lora=True)
    weight = core(model).visual.merger.mlp[0].weight.requires_grad_(True)
    before = weight.detach().clone()
    message = refused(model, batch)
    assert "1 base tensors moved, in merger (1)" not in message.splitlines()[0]
    assert "base tensors moved, in merger (1): model.visual.merger.mlp.0.weight; all of them require grad" in message
    assert "the vision tower's output is not bitwise what it was" in message
    assert torch.equal(weight, before)


def flip(tensor: torch.Tensor) -> Any:
    """Flip the lowest bit of one byte."""
    place = tensor.numel() // 2

    def meddle() -> None:
        tensor.view(-1).view(torch.uint8)[place] ^= 1

    return meddle


@pytest.mark.parametrize(
    ("where", "name", "group"),
    [
        (lambda c: c.visual.blocks[2].attn.qkv.weight, "model.visual.blocks.2.attn.qkv.weight", "vision"),
        (lambda c: c.visual.blocks[0].norm1.weight, "model.visual.blocks.0.norm1.weight", "vision"),
        (lambda c: c.visual.merger.mlp[2].bias, "model.visual.merger.mlp.2.bias", "merger"),
        (lambda c: c.language_model.embed_tokens.weight, "model.language_model.embed_tokens.weight", "embeddings"),
        (lambda c: c.language_model.layers[1].self_attn.q_proj.base_layer.weight, "q_proj.weight", "language"),
        (
            lambda c: c.language_model.layers[1].self_attn.q_proj.base_layer.weight.quant_state.absmax,
            "q_proj.weight.absmax",
            "language",
        ),
        (
            lambda c: c.language_model.layers[1].mlp.up_proj.base_layer.weight.quant_state.state2.absmax,
            "up_proj.weight.nested_absmax",
            "language",
        ),
        (
            lambda c: c.language_model.layers[1].self_attn.k_proj.base_layer.bias,
            "model.language_model.layers.1.self_attn.k_proj.bias",
            "language",
        ),
        (lambda c: c.language_model.norm.weight, "model.language_model.norm.weight", "language"),
        (lambda c: c.language_model.rotary_emb.inv_freq, "model.language_model.rotary_emb.inv_freq", "language"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_bit_anywhere_in_the_base_is_seen(fresh_model: Any, batch: Any, where: Any, name: str, group: str) -> None:
    model = fresh_model(lora=True)
    message = refused(model, batch, make_optimizer=meddling(flip(where(core(model)).data)))
    first = message.splitlines()[0]
    assert first.startswith("1 of ")
    assert f"base tensors moved, in {group} (1)" in first
    assert name in first
    assert "1 of them do not require grad, so something wrote into them" in first


def test_a_permutation_that_keeps_every_sum(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora=True)
    weight = core(model).visual.blocks[0].mlp.up_proj.weight

    def swap() -> None:
        weight.data[[0, 1]] = weight.data[[1, 0]]

    message = refused(model, batch, make_optimizer=meddling(swap))
    assert "model.visual.blocks.0.mlp.up_proj.weight" in message


def test_an_adapter_tensor_that_the_optimizer_forgot(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora=True)
    message = refused(model, batch, make_optimizer=lambda p: torch.optim.AdamW(p[1:], weight_decay=0.0))
    assert message.startswith(
        "1 of 56 adapter tensors did not move in 2 steps: "
        "model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight"
    )


def test_an_adapter_that_is_cut_off_from_the_loss(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora=True)
    layer = core(model).language_model.layers[3].mlp.down_proj
    layer.forward = layer.base_layer.forward
    message = refused(model, batch)
    assert message.startswith("2 of 56 adapter tensors did not move")
    assert "layers.3.mlp.down_proj.lora_A.default.weight" in message


def test_a_frozen_adapter_that_moves(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora=True)
    tensor = core(model).language_model.layers[0].self_attn.q_proj.lora_A["default"].weight.requires_grad_(False)
    message = refused(model, batch, make_optimizer=meddling(flip(tensor.data)))
    assert "1 adapter tensors that do not require grad moved" in message


def test_a_forward_that_writes_into_the_base(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora=True)
    weight = core(model).visual.blocks[1].norm2.weight

    def write(*_: Any) -> None:
        weight.data.add_(0.5)

    core(model).visual.register_forward_pre_hook(write)
    assert refused(model, batch).startswith(
        "a forward without any training step changed 1 base tensors: model.visual.blocks.1.norm2.weight"
    )


def test_a_cast_that_is_more_than_a_cast(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(dtype="bfloat16", lora=True)
    bias = core(model).language_model.layers[0].self_attn.q_proj.base_layer.bias

    def cast_and_change(*_: Any) -> None:
        if bias.dtype != torch.float32:
            bias.data = bias.data.float() + 1

    core(model).language_model.layers[0].register_forward_pre_hook(cast_and_change)
    message = refused(model, batch)
    assert "a forward without any training step changed 1 base tensors" in message
    assert "self_attn.q_proj.bias" in message


def test_vision_features_are_compared_themselves(fresh_model: Any, batch: Any) -> None:
    """Weights untouched, but the tower computes something else after training."""
    model = fresh_model(lora=True)
    shift = torch.zeros(1)
    core(model).visual.merger.register_forward_hook(lambda _m, _a, out: out + shift.to(out.dtype))
    message = refused(model, batch, make_optimizer=meddling(lambda: shift.add_(1)))
    assert message.startswith("the vision tower's output is not bitwise what it was before training: batch 0")


# --- cannot judge ------------------------------------------------------------------------------------------


def test_inputs_that_cannot_decide(fresh_model: Any, lora_model: Any, processor: Any, batch: Any) -> None:
    text = make_batch(processor, [s for s in scenes(seed=1, per_skill=1) if not s.images], answers=True)
    with pytest.raises(CannotJudge, match="no batch has images"):
        frozen_vision(lora_model, text)
    with pytest.raises(ValueError, match="needs labels"):
        frozen_vision(lora_model, {k: v for k, v in batch.items() if k != "labels"})
    with pytest.raises(ValueError, match="no supervised token"):
        frozen_vision(lora_model, {**batch, "labels": torch.full_like(batch["labels"], -100)})
    with pytest.raises(ValueError, match="steps must be at least 2, got 1"):
        frozen_vision(lora_model, batch, steps=1)
    with pytest.raises(ValueError, match="carries no adapter"):
        frozen_vision(fresh_model(), batch)
    frozen = fresh_model(lora=True).requires_grad_(False)
    with pytest.raises(ValueError, match="no adapter parameter requires grad"):
        frozen_vision(frozen, batch)


def test_a_tower_that_does_not_repeat(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora=True)
    noise = torch.Generator().manual_seed(1)
    core(model).visual.merger.register_forward_hook(
        lambda _m, _a, out: out + torch.randn(out.shape, generator=noise).to(out.dtype)
    )
    with pytest.raises(CannotJudge, match="do not repeat bitwise"):
        frozen_vision(model, batch)
