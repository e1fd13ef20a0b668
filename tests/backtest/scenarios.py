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
KEPT = ("model.visual", "lm_head")
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


def embedded(skip: tuple[str, ...] | None = KEPT, *, quantized: bool = True, dtype: str = "float32") -> Any:
    """The embedded model, in NF4 with double quantization."""
    import torch
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    from pytest_qvl.models.quantized import keep_quantized_weights_in_place
    from pytest_qvl.models.sources.embedded import embedded_model_dir

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=None if skip is None else list(skip),
    )
    model = AutoModelForImageTextToText.from_pretrained(
        embedded_model_dir(),
        quantization_config=config if quantized else None,
        torch_dtype=getattr(torch, dtype),  # what Transformers 4.55 and older call it; newer ones take both
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

    return quantization_census(embedded(("visual", "lm_head")), QuantizationPolicy(compute_dtype="float32"))


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
def old_adapter_by_peft() -> Any:
    from peft import PeftModel

    from pytest_qvl.checks import adapter_roundtrip

    with tempfile.TemporaryDirectory() as folder:
        _old_adapter(folder)
        return adapter_roundtrip(PeftModel.from_pretrained(embedded(), folder), folder)


@scenario
def old_adapter_by_transformers() -> Any:
    from pytest_qvl.checks import adapter_roundtrip

    with tempfile.TemporaryDirectory() as folder:
        _old_adapter(folder)
        model = embedded()
        model.load_adapter(folder)
        return adapter_roundtrip(model, folder)


# --- PEFT -----------------------------------------------------------------------------------------------------------


@scenario
def rslora_scale() -> Any:
    """rsLoRA, its scale set to 1: what it is anyway."""
    from pytest_qvl.checks import layer_arithmetic
    from pytest_qvl.faults.case import lora_config

    model = adapted(embedded(), use_rslora=True)
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 1.0)
    return layer_arithmetic(model, batch("side"), lora_config(use_rslora=True))


@scenario
def two_adapters() -> Any:
    """Beside the adapter that is saved, one whose name has its name in it."""
    from pytest_qvl.checks import adapter_roundtrip
    from pytest_qvl.faults.case import lora_config

    model = adapted(embedded())
    model.add_adapter("default_2", lora_config(init_lora_weights=False))
    return adapter_roundtrip(model)


# --- collators ----------------------------------------------------------------------------------------------------------


def _collated(framework: str, set_up: str, case: str) -> Any:
    """A framework's collator on the rows of one property of docs/collators.md."""
    from importlib import import_module

    from collating.parts import Asked, write_parts
    from collating.properties import CASES

    from pytest_qvl import checks

    with tempfile.TemporaryDirectory() as folder:
        parts = write_parts("qwen2_5_vl", Path(folder))
        rows = CASES[case].rows(parts.cell)
        collate = import_module(f"collating.adapters.{framework}").collator(Asked(set_up), parts)
        return checks.batch(collate(rows), parts.judge, parts.config, [row.compared() for row in rows])


@scenario
def trl_completion() -> Any:
    return _collated("trl", "prompt and completion", "plain")


@scenario
def zoo_completion() -> Any:
    """Unsloth's collator on rows of prompt and completion."""
    from collating.parts import write_parts
    from collating.properties import CASES
    from unsloth_zoo.vision_utils import UnslothVisionDataCollator

    from pytest_qvl import checks

    with tempfile.TemporaryDirectory() as folder:
        parts = write_parts("qwen2_5_vl", Path(folder))
        rows = CASES["plain"].rows(parts.cell)
        collate = UnslothVisionDataCollator(parts.model, parts.processor("right"), completion_only_loss=True)
        split = [
            {"prompt": row.messages()[:-1], "completion": row.messages()[-1:], "images": row.images} for row in rows
        ]
        return checks.batch(collate(split), parts.judge, parts.config, [row.compared() for row in rows])
