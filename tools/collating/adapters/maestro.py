"""Maestro: the collate function of its Qwen2.5-VL trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from collating.parts import Asked, Parts, Row, Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable

SET_UPS = {"train_collate_fn": "what `maestro qwen_2_5_vl train` collates with, under the names its training step uses"}
# In the order of what train_collate_fn returns; maestro.trainer.models.qwen_2_5_vl.core hands them on by these names.
NAMES = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "labels")


def collator(asked: Asked, parts: Parts) -> Callable[[list[Row]], Any]:
    """``train_collate_fn``."""
    from maestro.trainer.models.qwen_2_5_vl.loaders import train_collate_fn

    if parts.model_type != "qwen2_5_vl":
        raise Unsupported(f"Maestro has no trainer for {parts.label}")
    if asked.limit is not None:
        raise Unsupported("there is no limit of length")
    if asked.packed:
        raise Unsupported("Maestro does not pack")
    processor = parts.processor(asked.side)

    def collate(rows: list[Row]) -> dict[str, Any]:
        if any(len(row.images) != 1 or len(row.turns) != 1 for row in rows):
            raise Unsupported("a row is one image, one question and one answer")
        pairs = [(*row.images, {"prefix": row.turns[0][0], "suffix": row.turns[0][1]}) for row in rows]
        return dict(zip(NAMES, train_collate_fn(pairs, processor), strict=True))

    return collate
