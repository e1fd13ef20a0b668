"""Mistakes in how the model is loaded, quantized and adapted."""

from __future__ import annotations

import copy

from .loops import adamw
from .mistake import mistake

SEVEN_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def quantized_otherwise(bench, dtype="float32", **changes):
    """A base of its own, the usual quantization changed in these fields."""
    import torch

    from pytest_qvl.models.quantized import usual_quantization

    return bench.load(dtype, usual_quantization(getattr(torch, dtype), **changes))


@mistake(
    "fp4-by-default",
    source="bitsandbytes-foundation/bitsandbytes#1177",
    check="quantization_census",
    words=("fp4", "bnb_4bit_quant_type='nf4'"),
)
def fp4(bench, folder, guard):
    from transformers import BitsAndBytesConfig

    default = BitsAndBytesConfig().bnb_4bit_quant_type
    with bench.model(base=quantized_otherwise(bench, bnb_4bit_quant_type=default)) as model:
        yield bench.trainer(model, folder, guard)


@mistake(
    "skip-list-without-effect",
    source="1038lab/ComfyUI-JoyCaption#53, unslothai/unsloth#4208",
    check="quantization_census",
    since_5=True,
    words=("vision", "visual"),
)
def skip_list(bench, folder, guard):
    with bench.model(base=quantized_otherwise(bench, llm_int8_skip_modules=["visual", "lm_head"])) as model:
        yield bench.trainer(model, folder, guard)


@mistake(
    "head-quantized-by-a-skip-list",
    source="huggingface/transformers#45674",
    check="quantization_census",
    words=("lm_head",),
)
def head_quantized(bench, folder, guard):
    with bench.model(base=quantized_otherwise(bench, llm_int8_skip_modules=["model.visual"])) as model:
        yield bench.trainer(model, folder, guard)


@mistake(
    "float32-compute-by-default",
    source="bitsandbytes-foundation/bitsandbytes#2077",
    check="quantization_census",
    words=("compute", "float32"),
)
def float32_compute(bench, folder, guard):
    with bench.model(base=quantized_otherwise(bench, "bfloat16", bnb_4bit_compute_dtype=None)) as model:
        yield bench.trainer(model, folder, guard, bf16=True)


@mistake(
    "seven-names-hit-the-vision-tower",
    source="yiqiao-yin/deepspeed-course#31",
    check="adapter_census",
    words=("leaked into vision", "language"),
)
def seven_names(bench, folder, guard):
    with bench.model(target_modules=SEVEN_NAMES) as model:
        yield bench.trainer(model, folder, guard)


@mistake(
    "all-linear-hits-the-merger",
    source="huggingface/peft#2267, 2U1/Qwen-VL-Series-Finetune#61",
    check="adapter_census",
    words=("merger",),
)
def all_linear(bench, folder, guard):
    with bench.model(target_modules="all-linear") as model:
        yield bench.trainer(model, folder, guard)


@mistake(
    "never-wrapped-by-peft",
    source="modelscope/ms-swift#6079",
    check="adapter_switched_on",
    words=("carries no adapter", "require grad"),
)
def no_adapter(bench, folder, guard):
    base = bench.base(quantized=False)
    base.requires_grad_(True)
    try:
        yield bench.trainer(base, folder, guard)
    finally:
        base.requires_grad_(False)


@mistake(
    "adapter-loaded-for-inference",
    source="huggingface/peft#282, huggingface/trl#6700",
    check="adapter_switched_on",
    words=("none of the", "is_trainable=True"),
)
def inference(bench, folder, guard):
    with bench.model() as model:
        model.requires_grad_(False)
        yield bench.trainer(model, folder, guard)


@mistake(
    "adapter-switched-off",
    source="huggingface/trl#6591, unslothai/unsloth#2736",
    check="adapter_switched_on",
    words=("switched off", "enable_adapter_layers"),
)
def switched_off(bench, folder, guard):
    with bench.model() as model:
        model.base_model.disable_adapter_layers()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        yield bench.trainer(model, folder, guard)


@mistake(
    "adapter-merged-before-training",
    source="huggingface/peft#2321",
    check="adapter_switched_on",
    words=("merged into the base", "unmerge_adapter"),
)
def merged(bench, folder, guard):
    with bench.model() as model:
        model.merge_adapter()
        try:
            yield bench.trainer(model, folder, guard)
        finally:
            model.unmerge_adapter()


