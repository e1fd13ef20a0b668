"""What is built in an environment, and the check that is called on it; each function is a scenario of :mod:`pairs`.

A scenario returns where the check passes, and lets its ``CheckFailed`` out. All in float32 on the CPU, on the embedded
model or a small random one of another family, with the embedded model's processor.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_qvl.samples import Sample

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


@scenario
def limit_of_pixels() -> Any:
    """A checkpoint whose processor names its limits by ``size`` alone, as Qwen3-VL's do, loaded with an upper one."""
    from pytest_qvl.checks import image_preprocessing
    from pytest_qvl.models.sources.embedded import embedded_model_dir
    from pytest_qvl.models.sources.processors import PREPROCESSOR_FILE, load_processor

    _declare_torchvision()
    with tempfile.TemporaryDirectory() as name:
        folder = shutil.copytree(embedded_model_dir(), Path(name) / "checkpoint")
        file = folder / PREPROCESSOR_FILE
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings["size"] = {"shortest_edge": settings.pop("min_pixels"), "longest_edge": settings.pop("max_pixels")}
        file.write_text(json.dumps(settings), encoding="utf-8")
        limited = load_processor(folder, max_pixels=8 * 28**2)
        return image_preprocessing(embedded(quantized=False), limited, _rows("side colour nth_colour"))


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


@scenario
def old_adapter_by_peft() -> Any:
    from peft import PeftModel

    from pytest_qvl.checks import adapter_roundtrip

    with tempfile.TemporaryDirectory() as folder:
        _old_adapter(folder)
        return adapter_roundtrip(PeftModel.from_pretrained(embedded(), folder).eval(), folder)


# --- PEFT: more than one adapter ----------------------------------------------------------------------------------


@scenario
def two_adapters() -> Any:
    """The name of the one that is saved, "default", is part of the other's."""
    from pytest_qvl.checks import adapter_roundtrip
    from pytest_qvl.faults.case import lora_config

    model = adapted(embedded())
    model.add_adapter("default_2", lora_config())
    return adapter_roundtrip(model)


@scenario
def adapter_beside_a_reference() -> Any:
    """One that is trained further, beside a frozen copy of it that says what it was, as in DPO and GRPO."""
    from peft import PeftModel

    from pytest_qvl.checks import adapter_census
    from pytest_qvl.faults.case import lora_config

    with tempfile.TemporaryDirectory() as folder:
        adapted(embedded(quantized=False), init_lora_weights=False).save_pretrained(folder)
        model = PeftModel.from_pretrained(embedded(), folder, is_trainable=True)
        model.load_adapter(folder, "reference", is_trainable=False)
        return adapter_census(model, lora_config())


# --- Collators: a prompt with images, and its completion ------------------------------------------------------------


def _turns(sample: Sample, *, images: bool = False) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Prompt and completion of a sample in the layout of Transformers, the images themselves in it or only places."""
    shown = [{"type": "image", "image": image} if images else {"type": "image"} for image in sample.images]
    asked = {"role": "user", "content": [*shown, {"type": "text", "text": sample.question}]}
    answered = {"role": "assistant", "content": [{"type": "text", "text": sample.answer}]}
    return [asked], [answered]


def _judged(made: Any, samples: list[Sample], *, training: bool = True) -> Any:
    from pytest_qvl.checks import batch as judge

    given = []
    for sample in samples:
        prompt, completion = _turns(sample)
        given.append({"messages": [*prompt, *completion], "images": [*sample.images]})
    return judge(made, processor(), embedded(quantized=False), given, training=training)


def _rows(skills: str) -> list[Sample]:
    from pytest_qvl.samples import scenes

    return scenes(3, 1, skills.split())


@scenario
def trl_completion() -> Any:
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    collate = DataCollatorForVisionLanguageModeling(processor(), completion_only_loss=True)
    samples = _rows("side colour nth_colour")
    rows = []
    for sample in samples:
        prompt, completion = _turns(sample)
        rows.append({"images": [*sample.images], "prompt": prompt, "completion": completion})
    return _judged(collate(rows), samples)


@scenario
def trl_preference() -> Any:
    """Rows of DPO: all chosen answers, then all rejected ones."""
    from dataclasses import replace

    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    samples = _rows("side colour nth_colour")
    rejected = [replace(sample, answer="none") for sample in samples]
    rows = []
    for sample, worse in zip(samples, rejected, strict=True):
        prompt, chosen = _turns(sample)
        rows.append({"images": [*sample.images], "prompt": prompt, "chosen": chosen, "rejected": _turns(worse)[1]})
    made = DataCollatorForVisionPreference(processor())(rows)
    return _judged(made, [*samples, *rejected], training=False)


def _declare_torchvision() -> None:
    """Let torchvision be imported, also where it was built for CUDA and torch was not."""
    from tools.collating.shim import declare_operators

    declare_operators()


def _unsloth_collator() -> Any:
    """The collator's class. Its package's own start asks for a GPU in most releases, and is left out in all."""
    _declare_torchvision()
    found = find_spec("unsloth_zoo")
    assert found is not None
    assert found.submodule_search_locations is not None
    package = ModuleType("unsloth_zoo")
    package.__path__ = [*found.submodule_search_locations]
    sys.modules["unsloth_zoo"] = package
    from unsloth_zoo.vision_utils import UnslothVisionDataCollator

    return UnslothVisionDataCollator


@scenario
def unsloth_completion() -> Any:
    collate = _unsloth_collator()(embedded(quantized=False), processor(), completion_only_loss=True)
    samples = _rows("side text nth_colour")
    rows = [dict(zip(("prompt", "completion"), _turns(sample, images=True), strict=True)) for sample in samples]
    return _judged(collate(rows), samples)
