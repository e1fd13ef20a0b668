"""Packed rows: several samples in one row, told apart by position ids that start again at 0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.mrope import VisionIds, mrope_oracle
from pytest_qvl.checks.support.placeholders import attended
from pytest_qvl.evidence import CannotJudge, InputError
from pytest_qvl.models.layers import language_layers

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from pytest_qvl.models.anatomy import Parts

TEXT_FIRST = 4


def samples_in_rows(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Number of each token's sample within its row, ``(rows, length)`` int64 on the CPU; all 0 where nothing is packed.

    A sample begins where the batch's own ``position_ids`` are 0 again: the text positions where they come first
    (``(4, rows, length)``, which Transformers reads for packing), else all of them (``(3, rows, length)`` or
    ``(rows, length)``). Positions that never start again are those of one sample, whatever its text says.

    Raises:
        ValueError: ``position_ids`` of another shape.
    """
    import torch

    shape = tuple(inputs["input_ids"].shape)
    positions = inputs.get("position_ids")
    if positions is None:
        return torch.zeros(shape, dtype=torch.int64)
    axes = positions if positions.ndim == 3 else positions[None]
    if axes.shape[0] not in (1, 3, TEXT_FIRST) or axes.shape[2] != shape[1] or axes.shape[1] not in (1, shape[0]):
        raise InputError(
            f"position_ids are {tuple(positions.shape)}, expected (rows, length), (3, rows, length) or (4, rows, "
            f"length) with input_ids of {shape}"
        )
    axes = axes[:1] if axes.shape[0] == TEXT_FIRST else axes
    mask = attended(inputs).cpu()
    begins_again = (axes == 0).all(dim=0).cpu().expand(shape) & mask & (mask.cumsum(dim=1) > 1)
    numbers: torch.Tensor = begins_again.long().cumsum(dim=1)
    return numbers


def tokens_of_samples(numbers: torch.Tensor, kept: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """Each sample's row and tokens, ``(length,)`` bool, in reading order.

    Args:
        numbers: Of each token's sample within its row, ``(rows, length)``.
        kept: Tokens that are no padding, ``(rows, length)`` bool; a sample without any is left out.
    """
    own = (
        (row, kept[row] & (numbers[row] == number))
        for row in range(len(numbers))
        for number in range(int(numbers[row].max()) + 1)
    )
    return [(row, tokens) for row, tokens in own if bool(tokens.any())]


def is_packed(inputs: Mapping[str, Any]) -> bool:
    """Whether any row holds more than one sample."""
    return bool(samples_in_rows(inputs).any())


def refuse_packed(inputs: Mapping[str, Any], why: str) -> None:
    """Refuse rows that hold several samples.

    Args:
        inputs: Of the model.
        why: What cannot be told of them.

    Raises:
        CannotJudge: Some row holds more than one sample.
    """
    if is_packed(inputs):
        raise CannotJudge(
            f"several samples are packed into a row, so {why}: hand over the batch before it is packed; packed, it is "
            "judged by mrope_positions and causality"
        )


def pack(parts: Parts, batch: Mapping[str, Any]) -> dict[str, Any]:
    """All rows of a padded batch behind each other in one, as Transformers takes packed samples.

    ``position_ids`` ``(4, 1, length)``: text positions first, which say where samples begin, then the M-RoPE ids that
    each sample has alone; no ``attention_mask``, no ``mm_token_type_ids``, which positions were made of. And
    ``use_cache=False``: Transformers parts samples only where there is no cache.

    Args:
        parts: The model that it is for.
        batch: What the processor or a collator made, padded on either side, with labels or without.

    Raises:
        CannotJudge: The batch holds a video, or the model has linear attention, whose state runs through all that
            stands in a row: positions part attention only (modelscope/ms-swift#9618).
    """
    import torch

    if any(not layer.attends for layer in language_layers(parts)):
        raise CannotJudge(
            "the batch is not packed, and packing it here by positions would not part the samples for linear attention "
            f"({parts.family}); a batch that your collator packed, with cu_seq_lens for kernels that read it, is judged"
        )
    if bool((batch["input_ids"] == parts.video_token_id).any()):
        raise CannotJudge("videos are not packed here: their time is known to the collator that made them")
    mask = attended(batch).cpu()
    vision = VisionIds(parts.image_token_id, parts.video_token_id)
    ids = batch["input_ids"]
    right = mrope_oracle(ids, mask, batch.get("image_grid_thw"), vision, parts.merge_size)
    text = (mask.cumsum(dim=1) - 1)[None]
    dropped = ("attention_mask", "mm_token_type_ids", "use_cache")
    made = {name: value for name, value in batch.items() if name not in dropped}
    for name, value in made.items():
        if value.shape == ids.shape:
            made[name] = value[mask.to(value.device)][None]
    positions = torch.cat([text, right])[:, mask][:, None]
    return {**made, "position_ids": positions.to(ids.device), "use_cache": False}
