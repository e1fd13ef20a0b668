"""The guard on the real ``transformers.Trainer``: healthy trainings finish, and are bitwise what they were."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version

from pytest_qvl.checks import QuantizationPolicy
from pytest_qvl.evidence import InputError
from pytest_qvl.models.quantized import usual_quantization
from pytest_qvl.training import Guard, GuardError, GuardWarning


def record_of(folder):
    return json.loads((folder / "qvl_guard.json").read_text())


def course(bench, folder, *callbacks, dtype="float32", lora=None, **changes):
    """Losses, final adapter and generators of a training, as bits."""
    from transformers import TrainerCallback

    losses = []

    class Losses(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            losses.append({key: logs[key] for key in ("loss", "grad_norm", "learning_rate") if key in logs})

    with bench.model(dtype, **(lora or {})) as model:
        arguments = {
            "logging_strategy": "steps",
            "logging_steps": 1,
            "max_steps": 3,
            "per_device_train_batch_size": 1,
            **changes,
        }
        bench.trainer(model, folder, Losses(), *callbacks, **arguments).train()
        adapter = bench.adapter_bits(model)
    generators = torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state()[1].tobytes()
    return losses, adapter, hashlib.sha256(repr(generators).encode()).hexdigest()


@pytest.mark.parametrize(
    ("dtype", "lora", "changes"),
    [
        ("float32", {"lora_dropout": 0.1}, {}),
        ("float32", {"lora_dropout": 0.1}, {"gradient_accumulation_steps": 2, "max_steps": 2}),
        (
            "float32",
            {"lora_dropout": 0.1},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}, "max_steps": 2},
        ),
        ("bfloat16", {}, {"bf16": True, "optim": "adafactor", "lr_scheduler_type": "cosine", "max_steps": 2}),
        ("float32", {}, {"save_strategy": "steps", "save_steps": 2, "warmup_steps": 2, "optim": "sgd"}),
    ],
    ids=["dropout", "accumulation", "checkpointing", "bfloat16", "saves"],
)
def test_a_healthy_training_is_bitwise_the_same(bench, tmp_path, dtype, lora, changes):
    without = course(bench, tmp_path / "without", dtype=dtype, lora=lora, **changes)
    guard = Guard(every=2, vision_gradients="spare")
    guarded = course(bench, tmp_path / "with", guard, dtype=dtype, lora=lora, **changes)
    assert guarded == without
    record = record_of(tmp_path / "with")
    assert record["state"] == "finished"
    assert record["steps"] == changes.get("max_steps", 3)
    assert not record["findings"]
    judged = set(record["judged"])
    assert judged >= {
        "adapter_switched_on",
        "quantization_census",
        "adapter_census",
        "learning_rate",
        "base_unchanged",
        "loss",
        "gradients",
        "optimizer",
        "adapter_moved",
        "vision_not_backpropagated",
    }
    assert ("adapter_roundtrip" in judged) is ("save_strategy" in changes)


def test_importing_the_package_imports_nothing_heavy():
    program = "import sys, pytest_qvl.training as t; print([m for m in ('torch', 'transformers', 'pytest') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_warns_once_of_each_kind_and_goes_on(bench, tmp_path):
    with (
        bench.model(target_modules=["gate_proj", "up_proj", "down_proj"]) as model,
        pytest.warns(GuardWarning) as caught,
    ):
        bench.trainer(model, tmp_path, Guard(on_finding="warn", every=1), max_steps=3).train()
    assert sum('declare it as Guard(policy="language, vision")' in str(warning.message) for warning in caught) == 1
    assert sum("leaked into vision" in str(warning.message) for warning in caught) == 1
    record = record_of(tmp_path)
    assert record["state"] == "finished"
    assert record["findings"][0]["check"] == "adapter_census"


@pytest.mark.skipif(Version(transformers.__version__).major < 5, reason="Transformers 4 does not hook the tower")
def test_back_propagation_through_the_tower_is_warned_of_and_can_be_spared(bench, tmp_path):
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    with bench.model() as model, pytest.warns(GuardWarning, match="back-propagated through"):
        bench.trainer(model, tmp_path, Guard(), max_steps=1, **settings).train()
    with bench.model() as model:
        bench.trainer(model, tmp_path, Guard(vision_gradients="spare"), max_steps=1, **settings).train()
    assert "vision_not_backpropagated" in record_of(tmp_path)["judged"]


def test_what_cannot_be_judged_is_counted_with_its_reason(bench, tmp_path):
    with bench.model(quantized=False) as model:
        with pytest.warns(GuardWarning, match="judges no batch") as caught:
            bench.trainer(model, tmp_path, Guard(), max_steps=1, processing_class=None).train()
    assert len([warning for warning in caught if warning.category is GuardWarning]) == 1
    not_judged = record_of(tmp_path)["not_judged"]
    assert "no linear layer is in 4 bits" in next(iter(not_judged["quantization_census"]))
    assert "no processor" in next(iter(not_judged["batch"]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"every": 0}, "every is a whole number"),
        ({"on_finding": "raise"}, "on_finding is one of 'stop', 'warn'"),
        ({"policy": "visual"}, "part 'visual' is unknown"),
        ({"vram_limit": "15"}, "is not a size"),
        ({"overhead": 0}, "overhead is a share"),
        ({"overhead": "1%"}, "overhead is a share.*got '1%'"),
        ({"quantization": "nf4"}, "quantization is a pytest_qvl QuantizationPolicy.*got 'nf4'"),
        ({"quantized_layers": ["language"]}, "quantized_layers is a QuantizedLayers or text .*got \\['language'\\]"),
        ({"quantized_layers": ".*o_proj:16bit"}, "'.*o_proj' is neither a part"),
        (
            {"quantized_layers": "language", "quantization": QuantizationPolicy()},
            "give it or quantized_layers, not both",
        ),
        ({"lora_config": {"r": 8}}, "lora_config is a peft.LoraConfig, got {'r': 8}"),
        ({"processor": "Qwen"}, "processor is the object that makes the batches.*got 'Qwen'"),
        ({"record": 5}, "record is the path of a file.*got 5"),
        ({"record": ""}, "record is the path of a file.*got ''"),
    ],
)
def test_settings_that_guard_nothing_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        Guard(**settings)


def test_a_declared_policy_is_kept(bench, tmp_path):
    everywhere = r".*(language_model|visual).*(gate|up|down)_proj"
    with bench.model(target_modules=everywhere) as model:
        bench.trainer(model, tmp_path, Guard(policy="language, vision"), max_steps=2).train()
    assert record_of(tmp_path)["run"]["trained"] == "vision (24), language (24)"


def test_declared_layers_are_kept(bench, tmp_path):
    asked = usual_quantization(torch.float32, llm_int8_skip_modules=["model.visual", "lm_head", "o_proj"])
    with bench.model(base=bench.load("float32", asked)) as model:
        with pytest.raises(GuardError, match="4 of 28 linears are float32 instead of nf4"):
            bench.trainer(model, tmp_path, Guard(), max_steps=1).train()
        bench.trainer(model, tmp_path, Guard(quantized_layers="language, o_proj:16bit"), max_steps=1).train()
    assert record_of(tmp_path)["settings"]["quantized_layers"] == "language, o_proj:16bit"
    with bench.model() as model:
        with pytest.raises(GuardError, match="no linear layer of this model: did you mean o_proj") as failure:
            bench.trainer(model, tmp_path, Guard(quantized_layers="language, o_porj:16bit"), max_steps=1).train()
        assert 'declare them as Guard(quantized_layers="language, in_proj_a:16bit")' in str(failure.value)
        with pytest.raises(
            GuardError, match="4 of 4 linears that the policy names to stay 16-bit are quantized, as NF4"
        ):
            bench.trainer(model, tmp_path, Guard(quantized_layers="language, o_proj:16bit"), max_steps=1).train()
    with (
        bench.model(quantized=False) as model,
        pytest.raises(GuardError, match="28 linears are float32 instead of nf4"),
    ):
        bench.trainer(model, tmp_path, Guard(quantized_layers="language"), max_steps=1).train()


def test_prompts_may_be_learned_on_purpose_and_placeholders_never(bench, tmp_path):
    image = bench.processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    vision = bench.processor.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"])

    def everything(samples, *left_out):
        batch = bench.collate(samples)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch | {"labels": labels.masked_fill(torch.isin(labels, torch.tensor(left_out)), -100)}

    with bench.model() as model:
        guard = Guard(learned="everything")
        bench.trainer(model, tmp_path, guard, collate=lambda rows: everything(rows, *vision), max_steps=1).train()
        assert "batch" in record_of(tmp_path)["judged"]
        trainer = bench.trainer(model, tmp_path, guard, collate=lambda rows: everything(rows, *vision[:2]), max_steps=1)
        with pytest.raises(GuardError, match="image placeholders included"):
            trainer.train()
    assert image in vision


def test_saved_files_are_held_against_the_model(bench, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import TrainerCallback

    class Damages(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            path = tmp_path / f"checkpoint-{state.global_step}" / "adapter_model.safetensors"
            tensors = load_file(path)
            tensors[next(iter(tensors))] += 1
            save_file(tensors, path)

    with bench.model() as model:
        trainer = bench.trainer(model, tmp_path, Damages(), Guard(), save_strategy="steps", save_steps=1)
        with pytest.raises(GuardError, match="not bitwise those of") as stopped:
            trainer.train()
    assert (stopped.value.check, stopped.value.step) == ("adapter_roundtrip", 1)


def test_saved_configuration_is_held_against_the_adapter(bench, tmp_path):
    from transformers import TrainerCallback

    class Damages(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            path = tmp_path / f"checkpoint-{state.global_step}" / "adapter_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 64}))

    with bench.model() as model:
        trainer = bench.trainer(model, tmp_path, Damages(), Guard(), save_strategy="steps", save_steps=1)
        with pytest.raises(GuardError, match="lora_alpha 64 instead of 8"):
            trainer.train()


@pytest.mark.parametrize("renamed", [False, True])
def test_a_checkpoint_without_the_adapter(bench, tmp_path, renamed):
    from transformers import TrainerCallback

    class Damages(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            path = tmp_path / "checkpoint-1" / "adapter_model.safetensors"
            path.rename(path.with_suffix(".bin")) if renamed else path.unlink()

    with bench.model() as model:
        saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "per_device_train_batch_size": 1}
        trainer = bench.trainer(model, tmp_path, Damages(), Guard(), **saves)
        if renamed:
            trainer.train()
            assert "adapter_model.bin" in next(iter(record_of(tmp_path)["not_judged"]["adapter_roundtrip"]))
        else:
            with pytest.raises(GuardError, match="does not hold the adapter 'default'"):
                trainer.train()


def test_what_the_guard_itself_gets_wrong_ends_no_training(bench, tmp_path, monkeypatch):
    from pytest_qvl.training import steps
    from pytest_qvl.training.movement import Movement

    def fails(*args, **kwargs):
        raise ZeroDivisionError("of the guard's own")

    monkeypatch.setattr(steps, "optimizer_holds", fails)
    monkeypatch.setattr(Movement, "remember", fails)
    with bench.model() as model, pytest.warns(GuardWarning, match="ZeroDivisionError"):
        bench.trainer(model, tmp_path, Guard(), max_steps=1, per_device_train_batch_size=1).train()
    record = record_of(tmp_path)
    assert record["not_judged"].keys() == {"optimizer", "adapter_moved"}
    assert not record["judged"].keys() & {"optimizer", "adapter_moved"}


def test_resumes_from_a_checkpoint(bench, tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 2}
    with bench.model(adapter_name="vlm") as model:
        bench.trainer(model, tmp_path, Guard(), max_steps=2, **saves).train()
    with bench.model(adapter_name="vlm") as model:
        trainer = bench.trainer(model, tmp_path, Guard(), max_steps=4, **saves)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    record = record_of(tmp_path)
    assert record["steps"] == 4
    assert record["judged"]["adapter_roundtrip"]["times"] == 2  # on resuming, and at the next checkpoint


def test_a_base_is_read_in_turns_after_the_first_steps(bench, tmp_path):
    with bench.model() as model:
        guard = Guard(every=1, overhead=1e-6)
        bench.trainer(model, tmp_path, guard, max_steps=5, per_device_train_batch_size=1).train()
    base = record_of(tmp_path)["judged"]["base_unchanged"]["last"]["figures"]
    turns = next(figure["value"] for figure in base if figure["name"] == "turns for the whole base")
    assert turns == 64


@pytest.mark.parametrize(("scale", "holds"), [(65536.0, True), (1.0, True), (0.5, False)])
def test_a_scaler_may_look_for_its_scale_and_not_for_ever(scale, holds):
    from types import SimpleNamespace

    from pytest_qvl.evidence import CheckFailed
    from pytest_qvl.training.steps import scaler_steps

    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.ones(1))  # which makes the scale a tensor
    optimizer = SimpleNamespace(scaler=scaler)
    if holds:
        assert scaler_steps(optimizer, 17).ok
    else:
        with pytest.raises(CheckFailed, match="has skipped 17 steps"):
            scaler_steps(optimizer, 17)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("overflows", [False, True])
def test_a_skipped_step_is_known_of_a_fused_optimizer_too(fused, overflows):
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from pytest_qvl.training.steps import was_skipped

    parameter = torch.nn.Parameter(torch.ones(4))
    Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu")
    optimizer = AcceleratedOptimizer(torch.optim.AdamW([parameter], fused=fused), device_placement=False, scaler=scaler)
    optimizer.scaler.scale((parameter * (torch.inf if overflows else 1.0)).sum()).backward()
    scale = optimizer.scaler.get_scale()
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(4)) is overflows
    assert was_skipped(optimizer, scale) is overflows


@pytest.mark.slow
def test_a_batch_that_breaks_later_is_in_the_sample(bench, tmp_path):
    made = []

    def collate(samples):
        made.append(bench.collate(samples))
        return made[-1] | ({"labels": made[-1]["input_ids"].clone()} if len(made) == 10 else {})

    with bench.model() as model:
        rows = {"per_device_train_batch_size": 1, "max_steps": 12}
        trainer = bench.trainer(model, tmp_path, Guard(every=1, batches=1), collate=collate, **rows)
        with pytest.raises(GuardError, match="batch 1 of step 10: whole-row-learned"):
            trainer.train()


def test_a_run_that_is_over_has_no_rate_to_judge(bench, tmp_path):
    with bench.model() as model:
        saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
        bench.trainer(model, tmp_path, Guard(), **saves).train()
        bench.trainer(model, tmp_path, Guard(), **saves).train(resume_from_checkpoint=True)
    assert "no steps left" in next(iter(record_of(tmp_path)["not_judged"]["learning_rate"]))


def train_until_memory_is_full(bench, model, folder):
    from transformers import Trainer

    class Full(Trainer):
        def training_step(self, *args, **kwargs):
            raise MemoryError("outside of the guard")

    with pytest.raises(MemoryError):
        bench.trainer(model, folder, Guard(), trainer_class=Full, max_steps=1).train()


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("later", [[], [Guard(learned="everything")]], ids=["without", "another"])
def test_a_guard_whose_training_died_judges_no_later_one(bench, tmp_path, later):
    names = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    left_out = torch.tensor(bench.processor.tokenizer.convert_tokens_to_ids(names))

    def everything(samples):
        batch = bench.collate(samples)
        return batch | {"labels": batch["input_ids"].masked_fill(torch.isin(batch["input_ids"], left_out), -100)}

    with bench.model() as model:
        before = hooks_of(model)
        train_until_memory_is_full(bench, model, tmp_path)
        one = {"max_steps": 1, "per_device_train_batch_size": 1}
        bench.trainer(model, tmp_path, *later, collate=everything, **one).train()
        assert hooks_of(model) == before


def test_a_forward_after_a_training_that_died_is_not_judged(bench, tmp_path):
    with bench.model() as model:
        before = hooks_of(model)
        train_until_memory_is_full(bench, model, tmp_path)
        batch = bench.collate(bench.samples[:1])
        model.train()
        model(**batch | {"labels": batch["input_ids"].clone()})
        assert hooks_of(model) == before
