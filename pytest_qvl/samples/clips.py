"""Batches of videos: drawn frames, in the layout in which a family's processor writes them.

The video processors of Transformers need torchvision. These batches do not, and are the same with it and without: the
image processor resizes, normalises and cuts each frame, and frames that follow one another are joined into the patches
that a video processor makes (``temporal_patch_size`` frames each, where an image is repeated to fill a patch). What a
video processor makes of your own data is for :func:`pytest_qvl.checks.batch` to judge.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from pytest_qvl.evidence import InputError
from pytest_qvl.samples.batch import prompt_of, reserved_token, turn
from pytest_qvl.samples.drawing import COLOURS, Scene, random_background, random_thing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from PIL.Image import Image

    from pytest_qvl.samples.batch import PaddingSide

# What positions count along a video, as :class:`pytest_qvl.models.families.Family` says it.
VideoTime = Literal["patches", "seconds", "words"]
# Temporal patches of the two clips of :func:`scene_clips`; the second stands behind an image.
_STEPS = (3, 2)
_IMAGE, _VIDEO = "<|image_pad|>", "<|video_pad|>"
_START, _END = "<|vision_start|>", "<|vision_end|>"


@dataclass(frozen=True)
class Clip:
    """A video, still images that stand before it, and a question.

    Attributes:
        images: In the order of the prompt; may be empty.
        frames: In the order of time, all of one size; empty for none. The last one is repeated to fill a patch.
        question: What the user asks.
        answer: The right answer, word for word.
        seconds: From one temporal patch to the next.
    """

    images: tuple[Image, ...]
    frames: tuple[Image, ...]
    question: str
    answer: str
    seconds: float = 1.0

    def noise(self, seed: int) -> Clip:
        """The same over uniform noise of the same sizes; deterministic in `seed`, and no two frames are alike."""
        from PIL import Image

        rng = random.Random(f"clip {seed} {self.question} {len(self.frames)}")

        def over(images: tuple[Image.Image, ...]) -> tuple[Image.Image, ...]:
            sizes = [each.size for each in images]
            return tuple(Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])) for size in sizes)

        return replace(self, images=over(self.images), frames=over(self.frames))


def scene_clips(seed: int, *, cell: int, frames: int = 2) -> list[Clip]:
    """Two clips with known answers and a row of text: one shape a scene, of another colour in each.

    Seconds between temporal patches are whole ones, and no clip lasts longer than its frames are wide in position ids:
    releases differ in what they make of others (docs/upstream/video-positions.md).

    Args:
        seed: Which scenes.
        cell: Pixels per side of a cell; frames have 4 x 3 cells and 3 x 4.
        frames: For which each scene is shown: those of a temporal patch; at least 1.

    Raises:
        ValueError: `frames` below 1.
    """
    if frames < 1:
        raise InputError(f"scene_clips: frames must be at least 1, got {frames}")
    rng = random.Random(f"clips {seed}")
    made: list[Clip] = []
    for steps, (columns, rows) in zip(_STEPS, ((4, 3), (3, 4)), strict=True):
        colours = rng.sample(list(COLOURS), steps)
        drawn = []
        for colour in colours:
            thing = random_thing(rng, (rng.randrange(columns), rng.randrange(rows)), colour=colour)
            drawn.append(Scene(columns, rows, random_background(rng), (thing,)).render(cell))
        shown = tuple(image for image in drawn for _ in range(frames))
        number = rng.randrange(steps)
        question = f"What colour is the {('first', 'second', 'third')[number]} shape in the video?"
        made.append(Clip((), shown, question, colours[number], seconds=float(len(made) + 1)))
    first, second = made
    return [first, replace(second, images=first.frames[:1]), Clip((), (), "Say red.", "red")]


def clip_batch(
    processor: Any,
    clips: Sequence[Clip],
    *,
    time: VideoTime,
    padding_side: PaddingSide = "left",
    device: str | torch.device = "cpu",
) -> dict[str, torch.Tensor]:
    """Model inputs for clips, one a row.

    Args:
        processor: A Qwen-VL processor.
        clips: At least one.
        time: How the model's family writes it: nowhere in the text (``"patches"``), in ``second_per_grid_ts``
            (``"seconds"``, Qwen2.5-VL), or before each temporal patch, which stands apart (``"words"``, Qwen3-VL on).
        padding_side: Left for generation, right or left for a forward pass.
        device: Where the tensors go.

    Returns:
        ``input_ids`` and ``attention_mask`` (clips, length) int64; ``pixel_values_videos`` (patches, values per patch)
        float32 and ``video_grid_thw`` (videos, 3) int64; the same of images where there are any; by `time`
        ``second_per_grid_ts`` (videos,) float32; where the processor makes it ``mm_token_type_ids`` (clips, length).

    Raises:
        ValueError: No clips, another `time`, frames of several sizes, seconds that are not above 0, or a question that
            holds a special token of the chat template.
    """
    import torch

    if not clips:
        raise InputError("clip_batch needs at least one clip")
    if time not in get_args(VideoTime):
        raise InputError(f"clip_batch: time is {time!r}, expected one of {', '.join(map(repr, get_args(VideoTime)))}")
    for clip in clips:
        if token := reserved_token(clip.question):
            raise InputError(f"the question {clip.question!r} holds {token}; the chat template writes that token")
        if not 0 < clip.seconds < math.inf:
            raise InputError(f"the clip {clip.question!r} has {clip.seconds} seconds from one patch to the next")
    frames = int(processor.image_processor.temporal_patch_size)
    images = [_patches(processor, [image], 1) for clip in clips for image in clip.images]
    videos = [_patches(processor, clip.frames, frames) for clip in clips if clip.frames]
    left = iter(images), iter(videos)
    made = processor.tokenizer(
        [_written(processor, time, clip, left) for clip in clips],
        padding=True,
        padding_side=padding_side,
        return_tensors="pt",
    )
    batch = {name: made[name] for name in ("input_ids", "attention_mask")}
    for pixels, grids, found in (
        ("pixel_values", "image_grid_thw", images),
        ("pixel_values_videos", "video_grid_thw", videos),
    ):
        if found:
            batch[pixels] = torch.cat([each.values for each in found])
            batch[grids] = torch.tensor([each.grid for each in found])
    if videos and time == "seconds":
        batch["second_per_grid_ts"] = torch.tensor([clip.seconds for clip in clips if clip.frames])
    if "mm_token_type_ids" in processor(text=["text"], return_tensors="pt"):
        image, video = (processor.tokenizer.convert_tokens_to_ids(token) for token in (_IMAGE, _VIDEO))
        ids = batch["input_ids"]
        batch["mm_token_type_ids"] = (ids == image).long() + 2 * (ids == video).long()
    return {name: tensor.to(device) for name, tensor in batch.items()}


@dataclass(frozen=True)
class _Patches:
    """Patches ``(number, values)`` of an image or video, and their grid."""

    values: torch.Tensor
    grid: tuple[int, int, int]


def _patches(processor: Any, frames: Sequence[Image], joined: int) -> _Patches:
    """The patches of frames, of which `joined` that follow one another share each."""
    import torch

    if len({frame.size for frame in frames}) != 1:
        sizes = ", ".join(sorted({f"{frame.width}x{frame.height}" for frame in frames}))
        raise InputError(f"the frames of a video must be of one size, got {sizes}")
    made = processor.image_processor(images=list(frames), return_tensors="pt")
    rows, columns = made["image_grid_thw"][0, 1:].tolist()
    depth, side = int(processor.image_processor.temporal_patch_size), int(processor.image_processor.patch_size)
    single = made["pixel_values"].view(len(frames), rows * columns, -1, depth, side * side)
    filled = [*range(len(frames)), *[len(frames) - 1] * (-len(frames) % joined)]
    if joined == 1:
        joint = single
    else:
        # An image fills all frames of its patch; of these, each takes the one that is its own.
        own = [single[filled[place::joined], :, :, place] for place in range(joined)]
        joint = torch.stack(own, dim=3)
    return _Patches(joint.reshape(-1, made["pixel_values"].shape[1]), (len(joint), rows, columns))


def _written(processor: Any, time: VideoTime, clip: Clip, left: tuple[Iterator[_Patches], Iterator[_Patches]]) -> str:
    """The prompt of a clip with its placeholders expanded, as a processor writes it."""
    images, videos = left
    merged = int(processor.image_processor.merge_size) ** 2
    text = prompt_of(processor, turn(["image"] * len(clip.images) + ["video"] * bool(clip.frames), clip.question))
    for _ in clip.images:
        text = text.replace(_IMAGE, "\0" * (len(next(images).values) // merged), 1)
    text = text.replace("\0", _IMAGE)
    if not clip.frames:
        return text
    steps, rows, columns = next(videos).grid
    places = rows * columns // merged
    if time != "words":
        return text.replace(_VIDEO, _VIDEO * (steps * places))
    frames = int(processor.image_processor.temporal_patch_size)
    middle = clip.seconds * (frames - 1) / frames / 2
    apart = (f"<{step * clip.seconds + middle:.1f} seconds>{_START}{_VIDEO * places}{_END}" for step in range(steps))
    return text.replace(f"{_START}{_VIDEO}{_END}", "".join(apart))
