"""What can be judged before the first batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.quantization import QuantizationPolicy
from pytest_qvl.checks.support.lora import no_adapter
from pytest_qvl.checks.support.wording import some, tally
from pytest_qvl.evidence import CannotJudge, Evidence, Judge
from pytest_qvl.models.adapters import (
    active_adapters,
    adapted_layers,
    adapter_configs,
    adapter_parameters,
    chosen_adapter,
    is_merged,
)
from pytest_qvl.models.quantized import dtype_name, linear_states
from pytest_qvl.models.quantized_layers import QuantizedLayers

if TYPE_CHECKING:
    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.training.subject import Subject

# Values of a learning rate that are looked at before training: a warm-up begins at 0 and has left it one step later.
_LOOKED_AHEAD = 3


def adapter_switched_on(subject: Subject) -> Evidence:
    """There is an adapter to train, it is switched on, not merged, and in a dtype that trains.

    Raises:
        CheckFailed: Nothing would be trained, or all of the base.
    """
    parts = subject.parts
    judge = Judge("adapter_switched_on", "there is an adapter, and a step can train it")
    adapters = adapter_parameters(parts)
    if not adapters and not subject.policy.trained:
        loose = subject.trained_of_base()
        judge.problem(
            f"{no_adapter(parts)}: {len(loose)} of its {len(subject.base)} own tensors require grad; to train them on "
            "purpose say so (policy='language:full')"
        )
        return judge.verdict()
    layers = adapted_layers(parts)
    off = [name for name, layer in layers.items() if layer.disable_adapters]
    judge.equal(
        "adapted layers switched off",
        len(off),
        0,
        else_say=f"the adapter is switched off in {len(off)} of {len(layers)} layers ({some(off)}), so that no "
        "gradient reaches it: call model.enable_adapter_layers() (disable_adapter_layers switched it off)",
    )
    if is_merged(parts):
        judge.problem(
            "the adapter is merged into the base weights, so that no gradient reaches it: call model.unmerge_adapter() "
            "before training, or load the base again"
        )
    trained = subject.trained
    if adapters and not trained:
        judge.problem(
            f"none of the {len(adapters)} adapter tensors requires grad: the adapter was loaded for inference; pass "
            "is_trainable=True to PeftModel.from_pretrained"
        )
    half = [name for name, parameter in trained.items() if dtype_name(parameter.dtype) == "float16"]
    judge.equal(
        "trained tensors in float16",
        len(half),
        0,
        else_say=f"{len(half)} of {len(trained)} trained tensors are float16 ({some(half)}); there AdamW's epsilon of "
        "1e-8 is zero, and torch.amp.GradScaler refuses their gradients: train them in float32",
    )
    judge.report("trained tensors", len(trained))
    judge.report("active adapters", ", ".join(active_adapters(parts)) or "none")
    return judge.verdict()


def quantization_policy(
    parts: Parts, given: QuantizationPolicy | None, layers: QuantizedLayers | None = None
) -> QuantizationPolicy:
    """What the quantization of this model is held to, where the user has not said.

    NF4 on the language backbone, or on the layers that were declared, and nothing else; double quantization, storage
    and compute dtype as the model's own configuration asks, but for a compute dtype of float32 on a model in 16 bits:
    that is what bitsandbytes takes where nobody chose one.

    Raises:
        CannotJudge: Nothing of the model is in 4 bits, and nobody said that it should be.
    """
    if given is not None:
        return given
    four_bit = [state for state in linear_states(parts) if state.is_4bit]
    if not four_bit and layers is None:
        raise CannotJudge(
            "no linear layer is in 4 bits; if this was to be QLoRA, say so: Guard(quantization=QuantizationPolicy())"
        )
    layers = layers or QuantizedLayers()
    config: Any = getattr(parts.config, "quantization_config", None)
    if config is None:
        return QuantizationPolicy(quantized=layers.quantized, kept=layers.all_kept)
    if isinstance(config, dict):
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig.from_dict(config)
    asked = QuantizationPolicy.from_config(config, layers)
    loaded = dtype_name(getattr(parts.config, "dtype", None) or parts.embeddings.weight.dtype)
    compute = asked.compute_dtype
    if compute == "float32" and loaded in ("bfloat16", "float16"):
        compute = loaded
    return replace(asked, quant_type="nf4", compute_dtype=compute)


def lora_config_of(subject: Subject, given: Any) -> Any:
    """The configuration that the adapter is held to: the user's, or else the one that PEFT keeps on the model."""
    return given if given is not None else adapter_configs(subject.parts)[chosen_adapter(subject.parts)]


def learning_rate_ahead(subject: Subject, left: int) -> Evidence:
    """The schedule gives every parameter group a learning rate above 0 within the first steps.

    A warm-up begins at 0, which trains nothing in its first step and something in the second.

    Args:
        subject: What is trained.
        left: Steps that the run has still to take.

    Raises:
        CheckFailed: A rate stays at 0, or is not a number above it.
        CannotJudge: The schedule cannot be asked without stepping it.
    """
    if left <= 0:
        raise CannotJudge("the run has no steps left to take")
    judge = Judge("learning_rate", "a step is taken with a learning rate above 0")
    groups = len(subject.group_rates())
    scheduler = getattr(subject.scheduler, "scheduler", subject.scheduler)
    factors, bases = getattr(scheduler, "lr_lambdas", None), getattr(scheduler, "base_lrs", None)
    if not factors or not bases or len(factors) != groups:
        raise CannotJudge(f"{type(scheduler).__name__} does not say which rates will come; judged step by step")
    begun = int(getattr(scheduler, "last_epoch", 0))
    steps = range(begun, begun + _LOOKED_AHEAD)
    largest = [max(base * factor(step) for step in steps) for base, factor in zip(bases, factors, strict=True)]
    still = [number for number, rate in enumerate(largest) if not rate > 0]
    judge.equal(
        "parameter groups at a learning rate of 0",
        len(still),
        0,
        else_say=f"{len(still)} of {groups} parameter groups have a learning rate of "
        f"{', '.join(f'{largest[number]:g}' for number in still[:1])} in the first {_LOOKED_AHEAD} steps and "
        f"do not move; look at learning_rate ({subject.args.learning_rate:g}), and at the schedule and the number of "
        "steps that it was made for",
    )
    judge.report("largest learning rate ahead", max(largest))
    return judge.verdict()


def resumed_folder(subject: Subject, step: int) -> Path | None:
    """The checkpoint that a resumed run has most likely come from; None for a run from the start."""
    folder = Path(subject.args.output_dir) / f"checkpoint-{step}"
    return folder if step and folder.is_dir() else None


def told(subject: Subject) -> dict[str, Any]:
    """What is known of the training, for the record."""
    args, parts = subject.args, subject.parts
    config = adapter_configs(parts).get(chosen_adapter(parts))
    return {
        "model": str(getattr(parts.config, "_name_or_path", "")),
        "family": parts.family,
        "device": str(parts.device),
        "processes": int(args.world_size),
        "optimizer": type(getattr(subject.optimizer, "optimizer", subject.optimizer)).__name__,
        "rows_per_step": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "gradient_checkpointing": bool(args.gradient_checkpointing),
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "none",
        "adapter": None
        if config is None
        else {"rank": getattr(config, "r", None), "alpha": getattr(config, "lora_alpha", None)},
        "trained": tally(parts.group_of(name) for name in subject.trained),
        "trained_parameters": sum(parameter.numel() for parameter in subject.trained.values()),
    }
