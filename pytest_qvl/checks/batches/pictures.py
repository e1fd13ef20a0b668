"""The images of a batch against those of its samples: which image is in which place, and in which colours."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.batches.dummies import dummies as dummies_of
from pytest_qvl.checks.batches.pixels import TWICE, dark

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    import torch
    from PIL.Image import Image

    from pytest_qvl.checks.batches.facts import View
    from pytest_qvl.checks.batches.findings import Findings
    from pytest_qvl.checks.batches.layout import Layout
    from pytest_qvl.checks.batches.paired import Pair

    Array = np.ndarray[Any, Any]

# Pixels that were rescaled twice are at most 1 + OVERSHOOT = 1.45 of 255; bfloat16 adds 0.28 (docs/limits.md#batches).
DARK = 2


def judge_images(view: View, findings: Findings, layout: Layout, pairs: Sequence[Pair]) -> None:
    """Every row has the images of its own sample, in their order.

    Images are compared as thumbnails of one pixel per patch, so that a collator may resize as it likes. Where two
    images are the same, either may stand there.
    """
    if not layout.sound:
        findings.unjudged["images against samples"] = "placeholders and grids do not fit each other"
        return
    owners, dummies = _owners(layout, pairs), dummies_of(view, layout).numbers
    shown = [owner for number, owner in enumerate(owners) if number not in dummies]
    if not _counted(findings, shown, pairs) or findings.has("row-of-another-sample"):
        return
    originals = {(each.number, number): image for each in pairs for number, image in enumerate(each.sample.images)}
    if None in originals.values():
        findings.notes.append("images that samples give as addresses were counted and not compared")
    pixels = view.batch.get(layout.kind.pixels)
    if pixels is None or any(each.kind.startswith(("pixels-", "patch-")) for each in findings.found):
        return
    seen: Counter[int] = Counter()
    for image_number, (found, owner) in enumerate(zip(_thumbnails(view, layout, pixels), owners, strict=True)):
        if image_number in dummies:
            continue
        name = (pairs[owner].number, seen[owner])
        seen[owner] += 1
        candidates = {key: _thumbnail(image, found) for key, image in originals.items() if image is not None}
        own = candidates.pop(name, None)
        if own is not None:
            findings.judged["images compared with samples"] += 1
            original = originals[name]
            assert original is not None
            place = _Place(pairs[owner].unit.row, *name, original.size, view.known.merge)
            _say(findings, place, found, own, candidates)
            findings.unjudged.pop(dark(layout), None)


@dataclass(frozen=True)
class _Place:
    """The place of an image.

    Attributes:
        row: Of the batch.
        sample: Of which sample.
        number: Its number in the sample.
        size: Width and height of the sample's image in pixels.
        merge: Patches per visual token along each side.
    """

    row: int
    sample: int
    number: int
    size: tuple[int, int]
    merge: int

    def is_turned(self, found: Array) -> bool:
        """Whether an image that is higher than wide has a grid that is wider than high, or the other way round."""
        return bool((self.size[1] - self.size[0]) * (found.shape[0] - found.shape[1]) < 0)


def _owners(layout: Layout, pairs: Sequence[Pair]) -> list[int]:
    """The pair that each image stands in; -1 for none."""
    return [
        next(
            (n for n, each in enumerate(pairs) if each.unit.row == row and each.unit.first <= token < each.unit.stop),
            -1,
        )
        for row, token in zip(layout.rows, layout.tokens, strict=True)
    ]


def _counted(findings: Findings, owners: Sequence[int], pairs: Sequence[Pair]) -> bool:
    """Whether every unit has as many images as its sample, and each image a unit."""
    counts, wanted = Counter(owners), [len(each.sample.images) for each in pairs]
    wrong = [number for number, count in enumerate(wanted) if counts[number] != count]
    moved = sum(wanted) == len(owners)
    for number in wrong:
        fewer = counts[number] < wanted[number]
        kind, cause = "images-repeated", "the collator added images of another row, or one of them twice"
        if moved:
            kind, cause = "images-exchanged", "texts and images were collected in different orders"
        elif fewer:
            kind = "images-missing"
            cause = "the collator takes one image of each sample, or lost one that it could not read"
        findings.add(
            kind,
            pairs[number].unit.row,
            None,
            found=f"{counts[number]} images",
            expected=f"{wanted[number]}, as its sample has",
            cause=cause,
        )
    return not wrong and -1 not in owners


def _say(findings: Findings, place: _Place, found: Array, own: Array, others: dict[tuple[int, int], Array]) -> None:
    """Enter what stands in the place of an image, where that is another one, or its colours exchanged.

    By the triangle inequality an image that is nearer to another one than half of what lies between both is further
    from its own than that, whatever a collator did to it (resizing, compression).
    """
    said = _what(place, found, own, others)
    if said is not None:
        findings.add(said[0], place.row, None, found=f"image {place.number} {said[1]}", expected=said[2], cause=said[3])


def _what(
    place: _Place, found: Array, own: Array, others: dict[tuple[int, int], Array]
) -> tuple[str, str, str, str] | None:
    """Kind, what is there, what should be and the cause; None where the image is its own."""
    if found.max() < DARK <= own.max() / 2:
        return (
            "pixels-not-normalised",
            "is black to within one step of 8 bits",
            f"its image, whose brightest patch has {own.max():.0f} of 255",
            TWICE,
        )
    if _is(found, own[..., ::-1], own):
        return (
            "colours-exchanged",
            "with red and blue exchanged",
            "channels in the order red, green, blue",
            "the loader reads BGR (OpenCV's imread): convert to RGB before the processor gets it",
        )
    other = next((each for each, thumbnail in others.items() if _is(found, thumbnail, own)), None)
    if other is not None:
        return (
            "images-exchanged",
            f"shows image {other[1]} of sample {other[0]}",
            f"image {place.number} of sample {place.sample}",
            "images were collected in another order than the texts, or the batch was reordered without them",
        )
    if place.is_turned(found):
        return (
            "image-turned",
            f"has {found.shape[0]} rows and {found.shape[1]} columns of patches",
            f"the orientation of its image, {place.size[0]} px wide and {place.size[1]} px high",
            "height and width of the grid are exchanged, or the EXIF orientation was ignored or applied twice",
        )
    words = next((words for words, turned in _turned(found, place.merge) if _is(turned, own, found)), None)
    if words is not None:
        return (
            "patches-misplaced",
            words,
            f"patches in blocks of {place.merge} by {place.merge}, as the processor orders them, of the image as it is",
            "pixel_values were made or reordered by hand, or the image was turned: hand on what the processor makes",
        )
    return None


def _turned(found: Array, merge: int) -> Iterator[tuple[str, Array]]:
    """What an image shows if its patches stand in another order than the model's."""
    rows, columns = found.shape[:2]
    yield "lies upside down", found[::-1]
    yield "is mirrored", found[:, ::-1]
    yield "is turned by half", found[::-1, ::-1]
    blocks = found.reshape(rows // merge, merge, columns // merge, merge, 3).transpose(0, 2, 1, 3, 4)
    yield "has its patches row by row", blocks.reshape(found.shape)


def _is(found: Array, other: Array, own: Array) -> bool:
    """Whether an image is another one and not its own."""
    return _distance(found, other) < _distance(own, other) / 2


def _thumbnails(view: View, layout: Layout, pixels: torch.Tensor) -> Iterator[Array]:
    """Each image of the batch, put together again: ``(rows, columns, 3)`` of patch means in steps of 8 bits."""
    import numpy as np

    family = view.known.family
    mean, deviation = np.array(family.image_mean), np.array(family.image_std)
    merge, start = view.known.merge, 0
    for t, h, w in layout.grids:
        rows = pixels[start : start + h * w].detach().float().reshape(h * w, 3, -1).mean(dim=-1).cpu().numpy()
        start += t * h * w
        blocks = rows.reshape(h // merge, w // merge, merge, merge, 3).transpose(0, 2, 1, 3, 4)
        yield (blocks.reshape(h, w, 3) * deviation + mean) * 255


def _thumbnail(image: Image, like: Array) -> Array:
    """A sample's image as means over as many patches as another has, ``(rows, columns, 3)``."""
    import numpy as np
    from PIL import Image as Pillow

    made = image.resize((like.shape[1], like.shape[0]), Pillow.Resampling.BOX)
    return np.asarray(made, dtype=np.float64)


def _distance(found: Array, other: Array) -> float:
    """Mean difference of two thumbnails in steps of 8 bits."""
    import numpy as np

    return float(np.abs(found - other).mean())
