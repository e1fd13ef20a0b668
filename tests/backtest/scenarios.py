"""What is built in an environment, and the check that is called on it; each function is a scenario of :mod:`pairs`.

A scenario returns where the check passes, and lets its ``CheckFailed`` out. All in float32 on the CPU, on the embedded
model or a small random one of another family.
"""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# A regular expression for the language backbone and, beside it, the vision blocks.
WITH_VISION = (
    r".*(language_model.*\.(q|k|v|o|gate|up|down)_proj|visual.*blocks.*(qkv|proj|fc1|fc2|gate_proj|up_proj|down_proj))"
)
SCENARIOS: dict[str, Callable[[], Any]] = {}


def scenario(function: Callable[[], Any]) -> Callable[[], Any]:
    """Enter a function under its name."""
    SCENARIOS[function.__name__] = function
    return function


@cache
def processor() -> Any:
    """The embedded checkpoint's."""
    from pytest_qvl.models.sources.embedded import embedded_model_dir
    from pytest_qvl.models.sources.processors import load_processor

    return load_processor(embedded_model_dir())


def embedded(*, quantized: bool = True, **quantization: Any) -> Any:
    """The embedded model in float32, or in NF4 with double quantization and what else the fields say."""
    import torch
    from transformers import AutoModelForImageTextToText

    from pytest_qvl.models.quantized import keep_quantized_weights_in_place, usual_quantization
    from pytest_qvl.models.sources.embedded import embedded_model_dir

    model = AutoModelForImageTextToText.from_pretrained(
        embedded_model_dir(),
        quantization_config=usual_quantization(torch.float32, **quantization) if quantized else None,
        torch_dtype=torch.float32,  # what Transformers 4.55 and older call it; newer ones take both
        attn_implementation="sdpa",
    )
    keep_quantized_weights_in_place(model)
    return model.requires_grad_(False).eval()


@contextmanager
def family(model_type: str) -> Iterator[Any]:
    """A model of a family, and the processor's patches of its size for the length of a block."""
    import torch

    from pytest_qvl.faults.matrix.random_models import random_model
    from pytest_qvl.faults.tools import attribute
    from pytest_qvl.models.quantized import usual_quantization

    if model_type == "qwen2_5_vl":
        yield embedded()
        return
    model = random_model(model_type, seed=0, dtype=torch.float32, quantization_config=usual_quantization(torch.float32))
    with attribute(processor().image_processor, "patch_size", model.config.vision_config.patch_size):
        yield model


def adapted(model: Any, **fields: Any) -> Any:
    """With LoRA on the language backbone, or as the fields say."""
    from peft import get_peft_model

    from pytest_qvl.faults.case import lora_config

    return get_peft_model(model, lora_config(**fields)).eval()


def batch(skills: str = "side text nth_colour", side: str = "right", *, answers: bool = False) -> Any:
    """One row for each skill."""
    from pytest_qvl.samples import make_batch, scenes

    return make_batch(processor(), scenes(3, 1, skills.split()), padding_side=side, answers=answers)


def _of_each_family(name: str, run: Callable[[Any], Any]) -> None:
    for suffix, model_type in (("", "qwen2_5_vl"), ("_qwen2", "qwen2_vl"), ("_qwen3", "qwen3_vl")):

        def call(model_type: str = model_type) -> Any:
            with family(model_type) as model:
                return run(model)

        SCENARIOS[name + suffix] = call


# --- Transformers: positions and masks ---------------------------------------------------------------------------


def _decode_left_padded(model: Any) -> Any:
    from pytest_qvl.checks import decode_positions

    return decode_positions(adapted(model), batch(side="left"))


def _text_after_images(model: Any) -> Any:
    from pytest_qvl.checks import position_state

    return position_state(adapted(model), batch(side="left"))


def _positions(model: Any) -> Any:
    from pytest_qvl.checks import mrope_positions

    return mrope_positions(adapted(model), batch())


def _without_mask(model: Any) -> Any:
    from pytest_qvl.checks import layer_arithmetic

    made = batch("side", answers=True)
    del made["attention_mask"]
    return layer_arithmetic(adapted(model), made)


_of_each_family("decode_left_padded", _decode_left_padded)
_of_each_family("text_after_images", _text_after_images)
_of_each_family("positions", _positions)
_of_each_family("without_mask", _without_mask)


# --- Transformers: training ---------------------------------------------------------------------------------------


def _loss(model: Any) -> Any:
    from pytest_qvl.checks import loss_arithmetic

    return loss_arithmetic(adapted(model), batch(answers=True))


def _trainer_accumulates(model: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    from pytest_qvl.checks import loss_arithmetic

    wrapped = adapted(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, gradient_accumulation_steps=3, per_device_train_batch_size=1, report_to=[], use_cpu=True
        )
        return loss_arithmetic(wrapped, batch(answers=True), trainer=Trainer(wrapped, arguments, train_dataset=[0]))


def _vision_reentrant(model: Any) -> Any:
    """LoRA on both towers, prepared as QLoRA scripts do, with the kind of checkpointing that was the default."""
    from peft import prepare_model_for_kbit_training

    from pytest_qvl.checks import AdapterPolicy, training_step

    prepared = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": True})
    wrapped = adapted(prepared, target_modules=WITH_VISION)
    policy = AdapterPolicy.parse("language, vision")
    return training_step(wrapped, batch(answers=True), gradient_checkpointing=True, policy=policy)


_of_each_family("loss", _loss)
_of_each_family("trainer_accumulates", _trainer_accumulates)
_of_each_family("vision_reentrant", _vision_reentrant)


@scenario
def resized_vocabulary() -> Any:
    from pytest_qvl.checks import loss_arithmetic

    model = embedded()
    model.resize_token_embeddings(model.config.get_text_config().vocab_size + 64)
    return loss_arithmetic(adapted(model.requires_grad_(False)), batch("side text", answers=True))


# --- Transformers: what is loaded ---------------------------------------------------------------------------------


@scenario
def skipped_by_short_name() -> Any:
    from pytest_qvl.checks import QuantizationPolicy, quantization_census

    model = embedded(llm_int8_skip_modules=["visual", "lm_head"])
    return quantization_census(model, QuantizationPolicy(compute_dtype="float32"))


def _old_adapter(folder: str) -> None:
    """An adapter of both towers under the names of Transformers 4.51 and older."""
    from safetensors.torch import load_file, save_file

    adapted(embedded(quantized=False), target_modules=WITH_VISION, init_lora_weights=False).save_pretrained(folder)
    path = Path(folder) / "adapter_model.safetensors"
    old = {
        name.replace(".model.model.language_model.", ".model.model.").replace(
            ".model.model.visual.", ".model.visual."
        ): t
        for name, t in load_file(path).items()
    }
    save_file(old, path, metadata={"format": "pt"})


@scenario
def old_adapter_by_transformers() -> Any:
    from pytest_qvl.checks import adapter_roundtrip

    with tempfile.TemporaryDirectory() as folder:
        _old_adapter(folder)
        model = embedded()
        model.load_adapter(folder)
        return adapter_roundtrip(model, folder)
