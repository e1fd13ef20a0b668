"""What a Qwen-VL image processor makes of an image, written from the documented algorithm in NumPy and Pillow alone.

Sources: ``smart_resize`` of Qwen2-VL (arXiv:2409.12191, section 2.1, "naive dynamic resolution"); bicubic interpolation
with a = -0.5 (Keys 1981), its support widened by the scale when an image shrinks, as Pillow's ``Resample.c`` documents;
the layout of ``pixel_values`` from the model's documentation: patches in blocks of ``merge_size`` by ``merge_size``,
each channel, frame, row, column. It shares no code with Transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from PIL.Image import Image

KEYS = -0.5
# Two passes of 8 bits: the first may round a tie the other way, which the second multiplies by the sum of its
# weights' sizes (1.27 at most, docs/limits.md#bicubic-resizing) before it rounds once more.
STEPS_IN_8_BITS = 2
FLOAT32_UNIT = 2.0**-24


@dataclass(frozen=True)
class Recipe:
    """The numbers of the algorithm.

    Attributes:
        patch: Side of a patch in pixels.
        merge: Patches per visual token along each side.
        frames: Frames per patch; a still image is repeated.
        fewest: Smaller images are enlarged to this many pixels.
        most: Larger images are shrunk to this many.
        mean: Of each channel.
        deviation: Of each channel.
        rescale: Factor from 8 bits to the unit interval.
        resize: Whether images are resized at all.
    """

    patch: int
    merge: int
    frames: int
    fewest: int
    most: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    rescale: float = 1 / 255
    resize: bool = True

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing: multiples of a visual token's side, within the limits."""
        step = self.patch * self.merge
        if not self.resize:
            return height, width
        rows, columns = (round(side / step) * step for side in (height, width))
        if rows * columns > self.most:
            shrink = math.sqrt(height * width / self.most)
            rows, columns = (max(step, math.floor(side / shrink / step) * step) for side in (height, width))
        elif rows * columns < self.fewest:
            grow = math.sqrt(self.fewest / (height * width))
            rows, columns = (math.ceil(side * grow / step) * step for side in (height, width))
        return rows, columns

    def grid(self, height: int, width: int) -> tuple[int, int, int]:
        """``image_grid_thw``: frames, rows and columns in patches."""
        rows, columns = self.size(height, width)
        return 1, rows // self.patch, columns // self.patch

    def rounding(self) -> float:
        """Bound on what float32 loses: eight roundings of a value, and of the mean, over the smallest deviation."""
        return 8 * FLOAT32_UNIT * (255 * self.rescale + max(map(abs, self.mean))) / min(self.deviation)

    def step(self) -> np.ndarray[Any, Any]:
        """What one step of 8 bits is after normalising, per channel."""
        import numpy as np

        return self.rescale / np.asarray(self.deviation)

    def apart(
        self, values: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], places: Any, steps: float
    ) -> tuple[float, np.ndarray[Any, Any]]:
        """The largest difference in steps of 8 bits, and which values are further away than :meth:`rounding` and those.

        Args:
            values: Some of ``pixel_values``, in any shape.
            wanted: What they have to be, of that shape.
            places: The place of each within its patch; of a shape that broadcasts.
            steps: How many steps of 8 bits resizing may take off or add.
        """
        import numpy as np

        step = np.repeat(self.step(), self.frames * self.patch**2)[places]
        gap = np.abs(values - wanted)
        return float((gap / step).max()), ~(gap <= self.rounding() + steps * step * (1 + 1e-6))

    def normalised(self, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """``(rows, columns, 3)`` of 8-bit values, rescaled and normalised in float64."""
        import numpy as np

        scaled = pixels.astype(np.float64) * self.rescale
        result: np.ndarray[Any, Any] = (scaled - np.asarray(self.mean)) / np.asarray(self.deviation)
        return result

    def patches(self, image: np.ndarray[Any, Any], *, blocks: bool = True) -> np.ndarray[Any, Any]:
        """``pixel_values`` of a normalised image ``(rows, columns, 3)``: ``(patches, 3 * frames * patch * patch)``.

        Args:
            image: The image.
            blocks: Patches block by block, as they are merged; else row by row.
        """
        import numpy as np

        rows, columns = image.shape[0] // self.patch, image.shape[1] // self.patch
        cut = image.reshape(rows, self.patch, columns, self.patch, 3).transpose(0, 2, 4, 1, 3)
        if blocks:
            side = self.merge
            cut = cut.reshape(rows // side, side, columns // side, side, *cut.shape[2:]).transpose(0, 2, 1, 3, 4, 5, 6)
        flat = cut.reshape(rows * columns, 3, 1, self.patch, self.patch)
        result: np.ndarray[Any, Any] = np.repeat(flat, self.frames, axis=2).reshape(rows * columns, -1)
        return result

    def with_constants(self, mean: float, deviation: float) -> Recipe:
        """The same with one mean and deviation for all channels."""
        return replace(self, mean=(mean,) * 3, deviation=(deviation,) * 3)


def rgb(image: Image) -> tuple[np.ndarray[Any, Any], ...]:
    """``(height, width, 3)`` uint8; of an image with transparency in both ways that releases of Transformers know.

    Transformers 5.17 and before drop the alpha channel, 5.23 and later lay the image on white (``convert_to_rgb`` in
    ``image_transforms.py``).
    """
    import numpy as np
    from PIL import Image as Pillow

    plain = np.asarray(image.convert("RGB"))
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return (plain,)
    white = Pillow.new("RGBA", image.size, (255, 255, 255, 255))
    return plain, np.asarray(Pillow.alpha_composite(white, image.convert("RGBA")).convert("RGB"))


def keys(distance: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The cubic kernel with a = -0.5, which is zero from 2 on."""
    import numpy as np

    x = np.abs(distance)
    near = ((KEYS + 2) * x - (KEYS + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * KEYS
    result: np.ndarray[Any, Any] = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return result


def triangle(distance: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The kernel of bilinear interpolation."""
    import numpy as np

    result: np.ndarray[Any, Any] = np.maximum(0.0, 1 - np.abs(distance))
    return result


@dataclass(frozen=True)
class Filter:
    """How an image is resampled.

    Attributes:
        kernel: Weight by distance in pixels.
        support: Distance from which on it is zero.
        antialias: Whether the kernel is widened where an image shrinks.
        passes: ``"columns"``: within each row first, rounded and clipped to 8 bits, as torch and Pillow up to 12 do;
            ``"rows"``: the other way round, as Pillow 13 does where that is less work; ``"once"``: rounded at the end.
    """

    kernel: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]] = keys
    support: float = 2.0
    antialias: bool = True
    passes: Literal["columns", "rows", "once"] = "columns"


BICUBIC = Filter()


def resized(pixels: np.ndarray[Any, Any], size: tuple[int, int], how: Filter = BICUBIC) -> np.ndarray[Any, Any]:
    """An image ``(height, width, 3)`` uint8 in another size, rounded to whole steps (float64).

    Args:
        pixels: The image.
        size: Height and width.
        how: Kernel, and order of the two passes.
    """
    import numpy as np

    values = pixels.astype(np.float64)
    for axis in (0, 1) if how.passes == "rows" else (1, 0):
        if values.shape[axis] == size[axis]:
            continue
        values = _one_pass(values, axis, size[axis], how)
        if how.passes != "once":
            values = np.clip(np.floor(values + 0.5), 0, 255)
    return np.clip(np.floor(values + 0.5), 0, 255)


def _one_pass(values: np.ndarray[Any, Any], axis: int, side: int, how: Filter) -> np.ndarray[Any, Any]:
    import numpy as np

    length = values.shape[axis]
    scale = length / side
    stretch = max(scale, 1.0) if how.antialias else 1.0
    centre = (np.arange(side) + 0.5) * scale
    first = np.maximum(0, (centre - how.support * stretch + 0.5).astype(np.int64))
    last = np.minimum(length, (centre + how.support * stretch + 0.5).astype(np.int64))
    places = first[:, None] + np.arange(int((last - first).max()))
    weights = how.kernel((places - centre[:, None] + 0.5) / stretch) * (places < last[:, None])
    weights /= weights.sum(axis=1, keepdims=True)
    places = np.minimum(places, length - 1)
    shape = [1] * values.ndim
    shape[axis] = side
    result = np.zeros([side if a == axis else n for a, n in enumerate(values.shape)])
    for tap in range(places.shape[1]):
        result += np.take(values, places[:, tap], axis=axis) * weights[:, tap].reshape(shape)
    return result
