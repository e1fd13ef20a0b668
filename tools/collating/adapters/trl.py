"""TRL: the collator that ``SFTTrainer`` makes for a processor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from collating.parts import Asked, Parts, Row, Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable

SET_UPS = {
    "prompt and completion": "rows of `prompt` and `completion`: `SFTTrainer` sets `completion_only_loss=True`",
    "messages": "rows of `messages`, as `SFTTrainer` collates them by default",
    "assistant only": "rows of `messages` with `assistant_only_loss=True` and TRL's training chat template",
}


def collator(asked: Asked, parts: Parts) -> Callable[[list[Row]], Any]:
    """``DataCollatorForVisionLanguageModeling``."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    if asked.packed:
        raise Unsupported("SFTTrainer refuses packing for data sets with images")
    processor = parts.processor(asked.side)
    if asked.set_up == "prompt and completion":
        collate = DataCollatorForVisionLanguageModeling(processor, max_length=asked.limit, completion_only_loss=True)
        return lambda rows: collate([_split(row) for row in rows])
    template = None
    if asked.set_up == "assistant only":
        template = _training_template(parts.model_type)
    collate = DataCollatorForVisionLanguageModeling(
        processor, max_length=asked.limit, assistant_only_loss=template is not None, chat_template=template
    )
    return lambda rows: collate([{"images": _images(row), "messages": row.messages(bare=True)} for row in rows])


def _images(row: Row) -> list[Any]:
    if row.frames:
        raise Unsupported("the collator takes images, no videos")
    return row.images


def _split(row: Row) -> dict[str, Any]:
    *prompt, completion = row.messages(bare=True)
    return {"images": _images(row), "prompt": prompt, "completion": [completion]}


def _training_template(model_type: str) -> str:
    from trl import chat_template_utils

    name = "qwen3_vl" if model_type == "qwen3_vl" else "qwen2_5_vl"
    template: str = getattr(chat_template_utils, f"{name}_training_chat_template")
    return template
