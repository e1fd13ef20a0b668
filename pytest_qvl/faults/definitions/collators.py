"""Training collators that spoil what they collate; the batches that are evaluated stay as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.samples.batch import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from pytest_qvl.faults.case import Case

    Batch = dict[str, torch.Tensor]


def _in_training(case: Case, change: Callable[[Batch], Batch]) -> None:
    """Pass every batch that has labels through ``change``."""
    case.collators.append(lambda batch, _samples: change(batch) if "labels" in batch else batch)


def _images(batch: Batch) -> list[torch.Tensor]:
    """The patches of each image."""
    import torch

    return list(torch.split(batch["pixel_values"], batch["image_grid_thw"].prod(dim=1).tolist()))


@fault(
    "training-images-exchanged",
    "The training collator exchanges two images of one size; batches for evaluation are right.",
    target="batch",
    check="picture_pairing",
    expected_words=("holds the pixels of",),
)
def _images_exchanged(case: Case) -> Iterator[None]:
    import torch

    def exchange(batch: Batch) -> Batch:
        images, grids = _images(batch), batch["image_grid_thw"].tolist()
        one, other = next((i, j) for j in range(len(grids)) for i in range(j) if grids[i] == grids[j])
        images[one], images[other] = images[other], images[one]
        return {**batch, "pixel_values": torch.cat(images)}

    _in_training(case, exchange)
    yield


@fault(
    "training-images-zeroed",
    "The training collator hands over zeros for every image; batches for evaluation are right.",
    target="batch",
    check="picture_pairing",
    expected_words=("all of its values are 0", "nothing of the image is left"),
)
def _images_zeroed(case: Case) -> Iterator[None]:
    _in_training(case, lambda batch: {**batch, "pixel_values": batch["pixel_values"].zero_()})
    yield


@fault(
    "training-images-rounded",
    "The training collator rounds pixel_values to whole numbers; batches for evaluation are right.",
    target="batch",
    check="picture_pairing",
    expected_words=("all of its values are whole numbers", "integer dtype"),
)
def _images_rounded(case: Case) -> Iterator[None]:
    _in_training(case, lambda batch: {**batch, "pixel_values": batch["pixel_values"].round()})
    yield


@fault(
    "training-grids-exchanged",
    "The training collator exchanges height and width of every grid; batches for evaluation are right.",
    target="batch",
    check="picture_pairing",
    expected_words=("(height and width are transposed)", "but alone it makes"),
)
def _grids_exchanged(case: Case) -> Iterator[None]:
    _in_training(case, lambda batch: {**batch, "image_grid_thw": batch["image_grid_thw"][:, [0, 2, 1]]})
    yield


@fault(
    "training-answers-exchanged",
    "The training collator pairs each answer with the prompt and the images of the row before it.",
    target="batch",
    check="training_collation",
    expected_words=("is taught", "where its answer is", "keep each answer with its own prompt"),
)
def _answers_exchanged(case: Case) -> Iterator[None]:
    _in_training(case, lambda batch: _with_answers_of(case, batch, [row - 1 for row in range(len(batch["labels"]))]))
    yield


def _with_answers_of(case: Case, batch: Batch, givers: Sequence[int]) -> Batch:
    """The batch, each row with the learned tokens of the row that `givers` has at its place; padded on the right."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    padding = {"input_ids": case.processor.tokenizer.pad_token_id, "labels": IGNORED}
    mask, supervised = batch["attention_mask"].bool(), batch["labels"] != IGNORED
    made = {
        name: pad_sequence(
            [
                torch.cat([values[row][mask[row] & ~supervised[row]], values[giver][supervised[giver]]])
                for row, giver in enumerate(givers)
            ],
            batch_first=True,
            padding_value=padding.get(name, 0),
        )
        for name, values in batch.items()
        if values.shape == mask.shape
    }
    return {**batch, **made}


@fault(
    "training-pair-exchanged",
    "Two answers to one prompt, the preferred and the rejected one, change places: both rows are sound by themselves.",
    target="batch",
    check="training_collation",
    expected_words=("is taught", "where its answer is", "keep each answer with its own prompt"),
    source="thinking-machines-lab/tinker-cookbook#46",
)
def _pair_exchanged(case: Case) -> Iterator[None]:
    preferred = min(case.rows, key=lambda sample: len(sample.images))
    said = preferred.answer
    other = next(text for text in ("unclear", "cannot say") if text not in said and said not in text)
    case.rows = [*case.rows, replace(preferred, id=f"{preferred.id}-rejected", answer=other)]
    first, second = case.rows.index(preferred), len(case.rows) - 1
    givers = [{first: second, second: first}.get(row, row) for row in range(len(case.rows))]

    def exchange(batch: Batch) -> Batch:
        return _with_answers_of(case, batch, givers) if len(batch["labels"]) == len(givers) else batch

    _in_training(case, exchange)
    yield


@fault(
    "training-mask-dropped",
    "The training collator pads rows and drops the attention_mask.",
    target="batch",
    check="training_collation",
    expected_words=("padding is attended to, since the batch has no attention_mask",),
)
def _mask_dropped(case: Case) -> Iterator[None]:
    _in_training(case, lambda batch: {name: value for name, value in batch.items() if name != "attention_mask"})
    yield


@fault(
    "training-mask-all-ones",
    "The training collator makes an attention_mask of ones, padding included.",
    target="batch",
    check="training_collation",
    expected_words=("padding is attended to, since the attention_mask is 1 there",),
)
def _mask_of_ones(case: Case) -> Iterator[None]:
    import torch

    _in_training(case, lambda batch: {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])})
    yield


@fault(
    "training-positions-of-text",
    "The training collator brings position_ids of its own, counted as if every token were text.",
    target="batch",
    check="mrope_positions",
    expected_words=("plain 1-D positions",),
)
def _positions_of_text(case: Case) -> Iterator[None]:
    def count(batch: Batch) -> Batch:
        mask = batch["attention_mask"]
        return {**batch, "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0).expand(3, *mask.shape).clone()}

    _in_training(case, count)
    yield


@fault(
    "packed-samples-see-each-other",
    "The training collator packs all samples into one row, with M-RoPE ids that start again and nothing to part them.",
    target="batch",
    check="causality",
    expected_words=("it must move no output of another sample that is packed into its row",),
)
def _packed(case: Case) -> Iterator[None]:

    from pytest_qvl.checks.support.mrope import VisionIds, mrope_oracle
    from pytest_qvl.models.anatomy import anatomy

    parts = anatomy(case.model)
    vision = VisionIds(parts.image_token_id, parts.video_token_id)

    def pack(batch: Batch) -> Batch:
        mask = batch["attention_mask"]
        positions = mrope_oracle(batch["input_ids"], mask, batch["image_grid_thw"], vision, parts.merge_size)
        rows = {name: value[mask.bool()][None] for name, value in batch.items() if value.shape == mask.shape}
        del rows["attention_mask"]
        others = {name: value for name, value in batch.items() if value.shape != mask.shape}
        return {**others, **rows, "position_ids": positions[:, mask.bool()][:, None]}

    _in_training(case, pack)
    yield
