"""Each row of a batch against the question and the images it was made of."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.packing import refuse_packed
from pytest_qvl.checks.support.placeholders import attended, model_inputs, show_grid, value_problems, visual_tokens
from pytest_qvl.checks.support.thoughts import with_thoughts
from pytest_qvl.evidence import CannotJudge, Evidence, InputError, Judge
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.samples.batch import prompt
from pytest_qvl.samples.exif import ORIENTATIONS, as_stored

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from PIL.Image import Image

    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.samples import Sample


@check(promise=5)
def picture_pairing(model: Any, processor: Any, samples: Sequence[Sample], batch: Mapping[str, Any]) -> Evidence:
    """Every row of the batch holds its own sample's prompt and images, in the sample's order.

    Pixel rows and grid of each image are compared, bitwise, with what the image processor makes of that image
    alone. Images swapped before the model, or a grid with height and width exchanged, fit everywhere and raise
    nothing; so does an image that was read without its EXIF orientation, which is named. Each row must begin with the
    very tokens that the processor's chat template makes of its sample, up to where the answer begins: a model that is
    trained with another system prompt, another line break or the image in another place answers worse than it could,
    and nothing says so. Where the template can open a thought in front of the answer (Qwen3.5) each of its prompts is
    right. Padding in front of a row must not be attended to, as it is where the ``attention_mask`` is dropped or all
    ones: it would move every position of the row. Batches for training (with answers behind the prompt) and for
    generation are judged alike. No forward pass.

    Args:
        model: Qwen-VL model, wrapped or not; only its token ids and merge size are read.
        processor: The processor the batch was made with.
        samples: What the batch was made of, row by row.
        batch: What the processor returned, on any device and in any floating dtype (a cast is repeated here).

    Raises:
        CheckFailed: Names sample and image, and whose pixels stand there, or both grids, or dtype and range of
            the pixels; or the first token that is another than the template's; or rows whose padding is attended to.
        CannotJudge: No image among the samples, or several samples are packed into a row.
        ValueError: Not one sample per row.
    """
    judge = Judge("picture_pairing", "each row holds its own question and images, in order")
    parts, inputs = anatomy(model), model_inputs(batch)
    ids = inputs["input_ids"]
    refuse_packed(inputs, "which tokens and images belong to which sample cannot be told")
    if len(samples) != len(ids):
        raise InputError(f"picture_pairing needs the sample of each row: {len(samples)} samples, {len(ids)} rows")
    images = [
        _processed(processor, row, sample, number)
        for row, sample in enumerate(samples)
        for number in range(len(sample.images))
    ]
    if not images:
        raise CannotJudge("no sample has an image")
    judge.report("images", len(images))
    if _judge_rows(judge, parts, processor, samples, inputs, images=images):
        expected = [
            _prompts_ids(parts, processor, sample, [image for image in images if image.row == row])
            for row, sample in enumerate(samples)
        ]
        _judge_prompts(judge, processor, samples, inputs, expected)
    complete = "image_grid_thw" in inputs and "pixel_values" in inputs
    grids = [tuple(grid) for grid in inputs["image_grid_thw"].tolist()] if complete else []
    if not judge.equal(
        "images in the batch",
        len(grids),
        len(images),
        else_say=f"the batch has {len(grids)} images, its samples have {len(images)}",
    ):
        return judge.verdict()
    wrong_grids = [
        _grid_sentence(image, grid, images) for image, grid in zip(images, grids, strict=True) if image.grid != grid
    ]
    judge.equal("wrong grids", len(wrong_grids), 0, else_say="; ".join(wrong_grids[:3]))
    wrong_values = value_problems(inputs["pixel_values"])
    judge.equal("defects of the pixel values", len(wrong_values), 0, else_say="; ".join(wrong_values))
    wrong_pixels = _wrong_pixels(processor, inputs["pixel_values"], grids, images)
    judge.equal("images with wrong pixels", len(wrong_pixels), 0, else_say="; ".join(wrong_pixels[:3]))
    return judge.verdict()


def _judge_rows(
    judge: Judge,
    parts: Parts,
    processor: Any,
    samples: Sequence[Sample],
    inputs: Mapping[str, Any],
    *,
    images: Sequence[_ProcessedImage],
) -> bool:
    """Whether each row has its own sample's question and as many placeholders as its images make visual tokens."""
    ids, mask = inputs["input_ids"], attended(inputs)
    misplaced, strangers = [], []
    for row, sample in enumerate(samples):
        promised = sum(len(each.pixels) for each in images if each.row == row) // parts.merge_size**2
        placeholders = int((ids[row] == parts.image_token_id).sum())
        if placeholders != promised:
            misplaced.append(
                f"row {row} has {placeholders} placeholders, the images of its sample {sample.id!r} make {promised} "
                "visual tokens"
            )
        if _plain(sample.question) not in _plain(_decoded(processor, ids[row][mask[row]])):
            strangers.append(f"row {row} does not hold the question of sample {sample.id!r} ({sample.question!r})")
    judge.equal("rows with another sample's placeholders", len(misplaced), 0, else_say="; ".join(misplaced[:3]))
    judge.equal("rows with another question", len(strangers), 0, else_say="; ".join(strangers[:3]))
    return not misplaced and not strangers


