"""A few real photographs with questions that a released Qwen-VL answers at sight.

The photographs are those that scikit-image carries inside its wheel; nothing is downloaded. The embedded
model knows rendered shapes only: these are for released checkpoints.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qvl.releases import install_extra
from pytest_qvl.samples.sample import Sample
from pytest_qvl.samples.sizes import MOST_CELLS

if TYPE_CHECKING:
    from PIL.Image import Image

    from pytest_qvl.samples.sizes import ProbeSizes

SIDE = 448

# Photograph: file and box (left, top, right, bottom) in px that is cut out and scaled to a square; the boxes are
# square and what is asked about fills them.
PHOTOS = {
    "cat": ("chelsea.png", (76, 0, 376, 300)),
    "cup": ("coffee.png", (100, 0, 500, 400)),
    "astronaut": ("astronaut.png", (0, 0, 512, 512)),
    "rocket": ("rocket.jpg", (106, 0, 533, 427)),
}
# Photograph, question, answer, and the photograph that turns a yes into a no or back.
QUESTIONS = (
    ("cat", "Is there a cat in this picture? Answer yes or no.", "Yes", "rocket"),
    ("rocket", "Is there a cat in this picture? Answer yes or no.", "No", "cat"),
    ("cup", "Is there a cup in this picture? Answer yes or no.", "Yes", "astronaut"),
    ("astronaut", "Is there a person in this picture? Answer yes or no.", "Yes", "cup"),
)
OPPOSITE = {"Yes": "No", "No": "Yes"}


def has_photos() -> bool:
    """Whether the ``photos`` extra is installed."""
    return find_spec("skimage") is not None


def photo_samples(sizes: ProbeSizes | None = None) -> list[Sample]:
    """Real photographs (RGB, square) with known answers and swaps, skill ``photo``.

    Args:
        sizes: Of the model: photographs are as wide as a scene of four cells. 448 px without.

    Raises:
        RuntimeError: scikit-image is not installed (the ``photos`` extra), or its wheel no longer has a
            photograph.
    """
    photos = _photos(SIDE if sizes is None else MOST_CELLS * sizes.cell)
    return [
        Sample(
            images=(photos[name],),
            question=question,
            answer=answer,
            skill="photo",
            id=f"photo-{name}",
            swapped=(photos[swap],),
            swapped_answer=OPPOSITE[answer],
        )
        for name, question, answer, swap in QUESTIONS
    ]


def _photos(side: int) -> dict[str, Image]:
    from PIL import Image

    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise RuntimeError(f"photo_samples needs the photographs of scikit-image: {install_extra('photos')}")
    folder = Path(spec.origin).parent / "data"
    photos = {}
    for name, (file, box) in PHOTOS.items():
        path = folder / file
        if not path.is_file():
            again = f"{install_extra('photos')} --force-reinstall"
            raise RuntimeError(f"scikit-image at {folder} has no {file}; reinstall it: {again}")
        with Image.open(path) as image:
            photos[name] = image.convert("RGB").crop(box).resize((side, side))
    return photos
