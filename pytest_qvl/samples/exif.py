"""Images as a file stores them where EXIF says how to turn them.

A camera stores an image as its sensor lay, and in EXIF tag 0x0112 (CIPA DC-008, "Orientation") how it is to be shown.
``PIL.Image.open`` does not turn it; ``PIL.ImageOps.exif_transpose`` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

TAG = 0x0112
# From the image as it is shown to the image as it is stored: the inverse of what ``exif_transpose`` does.
_STORED = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_90",
    7: "TRANSVERSE",
    8: "ROTATE_270",
}
ORIENTATIONS = tuple(_STORED)


def as_stored(image: Image, orientation: int) -> Image:
    """The pixels that a file stores of an image which it shows with this orientation.

    Args:
        image: As it is shown.
        orientation: 2 to 8; 1 would change nothing.
    """
    from PIL import Image

    return image.transpose(Image.Transpose[_STORED[orientation]])
