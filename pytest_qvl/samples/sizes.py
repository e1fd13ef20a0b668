"""How large probe images are, derived from the model under test: its vision configuration and image processor.

Qwen2.5-VL's vision blocks attend within windows (112 px in every released checkpoint), except a few with full
attention. An image that fits into one window cannot tell the two kinds apart, so a size that is fine for one model
proves nothing on another. All sizes here are whole visual tokens, which no image processor has to round, and lie
between its pixel limits, where it resizes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pytest_qvl.samples.scenes import GRIDS

READABLE = 448
LARGE_TOKENS = 1024
FEWEST_CELLS = min(min(grid) for grid in GRIDS)
MOST_CELLS = max(max(grid) for grid in GRIDS)


@dataclass(frozen=True)
class ProbeSizes:
    """Sizes of the images that probe one model: large enough to be read and to show its attention windows.

    A scene has 3 or 4 cells per side, so a cell decides the size of an image. What is said of windows and pixels
    holds for every grid of cells, unless the processor's pixel limits leave no room for it.

    Attributes:
        token: Pixels per side of what becomes one visual token.
        window: Visual tokens per side of an attention window; None where every block sees the whole image.
        cell: Pixels per side of a cell in the images whose answers are judged.
        row_cell: The same in batches of many rows, which judge structure: more than one window per side, the fewest
            visual tokens that give it.
        training_cell: The same in training batches: one visual token per cell, for memory.
        large_cell: The same in the largest image: 1,024 visual tokens or more.
        one_size: The model reads scenes of `cell` px per cell only, so no larger one can be among its probes; its
            largest image has three times as many pixels per side.
    """

    token: int
    window: int | None
    cell: int
    row_cell: int
    training_cell: int
    large_cell: int
    one_size: bool = False

    @property
    def clip_cell(self) -> int:
        """Pixels per side of a cell in videos, three tokens or more, so that a frame is wider than its clip is long.

        See :func:`pytest_qvl.samples.scene_clips`.
        """
        return max(self.row_cell, 3 * self.token)


def attention_window(vision_config: Any) -> int | None:
    """Visual tokens per side of an attention window; None where every vision block sees the whole image.

    Args:
        vision_config: ``config.vision_config`` of a Qwen-VL model.
    """
    pixels = getattr(vision_config, "window_size", None)
    full = set(getattr(vision_config, "fullatt_block_indexes", None) or ())
    if not pixels or full >= set(range(vision_config.depth)):
        return None
    return int(pixels // (vision_config.patch_size * vision_config.spatial_merge_size))


def pixel_limits(image_processor: Any) -> tuple[int, int]:
    """Smallest and largest area in pixels that a Qwen-VL image processor leaves as it is.

    Releases differ in where they keep them: Transformers 4 in attributes of their own, which count before ``size`` (a
    ``max_pixels`` given at load leaves that as it was), 5 in ``size`` (``shortest_edge``, ``longest_edge``) alone.
    """
    size = image_processor.size
    found = []
    for edge, name in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        area = getattr(image_processor, name, None)
        found.append(int(area or (size.get(edge) if hasattr(size, "get") else getattr(size, edge))))
    return found[0], found[1]


def probe_sizes(
    vision_config: Any, *, min_pixels: int, max_pixels: int, readable: bool, trained_cell: int | None = None
) -> ProbeSizes:
    """Sizes of the probe images for one model.

    Args:
        vision_config: ``config.vision_config`` of the model under test.
        min_pixels: The processor enlarges images of a smaller area.
        max_pixels: The processor shrinks images of a larger area.
        readable: The model has knowledge, so that it has to read the scenes: 448 px per side at least. Without,
            several windows are enough.
        trained_cell: Pixels per side of a cell in the only scenes that the model can read, as the embedded model's
            configuration states them (``qvl_scene_cell``): all of its scenes are drawn so.
    """
    token = int(vision_config.patch_size * vision_config.spatial_merge_size)
    window = attention_window(vision_config)
    least = math.ceil(math.sqrt(min_pixels) / (FEWEST_CELLS * token))
    most = max(1, math.isqrt(max_pixels) // (MOST_CELLS * token))

    def cell(tokens: int) -> int:
        return token * min(max(tokens, least), most)

    several_windows = 2 if window is None else window // FEWEST_CELLS + 1
    sharp = math.ceil(READABLE / (FEWEST_CELLS * token)) if readable else 0
    rows = cell(several_windows)
    large = cell(max(math.ceil(math.sqrt(LARGE_TOKENS) / FEWEST_CELLS), several_windows))
    if trained_cell is not None:
        return ProbeSizes(token, window, trained_cell, trained_cell, trained_cell, 3 * trained_cell, one_size=True)
    return ProbeSizes(token, window, max(rows, cell(sharp)), rows, cell(1), large)


def window_count(grid: tuple[int, int, int], merge_size: int, window: int) -> tuple[int, int]:
    """Attention windows along height and width of an image, the partial ones at its edges included.

    Args:
        grid: Frames, rows and columns in patches.
        merge_size: Patches per visual token along each side.
        window: Visual tokens per side of a window.
    """
    return math.ceil(grid[1] / merge_size / window), math.ceil(grid[2] / merge_size / window)
