"""Where the images and videos of a batch sit among its tokens, and whether batch and pixels agree at all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.evidence import CannotJudge, InputError
from pytest_qvl.models.anatomy import Parts, anatomy
from pytest_qvl.models.layers import family_of
from pytest_qvl.releases import installed, is_before
from pytest_qvl.samples.batch import IGNORED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

ALIGNED = ("attention_mask", "mm_token_type_ids", "labels")
LARGEST_PIXEL = 16.0
# Half a step of 8 bits under the largest deviation that a family normalises with (docs/limits.md#pixel-values).
HALF_A_LEVEL = 0.0039
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Kind:
    """Names of one kind of vision input.

    Attributes:
        noun: ``image`` or ``video``.
        pixels: Key of its patches in a batch.
        grids: Key of its grids.
        placeholder: Its token id.
        type: What marks its placeholders in ``mm_token_type_ids`` (Transformers 5); text is 0.
    """

    noun: str
    pixels: str
    grids: str
    placeholder: int
    type: int


def kinds(image: int, video: int) -> tuple[Kind, Kind]:
    """Images and videos, by the ids of their placeholders, in the order in which a model calls its vision tower."""
    return (
        Kind("image", "pixel_values", "image_grid_thw", image, 1),
        Kind("video", "pixel_values_videos", "video_grid_thw", video, 2),
    )


def kinds_of(parts: Parts) -> tuple[Kind, Kind]:
    """Images and videos of a model, as :func:`kinds` has them."""
    return kinds(parts.image_token_id, parts.video_token_id)


def type_ids(ids: torch.Tensor, of: tuple[Kind, Kind]) -> torch.Tensor:
    """The ``mm_token_type_ids`` of token ids: int64 of the same shape, 0 for text."""
    images, videos = (kind.type * (ids == kind.placeholder).long() for kind in of)
    return images + videos


@dataclass(frozen=True)
class Span:
    """The placeholders of one image, of one video, or of one frame where a family writes frames apart.

    Attributes:
        noun: ``image``, ``video`` or ``video frame``; what is numbered below. A frame is a temporal patch.
        image: Number in the batch (of an image, its row of ``image_grid_thw``).
        row: Batch row.
        in_row: Number within its row.
        start: Token index of its first placeholder, padding counted.
        length: Number of placeholders, which is its number of visual tokens.
        first: Number of its first visual token within the batch, those of videos behind those of images.
    """

    image: int
    row: int
    in_row: int
    start: int
    length: int
    first: int
    noun: str = "image"

    @property
    def stop(self) -> int:
        """Token index after its last placeholder."""
        return self.start + self.length

    def __str__(self) -> str:
        return f"row {self.row}, {self.noun} {self.in_row}"


_NOT_ASKED = ("labels", "use_cache")


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without its labels, ready for ``model(**inputs)`` and ``model.generate(**inputs)``.

    Nor with ``use_cache``, which a collator of packed rows adds for the ``Trainer``: checks say themselves which they
    judge.

    Raises:
        ValueError: No two-dimensional ``input_ids``.
    """
    ids = batch.get("input_ids")
    if ids is None or ids.ndim != 2:
        raise InputError("the batch needs input_ids of shape (rows, length)")
    return {name: value for name, value in batch.items() if name not in _NOT_ASKED and value is not None}


def refuse_positions_in_generation(inputs: Mapping[str, Any]) -> None:
    """Refuse to generate from a batch's own ``position_ids`` where ``generate()`` cannot.

    Up to Transformers 5.1, ``GenerationMixin.prepare_inputs_for_generation`` cuts ``position_ids`` along their second
    axis. That is the length of the usual ``(rows, length)``, but the rows of M-RoPE's ``(3, rows, length)``: a decode
    step for one token gets the positions of the whole prompt, and the attention crashes.

    Raises:
        CannotJudge: The batch holds such positions and Transformers is older than 5.2.
    """
    positions = inputs.get("position_ids")
    if positions is not None and positions.ndim == 3 and is_before("transformers", "5.2"):
        raise CannotJudge(
            f"generate() of Transformers {installed('transformers')} crashes on position_ids of shape "
            "(3, rows, length) at the first decode step (5.2.0 takes them): leave them out of what is generated from, "
            "the model works them out itself; mrope_positions judges those of the batch"
        )


