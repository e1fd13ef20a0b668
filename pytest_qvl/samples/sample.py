"""One probe: images, a question, and the answer that is known to be right."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_qvl.evidence import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from pytest_qvl.samples.drawing import Scene

MID_GREY = (128, 128, 128)


@dataclass(frozen=True)
class Sample:
    """Images, a question and its right answer.

    Attributes:
        images: Images in the order of the prompt (RGB); empty for a text-only probe.
        question: What the user asks about them.
        answer: The right answer, word for word.
        skill: What it takes to answer, for grouping (one of :data:`pytest_qvl.samples.ALL_SKILLS` for
            rendered scenes).
        id: Unique within one call of the function that made the sample.
        swapped: Images of the same number and sizes for which the same question has a different right
            answer, by construction; None where there are none.
        swapped_answer: The right answer for :attr:`swapped`.
        scenes: What :attr:`images` were drawn from; empty where they were not drawn.
        swapped_scenes: What :attr:`swapped` were drawn from.
    """

    images: tuple[Image, ...]
    question: str
    answer: str
    skill: str
    id: str
    swapped: tuple[Image, ...] | None = None
    swapped_answer: str | None = None
    scenes: tuple[Scene, ...] = ()
    swapped_scenes: tuple[Scene, ...] = ()

    def __hash__(self) -> int:
        return hash(self.id)

    def at_cell(self, cell: int) -> Sample:
        """The same scenes drawn with `cell` px per side of a cell; the sample itself where nothing was drawn."""
        if not self.scenes:
            return self
        swapped = tuple(scene.render(cell) for scene in self.swapped_scenes)
        return replace(self, images=tuple(scene.render(cell) for scene in self.scenes), swapped=swapped or None)

    def blank(self) -> Sample:
        """The same question and answer over uniform mid-grey images of the same sizes."""
        from PIL import Image

        return self._over(tuple(Image.new("RGB", image.size, MID_GREY) for image in self.images), "blank")

    def noise(self, seed: int) -> Sample:
        """The same question and answer over uniform noise; deterministic in `seed` and :attr:`id`."""
        from PIL import Image

        rng = random.Random(zlib.crc32(self.id.encode()) ^ seed)
        images = tuple(
            Image.frombytes("RGB", image.size, rng.randbytes(3 * image.width * image.height)) for image in self.images
        )
        return self._over(images, f"noise-{seed}")

    def with_swapped(self) -> Sample:
        """The same question and *answer* over :attr:`swapped`, for which that answer is wrong.

        Like the other ablations it keeps the original answer, so that one can measure how much of its
        probability came from the images. :attr:`swapped_answer` of the original sample is what a model
        should say now.

        Raises:
            ValueError: The sample has no swapped images.
        """
        if self.swapped is None:
            raise InputError(f"sample {self.id!r} ({self.skill}) has no swapped images")
        return self._over(self.swapped, "swapped")

    def _over(self, images: tuple[Image, ...], ablation: str) -> Sample:
        return replace(
            self,
            images=images,
            id=f"{self.id}/{ablation}",
            swapped=None,
            swapped_answer=None,
            scenes=(),
            swapped_scenes=(),
        )