@mistake(
    "adapter-in-float16",
    source="2U1/Qwen-VL-Series-Finetune#184, huggingface/transformers#30559",
    check="adapter_switched_on",
    words=("float16", "GradScaler"),
)
def half(bench, folder, guard):
    import torch

    with bench.model() as model:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(torch.float16)
        yield bench.trainer(model, folder, guard)


@mistake(
    "alpha-of-zero",
    source="vllm-project/vllm#39278",
    check="adapter_census",
    words=("lora_alpha is 0",),
)
def no_alpha(bench, folder, guard):
    with bench.model(lora_alpha=0) as model:
        yield bench.trainer(model, folder, guard)


@mistake(
    "embeddings-unfrozen",
    source="Blaizzy/mlx-vlm#2181",
    check="adapter_census",
    words=("require grad", "embed_tokens"),
)
def embeddings(bench, folder, guard):
    with bench.model() as model:
        model.get_base_model().get_input_embeddings().weight.requires_grad_(True)
        yield bench.trainer(model, folder, guard)


@mistake(
    "all-biases-trained",
    source="modelscope/ms-swift#7318",
    check="adapter_census",
    words=("bias='all'", "vision"),
)
def biases(bench, folder, guard):
    with bench.model(bias="all") as model:
        yield bench.trainer(model, folder, guard)


@mistake(
    "merger-copied-for-training",
    source="hiyouga/LlamaFactory#6754",
    check="adapter_census",
    words=("trained copies", "merger"),
)
def merger_copied(bench, folder, guard):
    with bench.model(modules_to_save=["merger"], quantized=False) as model:
        yield bench.trainer(model, folder, guard)


@mistake(
    "two-adapters-at-once",
    source="huggingface/trl#3196",
    check="adapter_census",
    words=("2 adapters",),
)
def two_adapters(bench, folder, guard):
    from peft import LoraConfig

    with bench.model() as model:
        model.add_adapter("second", LoraConfig(r=4, target_modules=r".*language_model.*\.q_proj"))
        model.base_model.set_adapter(["default", "second"])
        yield bench.trainer(model, folder, guard)


@mistake(
    "asked-rank-is-not-the-models",
    source="unslothai/unsloth#9326",
    check="adapter_census",
    words=("r=16",),
    lora_config={"r": 16, "lora_alpha": 8},
)
def other_rank(bench, folder, guard):
    with bench.model() as model:
        yield bench.trainer(model, folder, guard)


@mistake(
    "resumed-adapter-thrown-away",
    source="huggingface/lerobot#3459, illuin-tech/colpali#424",
    check="adapter_roundtrip",
    words=("not bitwise those of",),
)
def resumed(bench, folder, guard):
    import torch
    from transformers import TrainerCallback

    class Loses(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.zero_()

    with bench.model() as model:
        bench.trainer(model, folder, max_steps=2, save_strategy="steps", save_steps=1).train()
        trainer = bench.trainer(model, folder, Loses(), guard, max_steps=3, save_strategy="no")
        train = trainer.train
        trainer.train = lambda: train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        yield trainer


@mistake(
    "base-written-to-in-a-forward",
    source="huggingface/peft#1355",
    check="base_unchanged",
    words=("base tensors are not bitwise", "forward and backward pass alone", "merger"),
)
def written(bench, folder, guard):
    import torch

    from pytest_qvl.models.anatomy import anatomy

    with bench.model() as model:

        def drift(module, args):
            with torch.no_grad():
                next(module.parameters()).mul_(1.001)

        anatomy(model).merger.register_forward_pre_hook(drift)
        yield bench.trainer(model, folder, guard)


@mistake(
    "a-copy-of-the-model-is-optimized",
    source="adapter-hub/adapters#260",
    check="adapter_census",
    words=("optimizer misses",),
)
def copied(bench, folder, guard):
    with bench.model(quantized=False) as model:
        optimizer = adamw(p for p in copy.deepcopy(model).parameters() if p.requires_grad)
        yield bench.trainer(model, folder, guard, optimizers=(optimizer, None))
