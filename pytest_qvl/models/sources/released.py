"""Configurations of released Qwen-VL checkpoints, built in: true sizes without a download.

The facts live in ``released.json`` beside this module, each ``config`` in the layout of the checkpoint's own
``config.json``, which every supported Transformers reads. Sources: the checkpoints' public configuration
files; parameter totals were confirmed by building each class on the meta device and agree with published
trainable counts.
"""

from __future__ import annotations

import json
import math
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pytest_qvl.models.families import FAMILIES, Family

# The processor refuses images more oblong than this (``smart_resize`` in Transformers).
MAX_ASPECT_RATIO = 200


@dataclass(frozen=True)
class ImageSizes:
    """How a checkpoint's image processor turns an image's size into patches and visual tokens.

    Attributes:
        patch_size: Side of a patch in pixels.
        merge_size: Patches per visual token along each side.
        temporal_patch_size: Frames per patch (a still image is repeated to fill them).
        min_pixels: Smaller images are enlarged to at least this many pixels.
        max_pixels: Larger images are shrunk to at most this many pixels.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int

    def grid(self, height: int, width: int) -> tuple[int, int, int]:
        """The patch grid (time, rows, columns) of an image of ``height`` × ``width`` pixels.

        Both sides become multiples of ``patch_size * merge_size``, the area is brought between the limits,
        and the aspect ratio is kept as well as that allows.

        Raises:
            ValueError: A side below one pixel, or sides that differ by more than a factor of 200.
        """
        if height < 1 or width < 1:
            raise ValueError(f"image {height}x{width} has no pixels: both sides must be at least 1")
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise ValueError(f"image {height}x{width}: the processor refuses sides that differ by more than 200 times")
        step = self.patch_size * self.merge_size
        rows, columns = (round(side / step) * step for side in (height, width))
        if rows * columns > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows, columns = (max(step, math.floor(side / shrink / step) * step) for side in (height, width))
        elif rows * columns < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows, columns = (math.ceil(side * grow / step) * step for side in (height, width))
        return 1, rows // self.patch_size, columns // self.patch_size

    def visual_tokens(self, height: int, width: int) -> int:
        """Visual tokens of one image, as :meth:`grid` cuts it."""
        time, rows, columns = self.grid(height, width)
        return time * rows * columns // self.merge_size**2


@cache
def _models() -> dict[str, Any]:
    text = (Path(__file__).parent / "released.json").read_text(encoding="utf-8")
    models: dict[str, Any] = json.loads(text)["models"]
    return models


def _model(name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = _models()[name]
    except KeyError:
        raise ValueError(
            f"no released configuration is called {name!r}; known: {', '.join(released_names())}"
        ) from None
    return found


def released_names() -> tuple[str, ...]:
    """Names of all built-in configurations, such as ``"qwen2.5-vl-7b"``, in alphabetical order.

    Those of families that the installed Transformers does not have yet are left out.
    """
    return tuple(sorted(name for name, model in _models().items() if _family(model).installed))


def _family(model: dict[str, Any]) -> Family:
    return FAMILIES[model["config"]["model_type"]]


def released_config(name: str) -> Any:
    """A fresh Transformers configuration with the values of the released checkpoint.

    A ``Qwen2VLConfig``, ``Qwen2_5_VLConfig``, ``Qwen3VLConfig`` or ``Qwen3_5Config``.

    Raises:
        ValueError: No such name, or one that the installed Transformers has no class for; the message lists the known
            ones.
    """
    import transformers

    fields = deepcopy(_model(name)["config"])
    family = _family(_model(name))
    if not family.installed:
        raise ValueError(
            f"{name!r} needs Transformers {family.since} or newer for {family.label}; known to this one: "
            f"{', '.join(released_names())}"
        )
    return getattr(transformers, family.config_class).from_dict(fields)


def expectations(name: str) -> dict[str, int]:
    """Totals that a model built from the configuration must have: ``total_params`` and others.

    Raises:
        ValueError: No such name; the message lists the known ones.
    """
    return dict(_model(name)["expect"])


def image_sizes(name: str) -> ImageSizes:
    """What the released checkpoint's processor does with image sizes.

    Raises:
        ValueError: No such name; the message lists the known ones.
    """
    return ImageSizes(**_model(name)["processor"])


def hub_id(name: str) -> str:
    """Where the checkpoint was released.

    Raises:
        ValueError: No such name; the message lists the known ones.
    """
    return str(_model(name)["hub_id"])
