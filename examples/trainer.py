"""QLoRA on a Qwen2.5-VL with ``transformers.Trainer``, guarded by one line.

    python examples/trainer.py
    python examples/trainer.py --mistake leaky-targets     # stops before the first step, and says why

The model is the embedded one (a million parameters, on the CPU in seconds) unless ``--model`` names another; the rows
are drawn scenes with questions and answers. ``--mistake`` plants what training scripts get wrong.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, Trainer, TrainingArguments

from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.models.sources.processors import load_processor
from pytest_qvl.samples import make_batch, scenes
from pytest_qvl.training import Guard

LANGUAGE_ONLY = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
SEVEN_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MISTAKES = {
    "visual-skip-list": "llm_int8_skip_modules=['visual', ...] keeps nothing out of 4 bits on Transformers 5",
    "leaky-targets": "the seven usual names of target modules are in the vision tower too",
    "early-optimizer": "the optimizer is made before the adapter, and holds the base",
    "prompt-in-loss": "labels are a copy of input_ids with nothing but padding masked",
    "types-dropped": "the collator leaves out mm_token_type_ids, and M-RoPE falls back to positions of text",
}


def main(arguments: list[str] | None = None) -> None:
    """Train for a few steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(embedded_model_dir()), help="a folder or a name on the hub")
    parser.add_argument("--output", default="out", help="folder of checkpoints and of the guard's record")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--mistake", choices=MISTAKES, help="; ".join(f"{name}: {what}" for name, what in MISTAKES.items())
    )
    options = parser.parse_args(arguments)

    processor = load_processor(options.model)  # AutoProcessor, with or without torchvision
    base = load_base(options.model, options.mistake)
    early = torch.optim.AdamW(base.parameters(), lr=2e-4) if options.mistake == "early-optimizer" else None
    targets = SEVEN_NAMES if options.mistake == "leaky-targets" else LANGUAGE_ONLY
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=options.steps,
            learning_rate=2e-4,
            warmup_steps=1,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            remove_unused_columns=False,
            save_strategy="steps",
            save_steps=options.steps,
            logging_steps=1,
            report_to="none",
        ),
        train_dataset=scenes(seed=1, per_skill=4),
        data_collator=lambda rows: collate(processor, rows, options.mistake),
        processing_class=processor,
        optimizers=(early, None),
        callbacks=[Guard(vision_gradients="spare")],
    )
    trainer.train()
    print(f"trained {options.steps} steps; the guard's record is {options.output}/qvl_guard.json")


def load_base(model: str, mistake: str | None) -> Any:
    """The base in NF4, vision tower and head in 16 bits; in float32 without a GPU, where bfloat16 is slow."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["visual" if mistake == "visual-skip-list" else "model.visual", "lm_head"],
    )
    base = AutoModelForImageTextToText.from_pretrained(model, quantization_config=quantization, dtype=dtype)
    return base.requires_grad_(False)


def collate(processor: Any, rows: list[Any], mistake: str | None) -> dict[str, torch.Tensor]:
    """A batch whose labels are the answers."""
    batch = make_batch(processor, rows, padding_side="right", answers=True)
    if mistake == "prompt-in-loss":
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    if mistake == "types-dropped":
        batch.pop("mm_token_type_ids", None)
    return batch


if __name__ == "__main__":
    main()
