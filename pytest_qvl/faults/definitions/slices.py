"""What is cut into slices, or made smaller to save memory, on its way into the tower or out of it.

Every module computes right on what it is given, or where `layer_arithmetic` looks, which sees none of these.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.definitions.routing import features_regrouped
from pytest_qvl.faults.tools import before, rows_scored
from pytest_qvl.models.anatomy import anatomy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from pytest_qvl.faults.case import Case

SLICE = 32  # visual tokens


@contextmanager
def _pixels_changed(parts: Any, change: Callable[[torch.Tensor, int], torch.Tensor]) -> Iterator[None]:
    """Pass ``pixel_values`` through ``change(pixels, rows of the batch)`` where they enter the model."""

    def enter(_module: Any, args: Any, kwargs: Any) -> Any:
        ids, pixels = kwargs.get("input_ids"), kwargs.get("pixel_values")
        if ids is None or pixels is None:
            return None
        return args, {**kwargs, "pixel_values": change(pixels, len(ids))}

    with before([parts.core], enter):
        yield


@fault(
    "visual-tokens-kept-in-8-bits",
    "What the tower made is kept in 8 bits with one scale per visual token until it is written: less than rounding.",
    target="model",
    check="feature_scatter",
    expected_words=("holds neither a visual token of this batch nor its text embedding",),
)
def _kept(case: Case) -> Iterator[None]:
    def kept(images: list[Any]) -> list[Any]:
        scales = [image.float().abs().amax(dim=-1, keepdim=True) / 127 for image in images]
        stored = [(image.float() / scale).round() for image, scale in zip(images, scales, strict=True)]
        return [(s * scale).to(image.dtype) for s, scale, image in zip(stored, scales, images, strict=True)]

    with features_regrouped(anatomy(case.model), kept):
        yield


@fault(
    "patches-exchanged-where-slices-meet",
    "A batch's patches go to the tower in slices of 32 visual tokens; where two slices meet, two groups of patches "
    "change places.",
    target="model",
    check="visual_token_order",
    expected_words=("is made of the patches of visual token", "visual tokens are wrong"),
    source="sgl-project/sglang#19474",
)
def _exchanged(case: Case) -> Iterator[None]:
    parts = anatomy(case.model)
    with _pixels_changed(parts, lambda pixels, _rows: _exchanged_at_joints(parts, pixels)):
        yield


def _exchanged_at_joints(parts: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Patches ``(patches, values)`` with the last group of each slice and the first of the next in exchanged places."""
    groups = pixels.clone().view(-1, parts.merge_size**2, pixels.shape[-1])
    for joint in range(SLICE, len(groups), SLICE):
        groups[[joint - 1, joint]] = groups[[joint, joint - 1]]
    return groups.view_as(pixels)


@fault(
    "patches-embedded-in-slices",
    "Where rows of images are scored in a batch (a forward in eval mode, not generate()), patches are embedded in "
    "slices of 32 visual tokens; where two meet, two groups change places.",
    target="model",
    check="visual_token_order",
    expected_words=("is made of the patches of visual token", "visual tokens are wrong"),
    source="sgl-project/sglang#19474",
)
def _embedded_in_slices(case: Case) -> Iterator[None]:
    parts = anatomy(case.model)
    with rows_scored(parts) as rows:

        def exchange(_module: Any, args: Any, kwargs: Any) -> Any:
            return ((_exchanged_at_joints(parts, args[0]), *args[1:]), kwargs) if rows[0] > 1 else None

        with before([parts.patch_embed], exchange):
            yield


@fault(
    "pixels-as-whole-numbers-in-batches",
    "To save memory, a batch of several rows keeps its pixel_values as int8, without a scale: they are whole numbers.",
    target="model",
    check="generation_batch_invariance",
    expected_words=("alone against batch: logits differ by", "depends on the rows beside it"),
    source="QwenLM/Qwen3-VL#1956",
)
def _whole(case: Case) -> Iterator[None]:
    import torch

    def shrink(pixels: torch.Tensor, rows: int) -> torch.Tensor:
        return pixels.round().to(torch.int8).to(pixels.dtype) if rows > 1 else pixels

    with _pixels_changed(anatomy(case.model), shrink):
        yield


@fault(
    "pixels-kept-in-8-bits",
    "To save memory, the model keeps pixel_values in 8 bits with one scale per patch, of one row as of many.",
    target="model",
    check="feature_scatter",
    expected_words=("the vision tower receives other pixels than the model was given", "patches differ"),
)
def _kept_pixels(case: Case) -> Iterator[None]:
    import torch

    def shrink(pixels: torch.Tensor, _rows: int) -> torch.Tensor:
        scale = pixels.float().abs().amax(dim=-1, keepdim=True).clamp_min(1e-6) / 127
        return ((pixels.float() / scale).round().to(torch.int8) * scale).to(pixels.dtype)

    with _pixels_changed(anatomy(case.model), shrink):
        yield
