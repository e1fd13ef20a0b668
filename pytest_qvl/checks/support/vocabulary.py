"""Token ids that the model has no row for: a vocabulary that was trimmed below its tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.evidence import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_qvl.models.anatomy import Parts


def refuse_ids_beyond(parts: Parts, *, batch: Mapping[str, Any] | None = None, processor: Any = None) -> None:
    """Refuse inputs with ids beyond the embedding table, before the lookup fails (on CUDA it breaks the device).

    Rows without a token, as in every released checkpoint, and tokens that no input uses are nothing to refuse.

    Args:
        parts: The model.
        batch: Model inputs, ``input_ids`` among them.
        processor: A processor whose tokens for images and chat the model must have.

    Raises:
        ValueError: Names the largest id and the number of rows.
    """
    rows = parts.vocabulary
    ids = None if batch is None else batch.get("input_ids")
    largest = -1 if ids is None or not ids.numel() else int(ids.max())
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is not None:
        largest = max([largest, *(i for i in tokenizer.all_special_ids if i is not None), *_image_ids(processor)])
    if largest >= rows:
        raise InputError(
            f"token id {largest} has no row in the model's embeddings, which have {rows}: the vocabulary was trimmed "
            "below the tokenizer, or the tokenizer is another model's; call resize_token_embeddings(len(tokenizer)) "
            "before saving"
        )


def _image_ids(processor: Any) -> list[int]:
    found = getattr(processor, "image_token_id", None)
    return [found] if isinstance(found, int) else []
