"""What the model saw and said, for the report: some probe images, their visual tokens, and replies in every precision.

Registered where a report is asked for. The model replies once more than the checks have it do, to a few questions,
after they have judged; nothing here is a verdict.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qvl.models.backends import one_line
from pytest_qvl.report.process_results import SeenProbe
from pytest_qvl.session.findings import target_name

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from PIL.Image import Image

    from pytest_qvl.samples import Sample

ASKED_IN = "test_alignment"
FULL, NF4, ADAPTED = "full precision", "NF4", "NF4 + LoRA"
IMAGES = "images"  # beside the precisions, in what failed
SHOWN = 6
SIDE = 360  # pixels of the longer side of a shown image
NEW_TOKENS = 32
LONGEST = 200  # characters of an exception in a line
LARGE = 60_000  # bytes, above which a photograph is stored as JPEG


@dataclass(frozen=True)
class _Asked:
    """Replies of one precision by sample id, and why there are none; both empty where nobody asked."""

    replies: dict[str, str] = field(default_factory=dict)
    failed: str = ""


class ProbeReplies:
    """Collects replies in one process; register it as a plugin."""

    def __init__(self) -> None:
        self._full = _Asked()
        self._found: list[SeenProbe] = []

    @property
    def found(self) -> tuple[SeenProbe, ...]:
        """What has been seen and said so far."""
        return tuple(self._found)

    def ask_full(self, model: Any, processor: Any, samples: Sequence[Sample]) -> None:
        """Let the full-precision model reply, while it is there."""
        self._full = _asked(model, processor, samples, adapted=False)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Let the quantized model reply, with its adapter and without, after the check of its answers."""
        try:
            return (yield)
        finally:
            given = getattr(item, "funcargs", None) or {}
            if getattr(item, "originalname", "") == ASKED_IN and "qvl_lora_model" in given:
                self._ask(target_name(item) or "", given)

    def _ask(self, target: str, given: dict[str, Any]) -> None:
        model, processor, samples = given["qvl_lora_model"], given["qvl_processor"], given["qvl_image_samples"]
        adapted = _asked(model, processor, samples, adapted=True)
        asked = {FULL: self._full, NF4: _asked(model, processor, samples, adapted=False), ADAPTED: adapted}
        failed = {name: one.failed for name, one in asked.items() if one.failed}
        for sample in chosen(samples):
            replies = {name: one.replies[sample.id] for name, one in asked.items() if sample.id in one.replies}
            images, why = _drawn(sample, processor)
            lacking = {**failed, **({IMAGES: why} if why else {})}
            self._found.append(
                SeenProbe(target, sample.skill, sample.question, sample.answer, images, replies, lacking)
            )


def _asked(model: Any, processor: Any, samples: Sequence[Sample], *, adapted: bool) -> _Asked:
    """Replies, or why there are none: checks judge whether the model works, a report shows what there is."""
    try:
        return _Asked(replies_of(model, processor, chosen(samples), adapted=adapted))
    except Exception as error:
        return _Asked(failed=one_line(error)[:LONGEST])


def _drawn(sample: Sample, processor: Any) -> tuple[tuple[str, ...], str]:
    """The sample's images for the page, or why there are none."""
    try:
        return tuple(data_uri(with_grid(image, processor)) for image in sample.images), ""
    except Exception as error:
        return (), one_line(error)[:LONGEST]


def chosen(samples: Sequence[Sample]) -> list[Sample]:
    """A few with images, the first of each skill before others."""
    with_images = [sample for sample in samples if sample.images]
    firsts = {sample.skill: sample for sample in reversed(with_images)}
    ordered = [*reversed(firsts.values()), *(sample for sample in with_images if firsts[sample.skill] is not sample)]
    return ordered[:SHOWN]


def replies_of(model: Any, processor: Any, samples: Sequence[Sample], *, adapted: bool) -> dict[str, str]:
    """Greedy replies by sample id, with the adapter or without; the model is left as it was."""
    from contextlib import nullcontext

    from pytest_qvl.checks.support.scoring import replies, text_of
    from pytest_qvl.models.adapters import adapters_disabled
    from pytest_qvl.models.anatomy import anatomy
    from pytest_qvl.models.state import preserved

    parts = anatomy(model)
    with preserved(model, training=False), nullcontext() if adapted else adapters_disabled(parts):
        found = replies(parts, processor, samples, max_new_tokens=NEW_TOKENS)
    return {name: text_of(processor, reply).strip() for name, reply in found.items()}


def with_grid(image: Image, processor: Any) -> Image:
    """The image as large as it is shown, with a line between visual tokens.

    The processor resizes before it cuts, so that the grid is that of the processor, laid over the whole image.
    """
    from PIL import Image as Images
    from PIL import ImageDraw

    merge = processor.image_processor.merge_size
    _, rows, columns = processor.image_processor(images=[image], return_tensors="pt")["image_grid_thw"][0].tolist()
    scale = SIDE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    shown = image.convert("RGB").resize(size, Images.Resampling.NEAREST if scale > 1 else Images.Resampling.LANCZOS)
    lines = ImageDraw.Draw(shown, "RGBA")
    for parts, length, upright in ((columns // merge, shown.width, True), (rows // merge, shown.height, False)):
        for number in range(1, parts):
            at = round(number * length / parts)
            ends = ((at, 0), (at, shown.height)) if upright else ((0, at), (shown.width, at))
            lines.line(ends, fill=(255, 255, 255, 170), width=1)
            lines.line([(x + upright, y + (not upright)) for x, y in ends], fill=(0, 0, 0, 110), width=1)
    return shown


def data_uri(image: Image) -> str:
    """An image inside of the page."""
    png = io.BytesIO()
    image.save(png, "PNG", optimize=True)
    if png.tell() <= LARGE:
        return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
