"""NeMo AutoModel: the collate functions of its vision-language recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from collating.parts import Asked, Parts, Refused, Row, Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable

SET_UPS = {
    "COLLATE_FNS": "the function that `COLLATE_FNS` names for the processor's class, `default` where it names none",
    "pre-tokenized": "`PreTokenizedDatasetWrapper` and `pad_collate_fn`; packed rows with `neat_packed_vlm_collater`",
}
PACK = 1024  # tokens of a pack


def collator(asked: Asked, parts: Parts) -> Callable[[list[Row]], Any]:
    """What a recipe makes for the processor."""
    from nemo_automodel.components.datasets.vlm.collate_fns import COLLATE_FNS

    processor = parts.processor(asked.side)
    if asked.set_up == "pre-tokenized":
        return _packed(processor, parts) if asked.packed else _pretokenized(processor, asked)
    name = type(processor).__name__
    function = COLLATE_FNS.get(name, COLLATE_FNS["default"])
    more: dict[str, Any] = {}
    if asked.limit is not None:
        if name in COLLATE_FNS:
            raise Unsupported(f"{function.__name__} has no limit of length")
        more["max_length"] = asked.limit
    if asked.packed:
        raise Unsupported("it packs rows that are tokenized before: see the other set-up")
    return lambda rows: unshifted(function(_examples(rows), processor, **more))


def unshifted(batch: Any) -> dict[str, Any]:
    """Labels at the place of their token: this framework shifts them in the collator, Transformers in its loss."""
    import torch

    made = dict(batch)
    labels = made["labels"]
    made["labels"] = torch.cat((labels.new_full((len(labels), 1), -100), labels[:, :-1]), dim=1)
    return made


def _examples(rows: list[Row]) -> list[dict[str, Any]]:
    return [{"conversation": row.messages()} for row in rows]


def _pretokenized(processor: Any, asked: Asked) -> Callable[[list[Row]], Any]:
    from nemo_automodel.components.datasets.vlm.collate_fns import pad_collate_fn
    from nemo_automodel.components.datasets.vlm.datasets import PreTokenizedDatasetWrapper

    def made(rows: list[Row]) -> Any:
        read = PreTokenizedDatasetWrapper(_examples(rows), processor, max_length=asked.limit)
        try:
            items = [read[number] for number in range(len(rows))]
        except RuntimeError as error:
            if asked.limit is None or "Failed to load a valid sample" not in str(error):
                raise
            raise Refused("with a warning, another row takes the place of one that is too long") from error
        return unshifted(pad_collate_fn(items, processor))

    return made


def _packed(processor: Any, parts: Parts) -> Callable[[list[Row]], Any]:
    from nemo_automodel.components.datasets.vlm.collate_fns import neat_packed_vlm_collater
    from nemo_automodel.components.datasets.vlm.datasets import PreTokenizedDatasetWrapper
    from nemo_automodel.components.datasets.vlm.neat_packing_vlm import PackedDatasetWrapper

    padding = processor.tokenizer.pad_token_id

    def made(rows: list[Row]) -> Any:
        read = PreTokenizedDatasetWrapper(_examples(rows), processor)
        packs = PackedDatasetWrapper(
            read, [list(range(len(rows)))], PACK, padding, get_rope_index=parts.model.model.get_rope_index
        )
        return unshifted(neat_packed_vlm_collater([packs[0]], padding_idx=padding))

    return made
