"""Samples in, model inputs out, by way of the real processor."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

from pytest_qvl.evidence import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from pytest_qvl.samples.sample import Sample

# The label of what is not learned, as cross-entropy and Transformers have it.
IGNORED = -100
END_OF_TURN = "<|im_end|>"
ANSWER_HEADER = "<|im_start|>assistant\n"
OPENS, CLOSES = "<think>", "</think>"  # around a thought
PaddingSide = Literal["left", "right"]
# Tokens that only the chat template may write: each moves the turns or the images of the prompt.
_RESERVED = re.compile(r"<\|(endoftext|im_start|im_end|vision_start|vision_end|vision_pad|image_pad|video_pad)\|>")


def reserved_token(text: str) -> str | None:
    """The first special token in a text that belongs to the chat template (``<|image_pad|>``), or None."""
    found = _RESERVED.search(text)
    return None if found is None else found[0]


def messages(sample: Sample) -> list[dict[str, Any]]:
    """The sample as a one-turn conversation: its images, then its question."""
    return turn(["image"] * len(sample.images), sample.question)


def turn(shown: Sequence[str], question: str) -> list[dict[str, Any]]:
    """A conversation of one turn: what is shown (``image`` or ``video`` each), then the question."""
    return [{"role": "user", "content": [*({"type": kind} for kind in shown), {"type": "text", "text": question}]}]


def prompt(processor: Any, sample: Sample) -> str:
    """The prompt's text up to where the answer begins; one placeholder per image, not yet expanded."""
    return prompt_of(processor, messages(sample))


def prompt_of(processor: Any, conversation: list[dict[str, Any]]) -> str:
    """A conversation's text up to where the next answer begins; one placeholder per image or video, not yet expanded.

    A template that lets the model think first (Qwen3.5) is asked not to: the answer follows an empty thought. One that
    always opens a thought (Qwen3-VL-Thinking) cannot be asked: the thought is closed behind the tokens that open it.
    """
    template = getattr(processor, "chat_template", None)
    several = template.values() if isinstance(template, dict) else [template]
    options = {"enable_thinking": False} if any("enable_thinking" in (each or "") for each in several) else {}
    text: str = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True, **options)
    _, _, behind = text.rpartition(ANSWER_HEADER)
    return f"{text}{CLOSES}\n\n" if behind.count(OPENS) > behind.count(CLOSES) else text


def answer_ids(processor: Any, sample: Sample) -> list[int]:
    """The tokens a model should produce: the answer and the closing ``<|im_end|>``."""
    ids: list[int] = processor.tokenizer(sample.answer + END_OF_TURN, add_special_tokens=False)["input_ids"]
    return ids


def make_batch(
    processor: Any,
    samples: Sequence[Sample],
    *,
    padding_side: PaddingSide = "left",
    answers: bool = False,
    device: str | torch.device = "cpu",
    pixel_dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """Model inputs for samples, made by the processor itself: chat template, placeholders, patches, padding.

    Rows may differ in their number of images, none included. What the processor returns is handed on whole,
    so ``mm_token_type_ids`` is there exactly on releases whose processor makes it (Transformers 5).

    Args:
        processor: A Qwen-VL processor (:func:`pytest_qvl.models.sources.processors.load_processor`, or a user's own).
        samples: At least one.
        padding_side: Left for generation, right or left for a forward pass.
        answers: Append each answer with its ``<|im_end|>``, and add `labels`.
        device: Where the tensors go.
        pixel_dtype: Cast of ``pixel_values``; None leaves the processor's float32.

    Returns:
        ``input_ids`` and ``attention_mask`` (samples, length) int64; with images ``pixel_values`` (patches,
        values per patch) float and ``image_grid_thw`` (images, 3) int64; with `answers` ``labels``
        (samples, length) int64, -100 everywhere but on the answer's tokens and the closing ``<|im_end|>``.

    Raises:
        ValueError: No samples; a question or answer that holds a special token of the chat template; or an
            answer whose tokens do not stand at the end of its row as they stand alone (it begins with white
            space that melts into the prompt).
    """
    if not samples:
        raise InputError("make_batch needs at least one sample")
    for sample in samples:
        if token := reserved_token(sample.question) or reserved_token(sample.answer):
            raise InputError(f"sample {sample.id!r} holds {token} in its text; the chat template writes that token")
    texts = [prompt(processor, sample) for sample in samples]
    if answers:
        texts = [text + sample.answer + END_OF_TURN for text, sample in zip(texts, samples, strict=True)]
    images = [image for sample in samples for image in sample.images]
    made = processor(text=texts, images=images or None, padding=True, padding_side=padding_side, return_tensors="pt")
    batch: dict[str, torch.Tensor] = dict(made)
    if answers:
        batch["labels"] = _labels(processor, samples, batch)
    if pixel_dtype is not None and images:
        batch["pixel_values"] = batch["pixel_values"].to(pixel_dtype)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _labels(processor: Any, samples: Sequence[Sample], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    labels = batch["input_ids"].new_full(batch["input_ids"].shape, IGNORED)
    for row, sample in enumerate(samples):
        expected = answer_ids(processor, sample)
        places = batch["attention_mask"][row].nonzero().flatten()[-len(expected) :]
        found = batch["input_ids"][row, places]
        if found.tolist() != expected:
            raise InputError(
                f"sample {sample.id!r}: the answer {sample.answer!r} is {expected} alone "
                f"but {found.tolist()} at the end of its prompt; start it with a letter or a digit"
            )
        labels[row, places] = found
    return labels
