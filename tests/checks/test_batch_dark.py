"""batch: pixels that were rescaled twice are told from images that are black."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from pytest_qvl import checks
from pytest_qvl.checks.batches.findings import findings_of, unjudged_of
from pytest_qvl.checks.batches.pictures import DARK
from pytest_qvl.checks.batches.pixels import OVERSHOOT
from pytest_qvl.evidence import CheckFailed
from pytest_qvl.models.families import FAMILIES
from pytest_qvl.samples import make_batch, scenes

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_qvl.evidence import Evidence
    from pytest_qvl.samples import Sample

Batch = dict[str, torch.Tensor]
Array = np.ndarray[Any, Any]
UNJUDGED = "brightness of pixel_values"


@pytest.fixture(scope="module")
def drawn() -> Sample:
    return scenes(0, 1, ["colour"], cell=14)[0]


def photograph(size: int = 56) -> Image.Image:
    """All brightnesses, as a photograph has them."""
    levels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def showing(sample: Sample, *images: Image.Image) -> list[Sample]:
    return [replace(sample, images=(image,)) for image in images]


def rescaled_twice(processor: Any, samples: list[Sample], dtype: torch.dtype = torch.float32) -> Batch:
    """What the real processor makes of images whose pixels are 0 to 1 already."""
    batch: Batch = make_batch(processor, samples, padding_side="right", answers=True)
    scaled = [torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255 for each in samples for image in each.images]
    made = processor.image_processor(images=scaled, return_tensors="pt")
    assert torch.equal(made["image_grid_thw"], batch["image_grid_thw"])
    return {**batch, "pixel_values": made["pixel_values"].to(dtype)}


def resized_in_floating_point(image: Image.Image, size: int, *, antialias: bool) -> torch.Tensor:
    """Pixels of 0 to 1, ``(3, size, size)``, that nothing cuts off: what torchvision calls for floats."""
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 255
    return torch.nn.functional.interpolate(pixels, size=(size, size), mode="bicubic", antialias=antialias)[0]


def overshooting(size: int = 56) -> Image.Image:
    """Black and white of twice that size where weights of one sign meet, so that a half as large overshoots by most.

    Halving without antialiasing weighs four pixels -, +, +, - each way.
    """
    signs = np.outer([-1, 1, 1, -1], [-1, 1, 1, -1])
    bright = np.roll(np.tile(signs > 0, (size // 2, size // 2)), (-1, -1), (0, 1))
    bright[:, size:] ^= True
    return Image.fromarray(np.repeat(255 * bright[..., None].astype(np.uint8), 3, axis=-1))


OVERSHOT = [(photograph(50), True), (photograph(60), True), (photograph(50), False), (overshooting(), False)]


def handed_over(processor: Any, sample: Sample, pixels: torch.Tensor, dtype: torch.dtype, **options: Any) -> Batch:
    """What the real processor makes of pixels ``(3, 56, 56)`` that were resized before it got them."""
    batch: Batch = make_batch(processor, showing(sample, photograph()), padding_side="right", answers=True)
    made = processor.image_processor(images=[pixels], do_resize=False, return_tensors="pt", **options)
    assert torch.equal(made["image_grid_thw"], batch["image_grid_thw"])
    return {**batch, "pixel_values": made["pixel_values"].to(dtype)}


def judged(*given: Any) -> tuple[set[str], Evidence]:
    try:
        evidence = checks.batch(*given)
    except CheckFailed as failure:
        evidence = failure.evidence
    return {finding.kind for finding in findings_of(evidence)}, evidence


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [56, 50], ids=["as-it-is", "resized"])
def test_pixels_that_were_rescaled_twice_are_found(
    processor: Any, config: Any, drawn: Sample, dtype: torch.dtype, size: int
) -> None:
    """Of a batch of one image, without its sample: what is left is no 8-bit image."""
    batch = rescaled_twice(processor, showing(drawn, photograph(size)), dtype)
    assert judged(batch, processor, config)[0] == {"pixels-not-normalised"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("image", "antialias"), OVERSHOT, ids=["grown", "shrunk", "plain", "worst"])
def test_pixels_that_overshot_and_were_rescaled_twice_are_found(
    processor: Any, config: Any, drawn: Sample, dtype: torch.dtype, image: Image.Image, antialias: bool
) -> None:
    pixels = resized_in_floating_point(image, 56, antialias=antialias)
    assert pixels.min() < 0
    assert pixels.max() > 1
    batch = handed_over(processor, drawn, pixels, dtype)
    assert judged(batch, processor, config)[0] == {"pixels-not-normalised"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("image", "antialias"), OVERSHOT, ids=["grown", "shrunk", "plain", "worst"])
def test_pixels_that_overshot_and_were_not_rescaled_again_pass(
    processor: Any, config: Any, drawn: Sample, dtype: torch.dtype, image: Image.Image, antialias: bool
) -> None:
    pixels = resized_in_floating_point(image, 56, antialias=antialias)
    kinds, evidence = judged(handed_over(processor, drawn, pixels, dtype, do_rescale=False), processor, config)
    assert kinds == set()
    assert any("only their range was judged" in note for note in evidence.notes)


def weights(length: int, size: int, *, antialias: bool) -> torch.Tensor:
    """The weight of each of `length` pixels in each of `size`: ``(length, size)`` float64."""
    one = torch.eye(length, dtype=torch.float64)[None, None]
    return torch.nn.functional.interpolate(one, size=(length, size), mode="bicubic", antialias=antialias)[0, 0]


def test_bicubic_resizing_overshoots_as_far_as_the_sum_of_its_weights_sizes() -> None:
    """The numbers of docs/limits.md#bicubic-resizing, of torch's own weights."""
    largest = {
        antialias: max(
            float(weights(length, size, antialias=antialias).abs().sum(dim=0).max())
            for length in range(14, 180, 2)
            for size in (28, 56, 63, 84, 98)
        )
        for antialias in (True, False)
    }
    assert largest[False] == 1.375
    assert 1.2687 < largest[True] < 1.2688
    pixels = resized_in_floating_point(overshooting(), 56, antialias=False)
    assert pixels.aminmax() == (pytest.approx(-OVERSHOOT), pytest.approx(1 + OVERSHOOT))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.label)