def attended(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Which tokens are no padding, ``(rows, length)`` bool; all of them without an ``attention_mask``."""
    import torch

    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def visual_tokens(grid: Sequence[int], merge_size: int) -> int:
    """Visual tokens of one image: frames x rows x columns of patches, merged both ways."""
    frames, rows, columns = grid
    return frames * (rows // merge_size) * (columns // merge_size)


def show_grid(grid: Sequence[int]) -> str:
    """``1x8x6``: frames, rows and columns in patches; without frames ``8x6``."""
    return "x".join(map(str, grid))


def validate_batch(model: Any, batch: Mapping[str, Any]) -> list[str]:
    """What is wrong between the placeholders and the images or videos of a batch, found without running the model.

    Transformers notices only a wrong total, and nothing at all where ``pixel_values`` are missing or where
    ``TRANSFORMERS_DISABLE_TORCH_CHECK=1`` is set. Here each image's run of placeholders is held to its own
    grid, each video's to its, or a run a frame where the family writes frames apart.

    Args:
        model: The model the batch is for, wrapped or not; only its token ids and merge size are read.
        batch: ``input_ids`` (rows, length) int64 and whatever else the processor returned; int32 where the model does
            not make positions of them (a batch without images, or with ``position_ids``).

    Returns:
        One sentence per defect with row, image and token index; empty for a sound batch.

    Raises:
        ValueError: No two-dimensional ``input_ids``.
    """
    return _match(anatomy(model), batch)[1]


def spans(parts: Parts, batch: Mapping[str, Any]) -> list[Span]:
    """The placeholders of each image, in the order of the images, then those of each video.

    Raises:
        ValueError: The batch is malformed; :func:`validate_batch` lists everything that is wrong.
        CannotJudge: The batch holds neither image nor video, or a dummy image.
    """
    found, problems = _match(parts, batch)
    if problems:
        raise InputError(f"the batch is malformed: {problems[0]}")
    if not found:
        raise CannotJudge("the batch has no image; give at least one sample with an image")
    if hidden := dummies(parts, batch, found):
        raise CannotJudge(
            f"{hidden[0]} is a dummy that the attention_mask hides: pytest_qvl.checks.batch judges such a batch; give "
            "one without dummies here"
        )
    return found


def describe(found: Sequence[Span], row: int, token: int) -> str:
    """Where a token stands, in words: ``row 2, token 17 (image 1, visual token 3)``."""
    for span in found:
        if span.row == row and span.start <= token < span.stop:
            return f"row {row}, token {token} ({span.noun} {span.in_row}, visual token {token - span.start})"
    return f"row {row}, token {token} (text)"


def describe_visual(found: Sequence[Span], visual: int) -> str:
    """A visual token by its number in the batch, in words: ``visual token 3 of row 2, image 1``."""
    for span in found:
        if span.first <= visual < span.first + span.length:
            return f"visual token {visual - span.first} of {span}"
    return f"visual token {visual}, which belongs to no image"


def _match(parts: Parts, batch: Mapping[str, Any]) -> tuple[list[Span], list[str]]:
    model_inputs(batch)
    ids = batch["input_ids"].cpu()
    problems = _dtype_problems(batch)
    problems += [
        f"{name} has shape {tuple(batch[name].shape)}, input_ids {tuple(ids.shape)}: cut and pad together"
        for name in ALIGNED
        if batch.get(name) is not None and batch[name].shape != ids.shape
    ]
    found: list[Span] = []
    for kind in kinds_of(parts):
        runs, pixels = placeholder_runs(ids, kind.placeholder), batch.get(kind.pixels)
        if runs and pixels is None:
            row, start, length = runs[0]
            problems.append(
                f"row {row}, token {start}: {length} placeholders ({sum(run[2] for run in runs)} in all) but no "
                f"{kind.pixels}; the model reads the placeholder's own embedding there and raises nothing"
            )
            return [], problems
        grids = grids_of(batch, kind)
        if pixels is not None and (nothing := empty_problem(batch, kind)):
            return [], [*problems, nothing]
        if pixels is not None:
            problems += value_problems(pixels, kind.pixels)
            problems += _width_problems(parts, pixels, kind)
            problems += _pixel_problems(pixels, grids, parts.merge_size, kind)
        noun = kind.noun
        if noun == "video" and family_of(parts).video_time == "words":
            noun, grids = "video frame", [(1, h, w) for t, h, w in grids for _ in range(t)]
        first = sum(span.length for span in found)
        spans_of_kind, mismatches = _assign(runs, grids, parts.merge_size, noun, first)
        found += spans_of_kind
        problems += mismatches
    problems += _seconds_problems(parts, batch)
    if attended(batch).shape == ids.shape:
        problems += _hidden_problems(ids, attended(batch), parts, () if problems else dummies(parts, batch, found))
    return found, problems + _type_problems(parts, batch)


def _hidden_problems(ids: torch.Tensor, mask: torch.Tensor, parts: Parts, hidden_well: Sequence[Span]) -> list[str]:
    hidden = ((ids == parts.image_token_id) | (ids == parts.video_token_id)) & ~mask.cpu()
    for span in hidden_well:
        hidden[span.row, span.start : span.stop] = False
    places = hidden.nonzero().tolist()
    if not places:
        return []
    row, token = places[0]
    return [
        f"row {row}, token {token}: a placeholder that the attention_mask hides ({len(places)} in the batch); its "
        "visual token is never attended to"
    ]


def dummies(parts: Parts, batch: Mapping[str, Any], found: Sequence[Span]) -> list[Span]:
    """Images that are there for the vision tower alone, as trainings that shard it need one in every step.

    Such an image is hidden whole, with both vision tokens around it, in a row that attends to no other; nothing is
    learned of it, nor by its end. Inside of the row's text all of its pixels are of one colour: another image may be a
    real one under a wrong mask. :func:`pytest_qvl.checks.batch` judges what dummies do to positions.
    """
    import torch

    ids, mask = batch["input_ids"], attended(batch)
    vision = torch.isin(ids, torch.tensor(parts.vision_token_ids, device=ids.device))
    labels = batch.get("labels")
    images, _ = kinds_of(parts)
    sizes = [math.prod(grid) for grid in grids_of(batch, images)]
    made = []
    for span in found:
        if span.noun != images.noun:
            continue
        whole, row = slice(span.start - 1, span.stop + 1), span.row
        if whole.start < 0 or whole.stop > ids.shape[1] or bool((vision[row] & mask[row]).any()):
            continue
        learned = labels is not None and bool((labels[row, whole.start : whole.stop + 1] != IGNORED).any())
        if learned or bool(mask[row, whole].any()) or not bool(vision[row, whole].all()):
            continue
        first = sum(sizes[: span.image])
        pixels = batch["pixel_values"][first : first + sizes[span.image]]
        behind = not bool(mask[row, span.stop :].any()) and bool(mask[row].any())
        if behind or of_one_colour(pixels, int(parts.config.vision_config.in_channels)):
            made.append(span)
    return made


def of_one_colour(pixels: torch.Tensor, channels: int) -> bool:
    """Whether all pixels of an image ``(patches, values per patch)`` are the same, up to what resizing floats adds."""
    return is_plain(pixels.detach().reshape(len(pixels), channels, -1).transpose(0, 1).flatten(1), pixels.dtype)


def is_plain(values: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the values of each channel ``(channels, values)``, as `dtype` holds them, are one up to rounding.

    They lie within half a step of 8 bits, or are two numbers of `dtype` with none between: one value may be rounded to
    either, and in bfloat16 these are further apart from 1/2 on (docs/limits.md#pixel-values).
    """
    import torch

    low, high = (each.double() for each in (values.amin(dim=1), values.amax(dim=1)))
    _, exponent = torch.frexp(torch.minimum(low.abs(), high.abs()))
    apart = torch.ldexp(torch.full_like(low, torch.finfo(dtype).eps), exponent - 1)
    return bool(((high - low < HALF_A_LEVEL) | (high - low <= apart)).all())


def empty_problem(batch: Mapping[str, Any], kind: Kind) -> str:
    """What is wrong with pixels that a batch has, or their grids, where either holds nothing; empty for nothing.

    A batch without images has neither. On empty tensors forward raises, in words that name none of them
    (``torch.cat(): expected a non-empty list of Tensors``).
    """
    pixels, grids = batch[kind.pixels], batch.get(kind.grids)
    if grids is not None and grids.ndim == 2 and len(grids) and (zero := (grids < 1).any(dim=1).nonzero().tolist()):
        number = zero[0][0]
        return (
            f"{kind.grids} of {kind.noun} {number} is {show_grid(grids[number].tolist())} (frames, rows and columns of "
            f"patches), which holds none: an empty {kind.noun}, or a buffer that was never filled"
        )
    empty = [
        f"{name} {tuple(value.shape)}"
        for name, value in ((kind.pixels, pixels), (kind.grids, grids))
        if value is not None and not value.numel()
    ]
    if not empty:
        return ""
    return (
        f"the batch holds {' and '.join(empty)}, without a value: where no row has a {kind.noun}, leave out both "
        f"{kind.pixels} and {kind.grids} (on empty ones the model raises); where one has, the collator lost them"
    )


def grids_of(batch: Mapping[str, Any], kind: Kind) -> list[Grid]:
    """Frames, rows and columns in patches of each image (video) of a batch."""
    grids = batch.get(kind.grids)
    return [] if grids is None else [(t, h, w) for t, h, w in grids.tolist()]


def seconds_per_grid(batch: Mapping[str, Any]) -> list[float] | None:
    """``second_per_grid_ts`` as numbers: of a tensor, or of a list of numbers or tensors; None for none."""
    given = batch.get("second_per_grid_ts")
    if given is None:
        return None
    one = isinstance(given, int | float) or getattr(given, "ndim", 1) == 0
    return [float(each) for each in ([given] if one else given)]


def _seconds_problems(parts: Parts, batch: Mapping[str, Any]) -> list[str]:
    """Seconds that are not one number a video, where positions are made of them."""
    videos = len(grids_of(batch, kinds_of(parts)[1]))
    seconds = seconds_per_grid(batch)
    if family_of(parts).video_time != "seconds" or seconds is None or not videos:
        return []
    if len(seconds) == videos and all(0 < each < math.inf for each in seconds):
        return []
    return [
        f"second_per_grid_ts are {seconds} for {videos} videos: each needs its seconds from one temporal patch to the "
        "next (temporal_patch_size / fps), in the order of video_grid_thw; hand on what the processor returns"
    ]


def placeholder_runs(ids: torch.Tensor, placeholder: int) -> list[tuple[int, int, int]]:
    """Unbroken runs of placeholders: (row, first token, length), in reading order."""
    runs: list[tuple[int, int, int]] = []
    for row, token in (ids == placeholder).nonzero().tolist():
        if runs and runs[-1][0] == row and runs[-1][1] + runs[-1][2] == token:
            runs[-1] = (row, runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((row, token, 1))
    return runs


def value_problems(pixels: torch.Tensor, key: str = "pixel_values") -> list[str]:
    """What no processor's ``pixel_values`` can be: of another kind of number, not finite, or far too large.

    No value is above 16 (docs/limits.md#pixel-values). Integers and 8-bit floats have no room for what lies between.

    Args:
        pixels: ``(patches, values per patch)``.
        key: Its name in the batch.
    """
    import torch

    name = str(pixels.dtype).removeprefix("torch.")
    if pixels.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return [
            f"{key} are {name}: the processor makes float32 within about -2.2 to 2.2, of which a cast to {name} "
            "leaves next to nothing; cast to float16, bfloat16 or float32 only"
        ]
    # One pass over millions of values: a NaN is the least and the largest of them.
    largest = max(abs(float(each)) for each in pixels.detach().aminmax()) if pixels.numel() else 0.0
    if not math.isfinite(largest):
        wild = (~pixels.isfinite()).nonzero()
        return [
            f"{key} hold {len(wild):,} values that are NaN or infinite, the first in patch {int(wild[0][0])}, "
            "which no image makes: a collator divided by zero, or read memory that was never written"
        ]
    if largest > LARGEST_PIXEL:
        return [
            f"{key} reach {largest:.4g} where the processor makes about -2.2 to 2.2: rescaling (1/255) or "
            "normalisation is missing, or a collator undid it"
        ]
    return []


def _type_problems(parts: Parts, batch: Mapping[str, Any]) -> list[str]:
    """Token types that do not mark the placeholders: positions are made from them, not from the ids."""
    types = batch.get("mm_token_type_ids")
    ids, mask = batch["input_ids"], attended(batch)
    if types is None or types.shape != ids.shape or mask.shape != ids.shape:
        return []
    right = type_ids(ids, kinds_of(parts))
    wrong = ((types != right) & mask).nonzero().tolist()
    if not wrong:
        return []
    row, token = wrong[0]
    what = "a placeholder" if int(right[row, token]) else "no placeholder"
    return [
        f"row {row}, token {token} is {what} but its mm_token_type_ids is {int(types[row, token])}: the types are "
        f"wrong at {len(wrong)} tokens, so positions will be; were they padded on another side than input_ids?"
    ]


def _dtype_problems(batch: Mapping[str, Any]) -> list[str]:
    """Token ids of a dtype on which the model crashes, in words that name none: what processors return is int64."""
    import torch

    wide, either = (torch.int64,), (torch.int64, torch.int32)
    # Cross-entropy takes labels as int64 only.
    taken = {"input_ids": wide if _places_are_made(batch) else either, "labels": wide}
    given = {name: batch[name].dtype for name in taken if batch.get(name) is not None}
    others = [
        f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in given.items() if dtype not in taken[name]
    ]
    if not others:
        return []
    return [
        f"token ids have to be int64 (torch.long), and the batch has {' and '.join(others)}: let the collator make "
        "them so (torch.tensor(ids) of Python integers does; numpy arrays of int32 keep their dtype)"
    ]


def _places_are_made(batch: Mapping[str, Any]) -> bool:
    """Whether ``get_rope_index`` writes int64 positions, by a mask, into a tensor of the dtype of ``input_ids``.

    Torch refuses that of two dtypes. An embedding takes int32 as well, and so does all else that reads the ids.
    """
    asked = batch.get("mm_token_type_ids") is not None or is_before("transformers", "5.3")
    return (
        asked
        and any(batch.get(kind.grids) is not None for kind in kinds(0, 0))
        and batch.get("attention_mask") is not None
        and batch.get("position_ids") is None
    )


def _width_problems(parts: Parts, pixels: torch.Tensor, kind: Kind) -> list[str]:
    """Patches of another size than the vision tower takes: the total of patches may fit all the same."""
    vision = parts.config.vision_config
    channels, frames, side = int(vision.in_channels), int(vision.temporal_patch_size), int(vision.patch_size)
    width, wanted = pixels.shape[-1], channels * frames * side**2
    if width == wanted:
        return []
    cut = math.isqrt(width // (channels * frames))
    guess = f", which is {channels} x {frames} x {cut} x {cut}" if channels * frames * cut**2 == width else ""
    return [
        f"{kind.pixels} has {width} values per patch{guess}, where the vision tower takes {wanted} ({channels} "
        f"channels x {frames} frames x {side} x {side} pixels): patch_size or temporal_patch_size of the processor is "
        "another model's; load the processor from the model's own folder"
    ]


def _pixel_problems(pixels: torch.Tensor, grids: Sequence[Grid], merge_size: int, kind: Kind) -> list[str]:
    if pixels.ndim != 2:
        return [
            f"{kind.pixels} has shape {tuple(pixels.shape)} where the processor makes (patches, values per patch): "
            f"concatenate the {kind.noun}s of a batch along the first axis, do not stack them"
        ]
    if not grids:
        return [f"{kind.pixels} has {pixels.shape[0]} patches but there is no {kind.grids}"]
    problems = [
        f"{kind.noun} {number} of the batch: grid {show_grid(grid)} is no multiple of the merge size {merge_size}"
        for number, grid in enumerate(grids)
        if grid[1] % merge_size or grid[2] % merge_size
    ]
    promised = sum(t * h * w for t, h, w in grids)
    if promised != pixels.shape[0]:
        problems.append(f"{kind.pixels} has {pixels.shape[0]} patches, the grids of the batch promise {promised}")
    return problems


def _assign(
    runs: Sequence[tuple[int, int, int]], grids: Sequence[Grid], merge_size: int, noun: str, first: int
) -> tuple[list[Span], list[str]]:
    """Deal the images out to the runs in order; a run may hold several images that fit it exactly."""
    sizes = [visual_tokens(grid, merge_size) for grid in grids]
    placeholders = sum(length for _, _, length in runs)
    totals = f"the batch has {placeholders} placeholders for {sum(sizes)} visual tokens"
    found: list[Span] = []
    problems: list[str] = []
    image, visual = 0, first
    row_before, in_row = -1, 0
    for row, token, length in runs:
        in_row = in_row if row == row_before else 0
        row_before, start = row, token
        tokens = f"row {row}, {noun} {in_row}, tokens {start} to {start + length - 1}"
        if image == len(sizes):
            problems.append(f"{tokens}: {length} placeholders but no {noun} is left for them; {totals}")
            continue
        filled = fitting(sizes[image:], length)
        if not filled:
            problems.append(
                f"{tokens}: {length} placeholders, but grid {show_grid(grids[image])} of {noun} {image} of "
                f"the batch makes {sizes[image]} visual tokens; {totals}{why_other(length, grids[image], merge_size)}"
            )
        for size in sizes[image : image + filled]:
            found.append(Span(image, row, in_row, start, size, visual, noun))
            image, in_row, start, visual = image + 1, in_row + 1, start + size, visual + size
        if not filled:
            image, in_row, visual = image + 1, in_row + 1, visual + sizes[image]
    if image < len(sizes):
        left = f"{noun} {image}" if image == len(sizes) - 1 else f"{noun}s {image} to {len(sizes) - 1}"
        problems.append(f"{left} of the batch: pixels but no placeholders; {totals}")
    return found, problems


def why_other(length: int, grid: Grid, merge_size: int) -> str:
    """What would explain this number of placeholders for an image, as the end of a sentence."""
    times, rest = divmod(length, visual_tokens(grid, merge_size))
    again = f"{times} times as many: were they expanded more than once" if times > 1 and not rest else ""
    merged = next((m for m in range(1, max(grid)) if m != merge_size and visual_tokens(grid, m) == length), 0)
    other = f"did the processor count with merge_size {merged}, where the model's is {merge_size}" if merged else ""
    asked = ", or ".join(question for question in (again, other) if question)
    return f"; {asked}?" if asked else ""


def fitting(sizes: Sequence[int], length: int) -> int:
    """How many of the next images fill a run exactly; 0 if none do."""
    for count in range(1, len(sizes) + 1):
        if sum(sizes[:count]) >= length:
            return count if sum(sizes[:count]) == length else 0
    return 0
