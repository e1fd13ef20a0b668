"""How a checkpoint's video processor cuts frames, and the text between them. Standard library only.

Source: ``video_processing_qwen2_vl.py``, ``video_processing_qwen3_vl.py`` and ``processing_qwen3_vl.py`` of
Transformers 5.17 and 5.24.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_qvl.models.families import FAMILIES
from pytest_qvl.models.sources.released import MAX_ASPECT_RATIO
from pytest_qvl.vram.forecast.processor_settings import first_settings, pixel_limits

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_qvl.models.sources.released import ImageSizes

# ``size`` in the ``video_preprocessor_config.json`` of every released Qwen3-VL: pixels of all frames together.
_LEAST, _MOST = 4096, 25165824
# ``max_video_tokens`` of the two processors: of a frame, and of a whole video.
_FRAME_TOKENS, _VIDEO_TOKENS = 768, 128000
# In this order Transformers looks for a video processor's settings: a file, and their name in it.
_FILES = (
    ("processor_config.json", "video_processor"),
    ("video_preprocessor_config.json", None),
    ("preprocessor_config.json", None),
)
_FRAMES_PER_SECOND = 2  # that are sampled where nobody says otherwise: ``fps`` of the released checkpoints
_TIME = 4  # tokens of "<1.2 seconds>" beside its digits, each of which is one: "<", ".", " seconds" and ">"


@dataclass(frozen=True)
class VideoSizes:
    """How a checkpoint's video processor turns sampled frames into patches.

    Attributes:
        frame: Of an image, whose patches a frame's are.
        least: The fewest pixels of a frame, or where times stand in words (Qwen3-VL) of all frames together.
        most: The most.
        capped: Whether each frame's pixels are capped by the number of frames (``cap_pixels_per_frame``).
        words: Whether each step in time stands behind its time in words, between markers of its own.
    """

    frame: ImageSizes
    least: int
    most: int
    capped: bool
    words: bool

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The patch grid (time, rows, columns) of a video; its last frame is repeated to fill a step in time.

        Raises:
            ValueError: A size that the processor refuses.
        """
        time = -(-frames // self.frame.temporal_patch_size)
        if not self.words:
            return time, *replace(self.frame, min_pixels=self.least, max_pixels=self._frame_most(frames)).grid(
                height, width
            )[1:]
        return time, *self._rows_and_columns(frames, height, width)

    def times(self, steps: int) -> list[int]:
        """Tokens that each step in time has beside its visual ones: its time, and two markers; empty for none.

        The time is ``<1.2 seconds>`` of frames sampled twice a second.
        """
        if not self.words:
            return []
        seconds = (step * self.frame.temporal_patch_size // _FRAMES_PER_SECOND for step in range(steps))
        return [_TIME + len(str(second)) + 1 + 2 for second in seconds]

    def _rows_and_columns(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """Of each frame, where the limits are on all of them (``smart_resize`` of Qwen3-VL)."""
        sizes = self.frame
        step, in_time = sizes.patch_size * sizes.merge_size, sizes.temporal_patch_size
        if frames < in_time:
            raise ValueError(f"video {frames}x{height}x{width}: the processor refuses fewer than {in_time} frames")
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise ValueError(
                f"video {frames}x{height}x{width}: the processor refuses sides that differ by more than 200 times"
            )
        if height < step or width < step:
            scale = max(step / height, step / width)
            height, width = int(height * scale), int(width * scale)
        rows, columns = (round(side / step) * step for side in (height, width))
        most = self._frame_most(frames) * frames if self.capped else self.most
        pixels = round(frames / in_time) * in_time * rows * columns
        if pixels > most:
            shrink = math.sqrt(frames * height * width / most)
            rows, columns = (max(step, math.floor(side / shrink / step) * step) for side in (height, width))
        elif pixels < self.least:
            grow = math.sqrt(self.least / (frames * height * width))
            rows, columns = (math.ceil(side * grow / step) * step for side in (height, width))
        return rows // sizes.patch_size, columns // sizes.patch_size

    def _frame_most(self, frames: int) -> int:
        """The most pixels of one frame."""
        if not self.capped:
            return self.most
        of_token = (self.frame.patch_size * self.frame.merge_size) ** 2
        least = int(self.least * 1.05)
        if self.words:
            return max(min(_FRAME_TOKENS * of_token, self.most // frames), least)
        share = int(_VIDEO_TOKENS * of_token * 0.9) * self.frame.temporal_patch_size // frames
        return max(min(self.most, share), least)


def video_sizes(model_type: str, images: ImageSizes, folder: Path | None = None) -> VideoSizes:
    """What a checkpoint's video processor does.

    Args:
        model_type: Its family.
        images: What its image processor does, whose settings a video processor without its own has.
        folder: Of the checkpoint; ``None`` for a released one.
    """
    words = FAMILIES[model_type].video_time == "words"
    least, most = (_LEAST, _MOST) if words else (images.min_pixels, images.max_pixels)
    found = None if folder is None else first_settings(folder, _FILES)
    if found is None:
        return VideoSizes(images, least, most, capped=False, words=words)
    file, settings = found
    limits = pixel_limits(file, settings, (least, most))
    return VideoSizes(images, *limits, capped=bool(settings.get("cap_pixels_per_frame")), words=words)
