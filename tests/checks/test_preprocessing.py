"""The image oracle against Pillow, torch and the real processors; processors that are wrong from the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pytest_qvl.checks import image_preprocessing
from pytest_qvl.checks.preprocessing import STEPS_ROUNDED_ONCE
from pytest_qvl.checks.support.image_oracle import STEPS_IN_8_BITS, Filter, Recipe, resized, triangle
from pytest_qvl.evidence import CheckFailed
from pytest_qvl.faults.matrix.random_models import random_config
from pytest_qvl.faults.tools import attribute
from pytest_qvl.models.families import FAMILIES, Family
from pytest_qvl.models.sources.processors import load_processor
from pytest_qvl.models.sources.released import image_sizes, released_names
from pytest_qvl.releases import is_before
from pytest_qvl.samples import Sample, scenes

SIZES = [
    ((37, 53), (56, 84)),
    ((196, 56), (192, 64)),
    ((201, 117), (196, 112)),
    ((230, 310), (56, 84)),
    ((28, 56), (280, 56)),
]
samples = scenes(0, 1)[:3]


@pytest.fixture(scope="module")
def model(fresh_model: Any) -> Any:
    return fresh_model(quantized=False)


@pytest.fixture
def own(tiny_dir: Path) -> Any:
    """A processor to damage."""
    return load_processor(tiny_dir)


def skeleton(family: str) -> Any:
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(random_config(family))


def noise(height: int, width: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def a_sample(*images: Image.Image) -> Sample:
    return Sample(images, "What is it?", "noise", "colour", "own")


def refused(model: Any, processor: Any, shown: Any = samples) -> str:
    with pytest.raises(CheckFailed) as caught:
        image_preprocessing(model, processor, shown)
    return str(caught.value)


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_the_oracle_resizes_as_pillow_and_torch_do(before: tuple[int, int], after: tuple[int, int]) -> None:
    pixels = noise(*before)
    by_pillow = np.asarray(Image.fromarray(pixels).resize(after[::-1], Image.Resampling.BICUBIC), dtype=float)
    both_ways = (resized(pixels, after, Filter(passes=passes)) for passes in ("columns", "rows"))
    assert min(np.abs(made - by_pillow).max() for made in both_ways) <= 1
    in_rows = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    for layout in (torch.contiguous_format, torch.channels_last):
        made = _interpolated(in_rows.contiguous(memory_format=layout), after)
        assert np.abs(resized(pixels, after) - made).max() <= STEPS_IN_8_BITS
    made = _interpolated(in_rows.float(), after)
    assert np.abs(resized(pixels, after, Filter(passes="once")) - made).max() <= STEPS_ROUNDED_ONCE


def _interpolated(image: torch.Tensor, size: tuple[int, int]) -> Any:
    made = torch.nn.functional.interpolate(image, size=size, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    return made.double().round().clamp(0, 255).numpy()


def test_the_filter_that_a_finding_may_name_is_pillows() -> None:
    pixels = noise(37, 53)
    made = np.asarray(Image.fromarray(pixels).resize((84, 28), Image.Resampling.BILINEAR), dtype=float)
    assert np.abs(resized(pixels, (28, 84), Filter(triangle, 1.0)) - made).max() <= 1


@pytest.mark.parametrize("name", released_names())
def test_sizes_are_those_that_the_forecast_counts_with(name: str) -> None:
    sizes = image_sizes(name)
    recipe = Recipe(sizes.patch_size, sizes.merge_size, 2, sizes.min_pixels, sizes.max_pixels, (0.5,) * 3, (0.5,) * 3)
    for height, width in ((1, 1), (13, 400), (280, 280), (1080, 1920), (6000, 8000)):
        assert recipe.grid(height, width) == sizes.grid(height, width)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_every_family_passes_with_its_patches_and_constants(family: Family, own: Any) -> None:
    processor = own.image_processor
    processor.patch_size = family.small_vision["patch_size"]
    processor.image_mean, processor.image_std = list(family.image_mean), list(family.image_std)
    assert image_preprocessing(skeleton(family.model_type), own, samples).ok


def test_images_as_people_have_them(model: Any, processor: Any) -> None:
    pixels = noise(61, 87)
    images = [Image.fromarray(pixels).convert(mode) for mode in ("RGB", "L", "P", "CMYK", "1", "LA")]
    images += [Image.fromarray(noise(5, 900)), Image.new("RGB", (56, 56)), Image.fromarray(noise(300, 2))]
    assert image_preprocessing(model, processor, [a_sample(*images)]).ok


def test_limits_are_kept_on_both_sides(model: Any, tiny_dir: Path) -> None:
    narrow = load_processor(tiny_dir, min_pixels=28 * 28 * 6, max_pixels=28 * 28 * 9)
    evidence = image_preprocessing(model, narrow, samples)
    assert not any("above max_pixels" in note for note in evidence.notes)


def test_a_processor_that_does_not_resize_is_judged_without(model: Any, own: Any) -> None:
    with attribute(own.image_processor, "do_resize", False):
        evidence = image_preprocessing(model, own, samples)
    assert any("do_resize=False" in note for note in evidence.notes)


@pytest.mark.skipif(
    is_before("transformers", "5") or not is_before("transformers", "5.23"), reason="there the limit counts"
)
def test_a_limit_that_does_not_count_is_named(model: Any, own: Any) -> None:
    """Set after the load: some releases of Transformers 5 read ``size`` alone."""
    with attribute(own.image_processor, "max_pixels", 28 * 28 * 4):
        message = refused(model, own)
    assert "and only one of both counts" in message


def test_one_value_that_is_off_is_named(model: Any, own: Any) -> None:
    original = own.image_processor.preprocess

    def preprocess(images: Any, **options: Any) -> Any:
        made = original(images, **options)
        made["pixel_values"][1, 7] += 1e-4
        return made

    with attribute(own.image_processor, "preprocess", preprocess):
        message = refused(model, own)
    assert "image 0 of sample" in message
    assert "1 of" in message
    assert "first value 7 of patch 1" in message
    assert "no single step of the algorithm explains it" in message


def test_constants_of_another_family_are_named(own: Any) -> None:
    message = refused(skeleton("qwen3_vl"), own)
    assert "the processor's patch_size is 14, the vision tower's 16" in message
    assert "that of every released Qwen3-VL [0.5, 0.5, 0.5]" in message


def test_the_embedded_constants_are_the_familys(processor: Any) -> None:
    row = FAMILIES["qwen2_5_vl"]
    assert tuple(processor.image_processor.image_mean) == row.image_mean
    assert tuple(processor.image_processor.image_std) == row.image_std


def test_a_loader_of_torchvision_that_never_turns_files_is_noted(model: Any, own: Any, monkeypatch: Any) -> None:
    """What Transformers' torchvision processors do with paths, decoded here by Pillow: torchvision needs CUDA's torch."""

    def decoded(given: Any) -> Any:
        if not isinstance(given, str):
            return [decoded(each) for each in given] if isinstance(given, list) else given
        return torch.from_numpy(np.asarray(Image.open(given).convert("RGB")).copy()).permute(2, 0, 1)

    monkeypatch.setattr(own.image_processor, "fetch_images", decoded)
    evidence = image_preprocessing(model, own, samples)
    assert any("not turned as their EXIF orientation says" in note for note in evidence.notes)
