"""Mistakes between dataset and model."""

from __future__ import annotations

from contextlib import contextmanager

from .mistake import mistake

IGNORED = -100


def collated(name, *, source, words, check="label_mask"):
    """Register a mistake that is a function from a sound batch to a broken one."""

    def register(change):
        @contextmanager
        def plant(bench, folder, guard):
            def collate(samples):
                return change(bench, bench.collate(samples)) or {}

            with bench.model() as model:
                yield bench.trainer(model, folder, guard, collate=collate)

        mistake(name, source=source, check=check, words=words)(plant)
        return change

    return register


@collated(
    "prompt-in-the-loss",
    source="unslothai/unsloth#3772, roboflow/maestro#129, huggingface/trl#3751",
    words=("prompt",),
)
def prompt(bench, batch):
    labels = batch["input_ids"].clone()
    labels[batch["attention_mask"] == 0] = IGNORED
    for token in ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>"):
        labels[labels == bench.processor.tokenizer.convert_tokens_to_ids(token)] = IGNORED
    return batch | {"labels": labels}


@collated(
    "placeholders-in-the-loss",
    source="NielsRogge/Transformers-Tutorials#511, om-ai-lab/VLM-R1#123",
    words=("vision tokens",),
)
def placeholders(bench, batch):
    image = bench.processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    labels = batch["labels"].clone()
    labels[batch["input_ids"] == image] = image
    return batch | {"labels": labels}


@collated("padding-in-the-loss", source="NielsRogge/Transformers-Tutorials#511", words=("padding",))
def padding(bench, batch):
    labels = batch["labels"].clone()
    pad = batch["attention_mask"] == 0
    labels[pad] = batch["input_ids"][pad]
    return batch | {"labels": labels}


@collated(
    "answers-cut-off",
    source="bytedance/UniVR#13, OpenBMB/MiniCPM-V#662",
    words=("teach nothing",),
)
def cut(bench, batch):
    labels = batch["labels"].clone()
    labels[0] = IGNORED
    return batch | {"labels": labels}


@collated(
    "end-of-answer-not-learned",
    source="shibing624/MedicalGPT#157, huggingface/trl#976, huggingface/transformers#23530",
    words=("<|im_end|>",),
)
def no_end(bench, batch):
    labels = batch["labels"].clone()
    labels[labels == bench.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")] = IGNORED
    return batch | {"labels": labels}


@collated(
    "labels-shifted-twice",
    source="huggingface/transformers#44642, InternLM/InternLM#318",
    words=("shifted",),
)
def shifted(bench, batch):
    return batch | {"labels": batch["labels"].roll(-1, dims=1)}
