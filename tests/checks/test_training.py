"""The training step, the spared vision tower and the label mask: each fails for its own reason only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import transformers

from pytest_qvl.checks.backpropagation import vision_not_backpropagated
from pytest_qvl.checks.frozen import frozen_vision
from pytest_qvl.checks.labels import label_mask
from pytest_qvl.checks.support.descent import Move, descent
from pytest_qvl.checks.support.teaching import WRONG_RANK, with_wrong_labels
from pytest_qvl.checks.training import training_step
from pytest_qvl.evidence import CannotJudge, CheckFailed, Evidence
from pytest_qvl.faults.matrix.random_models import RANDOM_FAMILIES, random_model
from pytest_qvl.faults.tools import attribute
from pytest_qvl.models.adapters import LANGUAGE_ONLY
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.backends.transformers import TransformersBackend, remove_vision_grad_hooks
from pytest_qvl.models.fingerprint.digests import digests
from pytest_qvl.models.quantized import base_tensors
from pytest_qvl.samples import make_batch, scenes

TRANSFORMERS_4 = transformers.__version__.startswith("4.")
FIRST = "model.language_model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def batch(processor: Any) -> dict[str, torch.Tensor]:
    samples = scenes(seed=5, per_skill=1)
    return make_batch(processor, [samples[1], samples[9]], answers=True)


@pytest.fixture(scope="module")
def mixed(processor: Any) -> dict[str, torch.Tensor]:
    """All ten skills: one, two or three pictures and none, answers of one and of several tokens."""
    return make_batch(processor, scenes(seed=5, per_skill=1), answers=True)


def refused(check: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(CheckFailed) as caught:
        check(*args, **kwargs)
    return str(caught.value)


def figure(evidence: Evidence, name: str) -> Any:
    return next(f.value for f in evidence.figures if f.name == name)


def step(model: Any, batch: Any, *, gradient_checkpointing: bool = False, **kwargs: Any) -> Evidence:
    return training_step(model, batch, gradient_checkpointing=gradient_checkpointing, **kwargs)


def backbone(model: Any) -> Any:
    return anatomy(model).language_backbone


def enable_checkpointing(model: Any, use_reentrant: bool | None) -> None:
    """As a user does it, by the name that this release has for it."""
    kwargs = None if use_reentrant is None else {"use_reentrant": use_reentrant}
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(kwargs)


# --- training step: healthy --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "lora"),
    [
        ({}, {"lora_dropout": 0.1}),
        ({}, {"r": 4, "lora_alpha": 4, "init_lora_weights": "gaussian"}),
        ({}, {"r": 64, "lora_alpha": 16, "use_rslora": True}),
        ({}, {"use_dora": True, "modules_to_save": ["lm_head"]}),
        ({}, {"init_lora_weights": False}),
        ({}, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        ({}, {"trainable_token_indices": [3, 4]}),
        ({}, {"target_modules": "all-linear"}),
        ({"dtype": "float32"}, {}),
        ({"dtype": "float16"}, {}),
        ({"dtype": "float32", "bnb_4bit_compute_dtype": torch.float16}, {}),
    ],
    ids=str,
)
def test_every_healthy_kind_learns(fresh_model: Any, batch: Any, load: Any, lora: Any) -> None:
    evidence = step(fresh_model(lora=lora, **load), batch)
    assert figure(evidence, "loss on wrong answers at first") >= 1
    assert figure(evidence, "optimizer steps taken") <= 12


@pytest.mark.parametrize("seed", range(3))
def test_no_false_alarm_over_seeds(fresh_model: Any, processor: Any, seed: int) -> None:
    samples = scenes(seed=100 + seed, per_skill=1)[seed : seed + 3]
    model = fresh_model(lora=True, seed=seed)
    checkpointing = bool(seed % 2)
    assert step(model, make_batch(processor, samples, answers=True), gradient_checkpointing=checkpointing).ok


def test_all_skills_in_one_batch(fresh_model: Any, mixed: Any) -> None:
    assert step(fresh_model(lora=True), mixed, gradient_checkpointing=True).ok


@pytest.mark.parametrize("use_reentrant", [None, True, False])
@pytest.mark.parametrize("first", ["checkpointing", "adapter"])
def test_users_own_checkpointing_trains(
    fresh_model: Any, batch: Any, lora_config: Any, use_reentrant: bool | None, first: str
) -> None:
    from peft import get_peft_model

    model = fresh_model()
    if first == "checkpointing":
        enable_checkpointing(model, use_reentrant)
        model.enable_input_require_grads()
        wrapped = get_peft_model(model, lora_config())
    else:
        wrapped = get_peft_model(model, lora_config())
        enable_checkpointing(model, use_reentrant)
        model.enable_input_require_grads()
    if not TRANSFORMERS_4:
        assert "make_inputs_require_grads" in refused(
            vision_not_backpropagated, wrapped, batch, gradient_checkpointing=True
        )
    remove_vision_grad_hooks(anatomy(wrapped).patch_embed)
    assert step(wrapped, batch, gradient_checkpointing=True).ok
    assert vision_not_backpropagated(wrapped, batch, gradient_checkpointing=True).ok


def test_a_narrow_random_model_is_no_false_alarm(fresh_model: Any, batch: Any) -> None:
    """Head and embeddings small enough that no hidden state can halve the loss."""
    model = fresh_model(lora=True)
    with torch.no_grad():
        anatomy(model).lm_head.weight.normal_(std=0.01, generator=torch.Generator().manual_seed(0))
    evidence = step(model, batch)
    floor = figure(evidence, "smallest loss that the frozen head allows")
    first = figure(evidence, "loss on wrong answers at first")
    assert first / 2 < floor < first


def test_what_the_backend_prepares(fresh_model: Any, batch: Any) -> None:
    for checkpointing in (False, True):
        model = fresh_model(lora=True)
        TransformersBackend().prepare_training(model, gradient_checkpointing=checkpointing)
        assert step(model, batch, gradient_checkpointing=checkpointing).ok
        assert vision_not_backpropagated(model, batch, gradient_checkpointing=checkpointing).ok


def test_a_training_step_leaves_no_trace(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora={"init_lora_weights": False, "modules_to_save": ["lm_head"]})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)

    def state() -> Any:
        return (
            digests(model.named_parameters()),
            digests(base_tensors(anatomy(model))),
            [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
            [vars(m).get("gradient_checkpointing") for m in model.modules()],
            [vars(m).get("_gradient_checkpointing_func") for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
            torch.get_rng_state().tolist(),
        )

    grads = [p.grad for p in model.parameters()]
    before = state()
    step(model, batch, gradient_checkpointing=True)
    vision_not_backpropagated(model, batch, gradient_checkpointing=True)
    assert state() == before
    assert all(a is b for a, b in zip(grads, [p.grad for p in model.parameters()], strict=True))
    assert all(g is None or bool((g == 1).all()) for g in grads)


def test_wrong_answers_are_wrong_and_worth_a_nat(fresh_model: Any, mixed: Any) -> None:
    taught = mixed["labels"] != -100
    for model in (fresh_model(), fresh_model(quantized=False, dtype="float32")):
        wrong = with_wrong_labels(anatomy(model), mixed)
        assert bool((wrong["labels"] != -100).eq(taught).all())
        answers = set(wrong["labels"][taught].tolist())
        assert len(answers) == 1
        assert not answers & set(mixed["labels"][taught].tolist())
        with torch.no_grad():
            assert float(model(**wrong).loss) >= math.log(WRONG_RANK) - 1e-5


# --- training step: damaged --------------------------------------------------------------------------------


def test_a_layer_without_a_path_is_named(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora=True)
    layer = backbone(model).layers[2].mlp.up_proj
    layer.forward = layer.base_layer.forward
    message = refused(step, model, batch)
    assert message.startswith("first step (B = 0): the gradient has no path to 1 of 28 adapter tensors")
    assert "model.language_model.layers.2.mlp.up_proj.lora_B.default.weight" in message
    assert "second step: the gradient has no path to 2 of 56 adapter tensors" in message


def test_a_gradient_that_is_cut_inside_a_layer(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora=True)
    layer = backbone(model).layers[2].mlp.up_proj
    layer.lora_A["default"].register_forward_hook(lambda _m, _a, out: out.detach())
    message = refused(step, model, batch)
    assert message.startswith("second step: the gradient has no path to 1 of 56 adapter tensors")
    assert "model.language_model.layers.2.mlp.up_proj.lora_A.default.weight" in message


def test_a_scaling_of_zero_reaches_nothing(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora=True)
    backbone(model).layers[1].self_attn.v_proj.scaling["default"] = 0.0
    message = refused(step, model, batch)
    assert message.startswith("first step (B = 0): the gradient is exactly zero at 1 of 28 adapter tensors")
    assert "layers.1.self_attn.v_proj.lora_B" in message


def test_reentrant_checkpointing_without_inputs_that_require_grad(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora=True)
    enable_checkpointing(anatomy(model).base, True)
    for module in model.modules():
        for key in [k for k, h in module._forward_hooks.items() if "require_grads" in getattr(h, "__name__", "")]:
            del module._forward_hooks[key]
    message = refused(step, model, batch, gradient_checkpointing=True)
    assert "the gradient has no path to 28 of 28 adapter tensors" in message
    assert "reentrant checkpointing drops the gradient where no input requires grad" in message
    assert step(model, batch, gradient_checkpointing=False).ok


def test_vision_adapters_under_reentrant_checkpointing(fresh_model: Any, batch: Any) -> None:
    """The towers' own first input has no gradient (huggingface/peft#2880): only the tower's adapters go silent."""
    model = fresh_model(lora={"target_modules": "all-linear"})
    enable_checkpointing(anatomy(model).base, True)
    anatomy(model).base.enable_input_require_grads()
    remove_vision_grad_hooks(anatomy(model).patch_embed)
    message = refused(step, model, batch, gradient_checkpointing=True)
    assert "model.visual.blocks.0.attn.qkv.lora_B.default.weight" in message
    assert "model.language_model" not in message.splitlines()[0]


def test_one_gradient_that_is_not_finite(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora=True)
    weight = backbone(model).layers[1].mlp.down_proj.lora_B["default"].weight
    weight.register_hook(lambda grad: grad * float("inf"))
    message = refused(step, model, batch)
    assert message.startswith("first step (B = 0): 1 of 56 gradients are not finite, first ")
    assert "layers.1.mlp.down_proj.lora_B.default.weight" in message


def test_a_forward_that_is_not_b_times_a(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora=True)
    layer = backbone(model).layers[1].self_attn.o_proj
    plain = layer.forward
    layer.forward = lambda x: plain(x) + layer.lora_A["default"](x.float()).mean(-1, keepdim=True).to(x.dtype)
    message = refused(step, model, batch)
    assert "1 A matrices have a gradient although it is multiplied by B = 0" in message
    assert "layers.1.self_attn.o_proj.lora_A" in message


def test_an_optimizer_that_does_not_learn(fresh_model: Any, batch: Any) -> None:
    message = refused(step, fresh_model(lora=True), batch, learning_rate=1e-7, steps_to_halve=3)
    assert message.startswith("the loss did not halve in 3 optimizer steps at learning rate 1e-07: it went ")


def test_gradients_with_the_wrong_sign(plain_model: Any, batch: Any) -> None:
    """The first-order promise tells them from an adapter that is only slow."""
    hooks = [p.register_hook(lambda grad: -grad) for p in plain_model.parameters() if p.requires_grad]
    try:
        message = refused(step, plain_model, batch, steps_to_halve=3)
    finally:
        for hook in hooks:
            hook.remove()
    assert message.startswith("the loss did not halve in 3 optimizer steps at learning rate 0.00")


def test_an_adapter_too_small_to_halve_the_loss_is_told_by_its_first_order(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora={"target_modules": r".*language_model\.layers\.0\..*\.q_proj"})
    evidence = step(model, batch, steps_to_halve=4)
    assert evidence.notes[0].startswith("the loss did not halve in 4 optimizer steps")
    assert "it falls as its gradient promises (-" in evidence.notes[0]


@pytest.mark.parametrize(
    "lora",
    [
        {"rank_pattern": {"q_proj": 32}, "alpha_pattern": {"q_proj": 64}},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"r": 8, "lora_alpha": 256},
    ],
    ids=str,
)
def test_each_layer_learns_at_a_rate_of_its_own(fresh_model: Any, batch: Any, lora: Any) -> None:
    """One layer with a large gain used to slow all others down."""
    assert figure(step(fresh_model(lora=lora), batch), "optimizer steps taken") <= 20


# --- training step: your own optimizer ---------------------------------------------------------------------


def eight_bits(name: str, **settings: Any) -> Any:
    def make(parameters: Any) -> Any:
        import bitsandbytes as bnb

        return getattr(bnb.optim, name)(parameters, **settings)

    return make


HEALTHY_OPTIMIZERS = {
    "AdamW 2e-4": lambda p: torch.optim.AdamW(p, lr=2e-4, weight_decay=0.01),
    "AdamW 1e-6": lambda p: torch.optim.AdamW(p, lr=1e-6, weight_decay=0.1),
    "AdamW of two rates": lambda p: torch.optim.AdamW([{"params": p[:20], "lr": 1e-5}, {"params": p[20:], "lr": 1e-4}]),
    "Adam with coupled decay": lambda p: torch.optim.Adam(p, lr=1e-5, weight_decay=10.0),
    "SGD 1e-6": lambda p: torch.optim.SGD(p, lr=1e-6, momentum=0.9, nesterov=True),
    "SGD 0.1": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD 10, a step too long for the loss": lambda p: torch.optim.SGD(p, lr=10.0),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "Muon": lambda p: torch.optim.Muon(p, lr=2e-4),
    "AdamW8bit": eight_bits("AdamW8bit", lr=2e-4, weight_decay=0.01),
    "Lion8bit": eight_bits("Lion8bit", lr=1e-6),
}


@pytest.fixture(scope="module")
def plain_model(fresh_model: Any) -> Any:
    """Checks put its weights back; what else a test changes it puts back itself."""
    return fresh_model(lora=True)


@pytest.mark.parametrize("name", HEALTHY_OPTIMIZERS)
def test_optimizers_and_rates_that_people_use(plain_model: Any, batch: Any, name: str) -> None:
    evidence = step(plain_model, batch, make_optimizer=HEALTHY_OPTIMIZERS[name])
    assert figure(evidence, "tensors that your optimizer's step moves") == 56


def test_steps_that_float32_does_not_keep_are_a_note(plain_model: Any, batch: Any) -> None:
    """Plain SGD at 1e-6 leaves A where it is while B is near zero; nothing is wrong with its gradient."""
    evidence = frozen_vision(plain_model, batch, make_optimizer=HEALTHY_OPTIMIZERS["SGD 1e-6"])
    moved = figure(evidence, "adapter tensors that moved")
    assert 28 <= moved < 56
    assert f"{56 - moved} of 56 tensors stand still under your optimizer, because float32" in evidence.notes[-1]
    evidence = step(plain_model, batch, steps_to_halve=2, make_optimizer=lambda p: torch.optim.SGD(p, lr=1e-8))
    moved = figure(evidence, "tensors that your optimizer's step moves")
    assert 0 < moved < 56
    assert f"{56 - moved} of 56 tensors stand still" in evidence.notes[-1]


def test_tensors_that_the_optimizer_leaves_out_are_no_small_steps(plain_model: Any, batch: Any) -> None:
    message = refused(
        frozen_vision, plain_model, batch, make_optimizer=lambda p: torch.optim.SGD([p[1], *p[3:]], lr=0.1)
    )
    assert message.startswith("2 of 56 adapter tensors did not move in 2 steps: ")
    assert "the optimizer does not hold them, or its steps are below the resolution of float32 (2)" in message


def test_an_optimizer_that_passes_a_tensor_over_is_no_small_step(plain_model: Any, batch: Any) -> None:
    """It holds the tensor; a plain step along the gradient would be too small for float32, its own would not."""

    class Skipping(torch.optim.AdamW):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            skipped = self.param_groups[0]["params"][0]
            kept = skipped.detach().clone()
            done = super().step(*args, **kwargs)
            skipped.data.copy_(kept)
            return done

    make = partial(Skipping, lr=1e-7, weight_decay=0.0)
    message = refused(frozen_vision, plain_model, batch, make_optimizer=make)
    assert message.startswith("1 of 56 adapter tensors did not move in 2 steps: ")
    message = refused(step, plain_model, batch, make_optimizer=make)
    assert "does not move 1 of 56 tensors that have a gradient" in message


def test_an_adalora_for_language_models_learns(fresh_model: Any, batch: Any) -> None:
    """By its task type its loss holds a penalty on A and B; its ranknum, trainable once cast, is too large to move."""
    from peft import AdaLoraConfig, TaskType

    model = fresh_model(lora=AdaLoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=LANGUAGE_ONLY, total_step=100))
    for name, parameter in model.named_parameters():
        if "ranknum" in name:
            parameter.requires_grad_()
            parameter.data.fill_(64)  # of which float32 keeps no step of 1e-6
    evidence = step(model, batch, make_optimizer=lambda p: torch.optim.AdamW(p, lr=1e-6))
    assert figure(evidence, "tensors that your optimizer's step moves") == 28 * 3
    assert figure(evidence, "first step (E = 0): A and B matrices with a gradient") == 0
    assert model.peft_config["default"].orth_reg_weight == 0.5


@dataclass
class Bowl:
    """A loss as a 16-bit model computes it: it falls by one to first order, is curved and rounded."""

    weights: list[torch.nn.Parameter]
    curvature: float
    rounding: float
    downhill: float = 1.0

    def loss(self) -> float:
        [moved] = self.weights
        at = float(moved.detach())
        exact = 8 - self.downhill * at + self.curvature * at**2
        return round(exact / self.rounding) * self.rounding


@pytest.mark.parametrize(
    ("downhill", "rounding", "agrees"),
    [(1.0, 2**-6, True), (0.3, 2**-14, False), (-1.0, 2**-6, False), (2.5, 2**-14, False)],
)
def test_curvature_does_not_hide_what_the_gradient_promises(downhill: float, rounding: float, agrees: bool) -> None:
    """Ahead alone, the curvature is half of the promise where the promise is as small as the rounding of the loss."""
    lesson: Any = Bowl([torch.nn.Parameter(torch.zeros(()))], curvature=100.0, rounding=rounding, downhill=downhill)
    move = Move([torch.zeros(())], [torch.tensor(-1.0)], [torch.ones(())])
    found = descent(lesson, move)
    assert found.agrees == agrees
    assert not lesson.weights[0].detach().any()


class Idle(torch.optim.SGD):
    """Sets itself up in the first step, as SOAP does; moves from the second on, or never."""

    def __init__(self, parameters: Any, moves_from: float) -> None:
        super().__init__(parameters, lr=1e-3)
        self.left = moves_from

    def step(self, closure: Any = None) -> Any:
        self.left -= 1
        return super().step(closure) if self.left <= 0 else None


def test_an_optimizer_that_moves_from_the_second_step_on(plain_model: Any, batch: Any) -> None:
    assert step(plain_model, batch, make_optimizer=lambda p: Idle(p, 2)).ok


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda p: torch.optim.AdamW(p, lr=1e-3, maximize=True),
            "your optimizer moves 56 of 56 tensors uphill, along their gradient and not against it",
        ),
        (
            lambda p: torch.optim.AdamW([{"params": p[:1], "maximize": True}, {"params": p[1:]}], lr=1e-5),
            "your optimizer moves 1 of 56 tensors uphill, along their gradient and not against it",
        ),
        (
            lambda p: torch.optim.AdamW(p, lr=0.0, weight_decay=0.0),
            "1 of 1 parameter groups of your optimizer have the learning rate 0: a warm-up schedule",
        ),
        (
            lambda p: torch.optim.AdamW([torch.nn.Parameter(w.detach().clone()) for w in p], lr=1e-3),
            "your optimizer does not hold 56 of 56 trained tensors: model.language_model.layers.0.self_attn.q_proj",
        ),
        (
            lambda p: torch.optim.AdamW(p[:2], lr=1e-3),
            "your optimizer does not hold 54 of 56 trained tensors: model.language_model.layers.0.self_attn.k_proj",
        ),
        (
            lambda p: Idle(p, math.inf),
            "your optimizer's step does not move 56 of 56 tensors that have a gradient: ",
        ),
        (
            lambda p: torch.optim.SGD(p, lr=math.inf),
            "your optimizer's step leaves 56 of 56 tensors not finite: ",
        ),
    ],
    ids=["ascends", "ascends in one", "rate of zero", "another model", "forgets most", "idle", "infinite"],
)
def test_optimizers_that_do_not_train_the_adapter(plain_model: Any, batch: Any, make: Any, says: str) -> None:
    before = digests(plain_model.named_parameters())
    assert refused(step, plain_model, batch, make_optimizer=make).startswith(says)
    assert digests(plain_model.named_parameters()) == before


def test_labels_that_the_loss_ignores(fresh_model: Any, batch: Any) -> None:
    """A patched loss that never sees the answers."""
    model = fresh_model(lora=True)
    base = anatomy(model).base
    base.loss_function = lambda logits, **_: logits.float().mean()
    assert "does not begin at 1 nat per token" in refused(step, model, batch)


def test_an_unfrozen_tensor_takes_gradients(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora=True)
    anatomy(model).vision_tower.merger.ln_q.weight.requires_grad_(True)
    message = refused(step, model, batch)
    assert message.startswith(
        "1 tensors that are not the adapter's take gradients, in merger (1): model.visual.merger.ln_q.weight"
    )


def test_a_merger_trained_on_detached_features(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora={"modules_to_save": ["merger"]})
    assert step(model, batch).ok
    anatomy(model).merger.register_forward_hook(lambda _m, _a, out: out.detach())
    message = refused(step, model, batch)
    assert message.startswith(
        "first step (B = 0): the gradient has no path to 5 of 5 tensors that are trained beside LoRA: "
        "model.visual.merger.modules_to_save.default.ln_q.weight"
    )
    assert "is the output of their module detached (torch.no_grad, detach) on its way?" in message


def test_malformed_batches_are_refused_before_training(lora_model: Any, batch: Any) -> None:
    dark = {**batch, "pixel_values": batch["pixel_values"].to(torch.uint8)}
    for train in (step, frozen_vision):
        with pytest.raises(ValueError, match="the batch is malformed: pixel_values are uint8"):
            train(lora_model, dark)


def test_training_in_float16_is_named(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(dtype="float16", lora={"modules_to_save": ["lm_head"]})
    message = refused(step, model, batch)
    assert message.startswith("1 of 57 trained tensors are float16: lm_head.modules_to_save.default.weight")


def test_weights_come_back_after_a_failure(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora={"init_lora_weights": False})
    before = digests(model.named_parameters())
    refused(step, model, batch, learning_rate=1e-7, steps_to_halve=2)
    assert digests(model.named_parameters()) == before


def test_wrong_arguments_of_the_step(fresh_model: Any, lora_model: Any, processor: Any, batch: Any) -> None:
    text = make_batch(processor, [s for s in scenes(seed=1, per_skill=1) if not s.images], answers=True)
    with pytest.raises(CannotJudge, match="no batch has images"):
        step(lora_model, text)
    with pytest.raises(ValueError, match="steps_to_halve must be at least 2, got 1"):
        step(lora_model, batch, steps_to_halve=1)
    with pytest.raises(ValueError, match="needs labels"):
        step(lora_model, {k: v for k, v in batch.items() if k != "labels"})
    with pytest.raises(ValueError, match="carries no adapter"):
        step(fresh_model(), batch)


# --- vision not back-propagated ----------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [None, True])
def test_healthy_towers_are_spared(fresh_model: Any, batch: Any, checkpointing: bool, lora: bool | None) -> None:
    evidence = vision_not_backpropagated(fresh_model(lora=lora), batch, gradient_checkpointing=checkpointing)
    assert figure(evidence, "vision tower calls that autograd follows") == 0


@pytest.mark.skipif(TRANSFORMERS_4, reason="Transformers 4 hooks the text embeddings only")
def test_every_hook_of_kbit_preparation_is_counted(fresh_model: Any, batch: Any, lora_config: Any) -> None:
    from peft import get_peft_model, prepare_model_for_kbit_training

    model = get_peft_model(prepare_model_for_kbit_training(fresh_model()), lora_config())
    message = refused(vision_not_backpropagated, model, batch, gradient_checkpointing=False)
    assert "make_inputs_require_grads (2)" in message
    assert "MiB of its activations are kept" in message
    anatomy(model).base.disable_input_require_grads()
    assert "make_inputs_require_grads (1)" in refused(
        vision_not_backpropagated, model, batch, gradient_checkpointing=True
    )
    assert remove_vision_grad_hooks(anatomy(model).patch_embed) == 1
    assert vision_not_backpropagated(model, batch, gradient_checkpointing=True).ok


@pytest.mark.parametrize("family", RANDOM_FAMILIES)
def test_a_hook_on_the_tower_of_any_family_is_seen(family: str, processor: Any) -> None:
    """By hand: Transformers itself hooks those towers only whose patch embedding it takes for input embeddings."""
    model = random_model(family, seed=0, dtype=torch.float32, quantization_config=None)
    with attribute(processor.image_processor, "patch_size", model.config.vision_config.patch_size):
        pictures = make_batch(processor, scenes(3, 1, ["side", "text"]))
    assert vision_not_backpropagated(model, pictures, gradient_checkpointing=True).ok

    def make_inputs_require_grads(_module: Any, _args: Any, output: Any) -> None:
        output.requires_grad_(True)

    patch_embed = anatomy(model).patch_embed
    patch_embed.register_forward_hook(make_inputs_require_grads)
    for checkpointing in (False, True):
        message = refused(vision_not_backpropagated, model, pictures, gradient_checkpointing=checkpointing)
        assert "make_inputs_require_grads (1)" in message
    assert remove_vision_grad_hooks(patch_embed) == 1
    assert vision_not_backpropagated(model, pictures, gradient_checkpointing=True).ok


def test_any_way_into_the_tower_is_seen(fresh_model: Any, batch: Any) -> None:
    model = fresh_model(lora=True)
    asking = {**batch, "pixel_values": batch["pixel_values"].clone().requires_grad_(True)}
    assert "because pixel_values do" in refused(vision_not_backpropagated, model, asking, gradient_checkpointing=False)
    anatomy(model).blocks[0].register_forward_hook(lambda _m, _a, out: out.requires_grad_(True))
    assert refused(vision_not_backpropagated, model, batch, gradient_checkpointing=False).startswith(
        "the frozen vision tower is back-propagated through"
    )


def test_no_vision_gradient_shows_what_the_check_sees(fresh_model: Any, batch: Any) -> None:
    """The reason why parameter gradients cannot judge this: with the hook on there are none either."""
    model = fresh_model(lora=True)
    anatomy(model).patch_embed.register_forward_hook(lambda _m, _a, out: out.requires_grad_(True))
    model.train()
    model(**batch).loss.backward()
    assert all(p.grad is None for p in anatomy(model).vision_tower.parameters())
    refused(vision_not_backpropagated, model, batch, gradient_checkpointing=False)


def test_a_tower_that_is_trained_on_purpose(fresh_model: Any, processor: Any, batch: Any) -> None:
    model = fresh_model(lora={"target_modules": "all-linear"})
    with pytest.raises(CannotJudge, match="not frozen: 44 of its tensors require grad"):
        vision_not_backpropagated(model, batch, gradient_checkpointing=False)
    text = make_batch(processor, [s for s in scenes(seed=1, per_skill=1) if not s.images])
    with pytest.raises(CannotJudge, match="no images"):
        vision_not_backpropagated(fresh_model(), text, gradient_checkpointing=False)


# --- label mask --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mask_of_our_own_batches(lora_model: Any, processor: Any, side: str) -> None:
    samples = scenes(seed=2, per_skill=2)
    evidence = label_mask(lora_model, make_batch(processor, samples, answers=True, padding_side=side), processor)
    # Two tokens an answer (itself and <|im_end|>), but for the lists, which have more.
    assert figure(evidence, "supervised tokens") >= 2 * len(samples)
    assert label_mask(lora_model, make_batch(processor, samples, answers=True), processor.tokenizer).ok


def relabelled(batch: Any, row: int, place: int, label: int) -> dict[str, torch.Tensor]:
    labels = batch["labels"].clone()
    labels[row, place] = label
    return {**batch, "labels": labels}


def answer_places(batch: Any, row: int) -> list[int]:
    return (batch["labels"][row] != -100).nonzero().flatten().tolist()


def test_the_newline_behind_the_answer_may_be_taught(lora_model: Any, processor: Any) -> None:
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    ids = torch.tensor([processor.tokenizer(text)["input_ids"]])
    labels = torch.full_like(ids, -100)
    labels[0, -3:] = ids[0, -3:]
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    assert label_mask(lora_model, made, processor).ok


def test_several_turns(lora_model: Any, processor: Any) -> None:
    turn = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    ids = torch.tensor([processor.tokenizer(turn + turn)["input_ids"]])
    header = processor.tokenizer("<|im_start|>assistant\n")["input_ids"]
    starts = [i + len(header) for i in range(ids.shape[1]) if ids[0, i : i + len(header)].tolist() == header]
    labels = torch.full_like(ids, -100)
    for start in starts:
        labels[0, start : start + 2] = ids[0, start : start + 2]
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    assert label_mask(lora_model, made, processor).ok
    spill = relabelled(made, 0, starts[1] - len(header) - 2, int(ids[0, starts[1] - len(header) - 2]))
    assert "belong to the prompt" in refused(label_mask, lora_model, spill, processor)


def test_everything_labelled(lora_model: Any, processor: Any, mixed: Any) -> None:
    """labels = input_ids with padding masked, as many collators do it."""
    labels = mixed["input_ids"].masked_fill(mixed["attention_mask"] == 0, -100)
    message = refused(label_mask, lora_model, {**mixed, "labels": labels}, processor)
    assert "supervised tokens are vision tokens, which a model then learns to write: row 0, token" in message
    assert "supervised tokens belong to the prompt" in message
    assert "are padding" not in message


def test_one_label_too_many(lora_model: Any, processor: Any, mixed: Any) -> None:
    row = int((mixed["input_ids"] == anatomy(lora_model).image_token_id).any(-1).nonzero()[0])
    place = int((mixed["input_ids"][row] == anatomy(lora_model).image_token_id).nonzero()[0])
    image = relabelled(mixed, row, place, int(mixed["input_ids"][row, place]))
    assert refused(label_mask, lora_model, image, processor).startswith(
        f"1 supervised tokens are vision tokens, which a model then learns to write: row {row}, token "
        f"{place} "
        "'<|image_pad|>'"
    )
    before = answer_places(mixed, row)[0] - 1
    prompt = relabelled(mixed, row, before, int(mixed["input_ids"][row, before]))
    assert refused(label_mask, lora_model, prompt, processor).startswith(
        f"1 supervised tokens belong to the prompt: row {row}, token {before}"
    )
    padded = int((mixed["attention_mask"][:, 0] == 0).nonzero()[0])
    padding = relabelled(mixed, padded, 0, int(mixed["input_ids"][padded, 0]))
    assert refused(label_mask, lora_model, padding, processor).startswith(
        f"1 supervised tokens are padding: row {padded}, token 0 '<|endoftext|>'"
    )


def test_a_label_too_few(lora_model: Any, processor: Any, mixed: Any) -> None:
    last = answer_places(mixed, 3)[-1]
    assert refused(label_mask, lora_model, relabelled(mixed, 3, last, -100), processor).startswith(
        "1 answers end without a supervised <|im_end|>, so the model does not learn to stop: row 3"
    )
    silent = mixed["labels"].clone()
    silent[2] = -100
    assert refused(label_mask, lora_model, {**mixed, "labels": silent}, processor).startswith(
        "1 rows have no supervised token, so they teach nothing: row 2"
    )


def test_the_end_of_each_taught_turn_is_taught(lora_model: Any, processor: Any) -> None:
    turn = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    ids = torch.tensor([processor.tokenizer(turn + turn)["input_ids"]])
    ends = (ids[0] == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")).nonzero().flatten().tolist()
    labels = torch.full_like(ids, -100)
    for place in (ends[1] - 1, ends[3] - 1, ends[3]):
        labels[0, place] = ids[0, place]
    made = {"input_ids": ids, "labels": labels}
    assert refused(label_mask, lora_model, made, processor).startswith(
        "1 answers end without a supervised <|im_end|>, so the model does not learn to stop: row 0, answer 0"
    )
    labels[0, ends[1] - 1] = -100  # the last turn only
    assert label_mask(lora_model, made, processor).ok


def test_a_batch_without_an_attention_mask(plain_model: Any, processor: Any) -> None:
    """Padding-free, one row: nothing is padding."""
    made = make_batch(processor, [scenes(seed=5, per_skill=1)[1]], answers=True)
    del made["attention_mask"]
    assert label_mask(plain_model, made, processor).ok
    assert step(plain_model, made).ok
    assert frozen_vision(plain_model, made).ok
    assert vision_not_backpropagated(plain_model, made, gradient_checkpointing=False).ok


def test_shifted_labels(lora_model: Any, processor: Any, mixed: Any) -> None:
    """Transformers shifts the labels itself; a collator that does it too teaches the token after the next."""
    shifted = mixed["labels"].roll(-1, dims=1)
    message = refused(label_mask, lora_model, {**mixed, "labels": shifted}, processor)
    assert "labelled with another token than the one at their place" in message


def test_an_answer_cut_off_by_truncation(lora_model: Any, processor: Any, mixed: Any) -> None:
    cut = {name: mixed[name][:, :-1] for name in ("input_ids", "attention_mask", "labels")}
    assert "answers end without a supervised <|im_end|>" in refused(label_mask, lora_model, cut, processor)


def test_wrong_arguments_of_the_mask(lora_model: Any, processor: Any, mixed: Any) -> None:
    with pytest.raises(ValueError, match="needs labels"):
        label_mask(lora_model, {k: v for k, v in mixed.items() if k != "labels"}, processor)
    with pytest.raises(ValueError, match="labels are"):
        label_mask(lora_model, {**mixed, "labels": mixed["labels"][:, 1:]}, processor)
    headless = {**mixed, "input_ids": mixed["input_ids"].clone()}
    headless["input_ids"][headless["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|im_start|>")] = 5
    with pytest.raises(CannotJudge, match="where its answer begins is unknown"):
        label_mask(lora_model, headless, processor)