def _judge_prompts(
    judge: Judge,
    processor: Any,
    samples: Sequence[Sample],
    inputs: Mapping[str, Any],
    expected: Sequence[list[list[int]]],
) -> None:
    """Hold each row, behind padding that must not be attended to, against the prompts that it may begin with."""
    padding = [_leading_padding(processor, inputs, row, wanted) for row, (wanted, *_) in enumerate(expected)]
    _judge_padding(judge, inputs, padding)
    drifts = _prompt_drifts(processor, samples, inputs, expected, padding)
    judge.equal(
        "rows with another prompt than the chat template's",
        len(drifts),
        0,
        else_say=(
            f"{len(drifts)} of {len(samples)} prompts are not those of the processor's chat template, with which "
            f"replies are generated: {'; '.join(drifts[:2])}; use one template for both (processor.chat_template)"
        ),
    )


def _leading_padding(processor: Any, inputs: Mapping[str, Any], row: int, expected: Sequence[int]) -> int:
    """How many attended tokens at the start of a row are padding: pad tokens that its prompt does not begin with."""
    pad = processor.tokenizer.pad_token_id
    ids = inputs["input_ids"][row][attended(inputs)[row]].tolist()
    if pad is None or expected[:1] == [pad]:
        return 0
    return next((place for place, token in enumerate(ids) if token != pad), 0)


def _judge_padding(judge: Judge, inputs: Mapping[str, Any], padding: Sequence[int]) -> None:
    rows = [row for row, count in enumerate(padding) if count]
    mask = inputs.get("attention_mask")
    why = "the batch has no attention_mask" if mask is None else "the attention_mask is 1 there"
    first = f"row {rows[0]} begins with {padding[rows[0]]} pad tokens; " if rows else ""
    judge.equal(
        "rows whose padding is attended to",
        len(rows),
        0,
        else_say=(
            f"padding is attended to in {len(rows)} of {len(padding)} rows, since {why}: {first}hand on the "
            "attention_mask that the processor returns, 0 wherever input_ids are padded"
        ),
    )


def _prompt_drifts(
    processor: Any,
    samples: Sequence[Sample],
    inputs: Mapping[str, Any],
    expected: Sequence[list[list[int]]],
    padding: Sequence[int],
) -> list[str]:
    """One sentence per row that, behind its `padding`, begins with none of the prompts expected of it."""
    mask = attended(inputs)
    drifts = []
    for row, (sample, prompts) in enumerate(zip(samples, expected, strict=True)):
        found = inputs["input_ids"][row][mask[row]].tolist()[padding[row] :]
        if not any(found[: len(wanted)] == wanted for wanted in prompts):
            nearest = max(prompts, key=lambda wanted: _parting(found, wanted))
            drifts.append(f"row {row} (sample {sample.id!r}) {_drift(processor, found[: len(nearest)], nearest)}")
    return drifts


def _prompts_ids(parts: Parts, processor: Any, sample: Sample, images: Sequence[_ProcessedImage]) -> list[list[int]]:
    """The sample's prompts by the processor's chat template, placeholders expanded for its own images."""
    tokenizer = processor.tokenizer
    sizes = [visual_tokens(image.grid, parts.merge_size) for image in images]
    placeholder = tokenizer.convert_ids_to_tokens(parts.image_token_id)
    first, *rest = prompt(processor, sample).split(placeholder)
    text = first + "".join(placeholder * size + piece for size, piece in zip(sizes, rest, strict=True))
    return [tokenizer(each)["input_ids"] for each in with_thoughts(processor, text)]


