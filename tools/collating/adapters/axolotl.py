"""Axolotl: ``MultiModalChatDataCollator`` with the processing strategy of its ``qwen2_vl`` chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from collating.parts import Asked, Parts, Row, Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable

SET_UPS = {
    "images in messages": "`chat_template: qwen2_vl`, as in its example configurations for Qwen2-VL and Qwen2.5-VL",
    "column of images": "the same with the images in a column beside the messages",
}
TEMPLATE = "qwen2_vl"


def collator(asked: Asked, parts: Parts) -> Callable[[list[Row]], Any]:
    """``MultiModalChatDataCollator``."""
    from axolotl.processing_strategies import get_processing_strategy
    from axolotl.utils.chat_templates.base import get_chat_template
    from axolotl.utils.collators.mm_chat import MultiModalChatDataCollator

    if asked.packed:
        raise Unsupported("the collator refuses packing")
    if asked.limit is not None:
        raise Unsupported("the collator has no limit of length")
    processor = parts.processor(asked.side)
    template = get_chat_template(TEMPLATE, tokenizer=processor.tokenizer)
    strategy = get_processing_strategy(processor, template, TEMPLATE, model_type=parts.model_type)
    collate = MultiModalChatDataCollator(tokenizer=processor.tokenizer, processing_strategy=strategy)
    if asked.set_up == "column of images":
        return lambda rows: collate([_with_column(row) for row in rows])
    return lambda rows: collate([{"messages": row.messages()} for row in rows])


def _with_column(row: Row) -> dict[str, Any]:
    if row.frames:
        raise Unsupported("the column is for images")
    return {"messages": row.messages(bare=True), "images": row.images or None}
