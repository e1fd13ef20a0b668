"""ms-swift: ``Template.encode`` and ``Template.data_collator``, as ``swift sft`` uses them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from collating.parts import Asked, Parts, Row

if TYPE_CHECKING:
    from collections.abc import Callable

SET_UPS = {"swift sft": "`template.set_mode('train')`; packed rows as `--packing true` makes them"}


def collator(asked: Asked, parts: Parts) -> Callable[[list[Row]], Any]:
    """``Template.data_collator`` of a template in training mode."""
    from swift.model import get_processor
    from swift.template import get_template

    processor = get_processor(str(parts.folder), model_type=parts.model_type)
    template = get_template(processor, template_type=parts.model_type, max_length=asked.limit, padding_side=asked.side)
    template.set_mode("train")
    template.model = parts.model
    template.packing = template.padding_free = asked.packed

    def made(rows: list[Row]) -> Any:
        encoded = [template.encode(_row(row), return_length=True) for row in rows]
        for each in encoded:  # as LazyLLMDataset and PackingDataset hand rows on
            each["length"] = sum(each["lengths"])
        return template.data_collator([encoded] if asked.packed else encoded)

    return made


def _row(row: Row) -> dict[str, Any]:
    made: dict[str, Any] = {"messages": row.tagged()}
    if row.frames:
        made["videos"] = [[frame.copy() for frame in row.frames]]
    elif row.images:
        made["images"] = row.images
    return made