def test_two_of_255_are_brighter_than_what_is_rescaled_twice(family: Any) -> None:
    """Also in bfloat16, in which both are rounded."""
    for mean, deviation in zip(family.image_mean, family.image_std, strict=True):
        normalised = (torch.tensor([1 + OVERSHOOT, 2], dtype=torch.float64) / 255 - mean) / deviation
        rounded = normalised.to(torch.bfloat16).double()
        brightest, two = ((rounded * deviation + mean) * 255).tolist()
        assert brightest < DARK
        assert brightest < two


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_black_and_white_that_was_rescaled_twice_is_found_by_its_sample(
    processor: Any, config: Any, drawn: Sample, dtype: torch.dtype
) -> None:
    """Values 0 and 255 become 0 and 1, which an image may hold: by itself that is not judged."""
    page = Image.fromarray(255 * (np.asarray(photograph()) > 127).astype(np.uint8))
    samples = showing(drawn, page)
    batch = rescaled_twice(processor, samples, dtype)
    kinds, evidence = judged(batch, processor, config)
    assert kinds == set()
    assert UNJUDGED in unjudged_of(evidence)
    assert judged(batch, processor, config, samples)[0] == {"pixels-not-normalised"}
    two = rescaled_twice(processor, showing(drawn, page, page), dtype)
    assert judged(two, processor, config)[0] == {"pixels-not-normalised"}


def _black(levels: Array) -> Array:
    return 0 * levels


def _black_with_noise(levels: Array) -> Array:
    return levels % 2


def _dark(levels: Array) -> Array:
    return levels % 3


def _black_with_a_dot(levels: Array) -> Array:
    made = 0 * levels
    made[0, 0] = 4
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("levels", [_black, _black_with_noise, _dark, _black_with_a_dot])
def test_a_real_black_image_passes(
    processor: Any, config: Any, drawn: Sample, levels: Callable[[Array], Array], dtype: torch.dtype
) -> None:
    samples = showing(drawn, Image.fromarray(levels(np.asarray(photograph()))))
    batch = make_batch(processor, samples, padding_side="right", answers=True)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    kinds, evidence = judged(batch, processor, config)
    assert kinds == set()
    assert (UNJUDGED in unjudged_of(evidence)) == (levels is _black_with_noise)
    kinds, evidence = judged(batch, processor, config, samples)
    assert kinds == set()
    assert UNJUDGED not in unjudged_of(evidence)
