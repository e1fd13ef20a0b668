"""The images of a batch against those of its samples: which image is in which place, and in which colours."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.families import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    import torch
    from PIL.Image import Image

    from pytest_qvl.checks.batches.facts import View
    from pytest_qvl.checks.batches.findings import Findings
    from pytest_qvl.checks.batches.layout import Layout
    from pytest_qvl.checks.batches.paired import Conversation

    Array = np.ndarray[Any, Any]


def judge_images(view: View, findings: Findings, layout: Layout, given: Sequence[Conversation]) -> None:
    """Every row has the images of its own sample, in their order.

    Images are compared as thumbnails of one pixel per patch, so that a collator may resize as it likes. Where two
    images are the same, either may stand there.
    """
    wanted = [len(each.images) for each in given]
    if not _counted(findings, layout, wanted):
        return
    names = [(row, number) for row, count in enumerate(wanted) for number in range(count)]
    originals = [each.images[number] for row, each in enumerate(given) for number in range(wanted[row])]
    if any(image is None for image in originals):
        findings.notes.append("images that samples give as addresses were counted and not compared")
    pixels = view.batch.get(layout.kind.pixels)
    if (
        pixels is None
        or not layout.sound
        or any(each.kind.startswith(("pixels-", "patch-")) for each in findings.found)
    ):
        return
    shown = list(_thumbnails(view, layout, pixels))
    findings.judged["images compared with samples"] += sum(image is not None for image in originals)
    for place, found in enumerate(shown):
        candidates = {
            name: _thumbnail(image, found) for name, image in zip(names, originals, strict=True) if image is not None
        }
        own = candidates.pop(names[place], None)
        if own is not None:
            _say(findings, names[place], found, own, candidates)


def _counted(findings: Findings, layout: Layout, wanted: Sequence[int]) -> bool:
    """Whether every row has as many images as its sample."""
    if not layout.sound:
        findings.unjudged["images against samples"] = "placeholders and grids do not fit each other"
        return False
    counts = Counter(layout.rows)
    wrong = [row for row, count in enumerate(wanted) if counts[row] != count]
    for row in wrong:
        fewer = counts[row] < wanted[row]
        findings.add(
            "images-missing" if fewer else "images-repeated",
            row,
            None,
            found=f"{counts[row]} images",
            expected=f"{wanted[row]}, as its sample has",
            cause="the collator takes one image of each sample, or lost one that it could not read"
            if fewer
            else "the collator added images of another row, or one of them twice",
        )
    return not wrong


def _say(
    findings: Findings, name: tuple[int, int], found: Array, own: Array, others: dict[tuple[int, int], Array]
) -> None:
    """Enter what stands in the place of an image, where that is another one, or its colours exchanged.

    By the triangle inequality an image that is nearer to another one than half of what lies between both is further
    from its own than that, whatever a collator did to it (resizing, compression).
    """
    row, number = name
    if _is(found, own[..., ::-1], own):
        findings.add(
            "colours-exchanged",
            row,
            None,
            found=f"image {number} with red and blue exchanged",
            expected="channels in the order red, green, blue",
            cause="the loader reads BGR (OpenCV's imread): convert to RGB before the processor gets it",
        )
        return
    other = next((each for each, thumbnail in others.items() if _is(found, thumbnail, own)), None)
    if other is not None:
        findings.add(
            "images-exchanged",
            row,
            None,
            found=f"image {number} shows image {other[1]} of sample {other[0]}",
            expected=f"image {number} of sample {row}",
            cause="images were collected in another order than the texts, or the batch was reordered without them",
        )


def _is(found: Array, other: Array, own: Array) -> bool:
    """Whether an image is another one and not its own."""
    return _distance(found, other) < _distance(own, other) / 2


def _thumbnails(view: View, layout: Layout, pixels: torch.Tensor) -> Iterator[Array]:
    """Each image of the batch, put together again: ``(rows, columns, 3)`` of patch means in steps of 8 bits."""
    import numpy as np

    family = FAMILIES[view.known.family.model_type]
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