def _parting(found: Sequence[int], expected: Sequence[int]) -> int:
    """The first place at which two prompts differ."""
    return next((n for n, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(found))


def _drift(processor: Any, found: list[int], expected: list[int]) -> str:
    """Where two prompts part, with what stands there in both."""
    place = _parting(found, expected)
    here, there = (_decoded_list(processor, ids[place : place + 6]) for ids in (found, expected))
    return f"has {here!r} at token {place} where the template has {there!r}"


def _decoded_list(processor: Any, ids: list[int]) -> str:
    import torch

    return _decoded(processor, torch.tensor(ids, dtype=torch.int64))


@dataclass(frozen=True)
class _ProcessedImage:
    """What the image processor makes of one image alone."""

    name: str
    row: int
    original: Image
    pixels: torch.Tensor
    grid: tuple[int, ...]


def _processed(processor: Any, row: int, sample: Sample, number: int) -> _ProcessedImage:
    image = sample.images[number]
    made = processor.image_processor(images=[image], return_tensors="pt")
    name = f"row {row}, image {number} (sample {sample.id!r})"
    return _ProcessedImage(name, row, image, made["pixel_values"], tuple(made["image_grid_thw"][0].tolist()))


def _decoded(processor: Any, ids: torch.Tensor) -> str:
    text: str = processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _plain(text: str) -> str:
    """Text as tokenizers of this family normalise it."""
    return unicodedata.normalize("NFC", text)


def _grid_sentence(image: _ProcessedImage, grid: tuple[int, ...], images: Sequence[_ProcessedImage]) -> str:
    sentence = f"{image.name}: grid {show_grid(grid)}, but alone it makes {show_grid(image.grid)}"
    if grid == (image.grid[0], image.grid[2], image.grid[1]):
        return f"{sentence} (height and width are transposed)"
    others = [other.name for other in images if other.grid == grid]
    return f"{sentence} (the grid of {others[0]})" if others else sentence


def _wrong_pixels(
    processor: Any, pixels: torch.Tensor, grids: Sequence[tuple[int, ...]], images: Sequence[_ProcessedImage]
) -> list[str]:
    """One sentence per image whose own rows do not hold its own pixels."""
    import torch

    problems: list[str] = []
    start, start_by_grid = 0, 0
    for image, (frames, rows, columns) in zip(images, grids, strict=True):
        own = image.pixels.to(pixels)
        here = pixels[start : start + len(own)]
        by_grid = pixels[start_by_grid : start_by_grid + frames * rows * columns]
        start, start_by_grid = start + len(own), start_by_grid + frames * rows * columns
        if torch.equal(here, own):
            continue
        twins = [
            other.name
            for other in images
            if other is not image and any(torch.equal(found, other.pixels.to(pixels)) for found in (here, by_grid))
        ]
        if twins:
            problems.append(f"{image.name}: holds the pixels of {twins[0]}")
        elif orientation := _orientation_ignored(processor, image, by_grid):
            problems.append(
                f"{image.name}: lies as a file with EXIF orientation {orientation} stores it; turn images as EXIF "
                "says (PIL.ImageOps.exif_transpose) before the processor gets them"
            )
        elif here.shape != own.shape:
            problems.append(f"{image.name}: {len(here)} patches are left for its {len(own)}")
        else:
            patch = int((here != own).any(dim=1).nonzero()[0])
            gap = float((here.double() - own.double()).abs().max())
            left = _what_is_left(here)
            problems.append(f"{image.name}: patch {patch} differs from the image's own by up to {gap:.3g}{left}")
    return problems


def _what_is_left(pixels: torch.Tensor) -> str:
    """What damaged pixels ``(patches, values per patch)`` show of the damage, as the end of a sentence; or nothing."""
    import torch

    if bool((pixels == pixels.flatten()[0]).all()):
        return f": all of its values are {float(pixels.flatten()[0]):.3g}, so nothing of the image is left"
    if torch.equal(pixels, pixels.round()):
        return ": all of its values are whole numbers, so they were rounded or went through an integer dtype"
    return ""


def _orientation_ignored(processor: Any, image: _ProcessedImage, pixels: torch.Tensor) -> int | None:
    """The EXIF orientation whose stored image these are the pixels of, bitwise; None if there is none."""
    import torch

    for orientation in ORIENTATIONS:
        stored = as_stored(image.original, orientation)
        made = processor.image_processor(images=[stored], return_tensors="pt")["pixel_values"]
        if torch.equal(made.to(pixels), pixels):
            return orientation
    return None
