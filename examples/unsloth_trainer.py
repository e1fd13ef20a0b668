"""QLoRA on a Qwen2.5-VL with Unsloth's model, collator and trainer, guarded by one line (``pip install unsloth``).

    python examples/unsloth_trainer.py
    python examples/unsloth_trainer.py --mistake vision-layers     # stops before the first step, and says why

Unsloth needs a GPU. ``--model`` is this package's small trained model, or any folder or name on the hub.
"""

from __future__ import annotations

import argparse
from typing import Any

import unsloth  # before transformers, peft and trl, which it patches  # noqa: F401
from trl import SFTConfig, SFTTrainer
from unsloth import FastVisionModel
from unsloth.trainer import UnslothVisionDataCollator

from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.samples import Sample, scenes
from pytest_qvl.training import Guard

MISTAKES = {
    "vision-layers": "finetune_vision_layers is left at its default, True: the vision tower gets adapters",
    "prompt-in-loss": "the collator is made without train_on_responses_only, and the question is learned too",
    "types-dropped": "the collator leaves out mm_token_type_ids, and M-RoPE falls back to positions of text",
}


def main(arguments: list[str] | None = None) -> None:
    """Train for a few steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(embedded_model_dir()), help="a folder or a name on the hub")
    parser.add_argument("--output", default="out", help="folder of checkpoints and of the guard's record")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--mistake", choices=MISTAKES, help="; ".join(f"{name}: {what}" for name, what in MISTAKES.items())
    )
    options = parser.parse_args(arguments)

    model, processor = FastVisionModel.from_pretrained(
        options.model,
        load_in_4bit=True,
        use_gradient_checkpointing="unsloth",
        use_exact_model_name=True,  # not Unsloth's own quantization of that model
    )
    model = FastVisionModel.get_peft_model(
        model,
        finetune_vision_layers=options.mistake == "vision-layers",
        finetune_language_layers=True,
        finetune_attention_modules=True,
        finetune_mlp_modules=True,
        r=8,
        lora_alpha=16,
    )
    FastVisionModel.for_training(model)

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=options.output,
            per_device_train_batch_size=2,
            max_steps=options.steps,
            learning_rate=2e-4,
            warmup_steps=1,
            bf16=True,
            remove_unused_columns=False,
            dataset_text_field="",
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=2048,
            save_strategy="steps",
            save_steps=options.steps,
            logging_steps=1,
            report_to="none",
        ),
        train_dataset=[{"messages": messages(sample)} for sample in scenes(seed=1, per_skill=4)],
        data_collator=collator(model, processor, options.mistake),
        processing_class=processor,
        callbacks=[Guard(vision_gradients="spare")],
    )
    trainer.train()
    print(f"trained {options.steps} steps; the guard's record is {options.output}/qvl_guard.json")


def messages(sample: Sample) -> list[dict[str, Any]]:
    """A conversation as Unsloth's collator takes it: images, question, answer."""
    images = [{"type": "image", "image": image} for image in sample.images]
    return [
        {"role": "user", "content": [*images, {"type": "text", "text": sample.question}]},
        {"role": "assistant", "content": [{"type": "text", "text": sample.answer}]},
    ]


def collator(model: Any, processor: Any, mistake: str | None) -> Any:
    """Unsloth's own, with the answers alone as labels."""
    answers_only = {
        "train_on_responses_only": True,
        "instruction_part": "<|im_start|>user\n",
        "response_part": "<|im_start|>assistant\n",
    }
    collate = UnslothVisionDataCollator(model, processor, **({} if mistake == "prompt-in-loss" else answers_only))
    if mistake != "types-dropped":
        return collate
    return lambda rows: {name: value for name, value in collate(rows).items() if name != "mm_token_type_ids"}


if __name__ == "__main__":
    main()
