"""Unsloth: ``UnslothVisionDataCollator`` of unsloth_zoo, which its notebooks hand to ``SFTTrainer``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from collating.parts import Asked, Parts, Row, Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable

SET_UPS = {
    "as in its notebooks": "`UnslothVisionDataCollator(model, processor)`",
    "responses only": "the same with `train_on_responses_only=True` and the ChatML headers",
}


def collator(asked: Asked, parts: Parts) -> Callable[[list[Row]], Any]:
    """``UnslothVisionDataCollator``."""
    from unsloth_zoo.vision_utils import UnslothVisionDataCollator

    if asked.packed:
        raise Unsupported("Unsloth does not pack rows with images")
    more: dict[str, Any] = {}
    if asked.set_up == "responses only":
        more = {
            "train_on_responses_only": True,
            "instruction_part": "<|im_start|>user\n",
            "response_part": "<|im_start|>assistant\n",
        }
    collate = UnslothVisionDataCollator(parts.model, parts.processor(asked.side), max_seq_length=asked.limit, **more)
    return lambda rows: collate([{"messages": row.messages()} for row in rows])
