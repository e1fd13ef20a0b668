"""Probe images are sized for the model under test, and every sample of a user's own is used."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig

from pytest_qvl.checks.support.sizing import sizes_for
from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.models.sources.model_source import parse_model
from pytest_qvl.models.sources.processors import load_processor
from pytest_qvl.models.sources.released import ImageSizes, image_sizes, released_config, released_names
from pytest_qvl.samples import (
    ALL_SKILLS,
    ProbeSizes,
    Sample,
    attention_window,
    first_of_each_skill,
    long_sample,
    make_batch,
    pixel_limits,
    probe_samples,
    probe_sizes,
    row_groups,
    scenes,
    structure_rows,
    training_rows,
    window_count,
)

if TYPE_CHECKING:
    from pathlib import Path

EMBEDDED = ProbeSizes(28, 2, 28, 28, 28, 84, one_size=True)


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor(embedded_model_dir())


def of_released(name: str, readable: bool = True, **limits: int) -> tuple[ProbeSizes, ImageSizes]:
    known = image_sizes(name)
    given = {"min_pixels": known.min_pixels, "max_pixels": known.max_pixels, **limits}
    return probe_sizes(released_config(name).vision_config, readable=readable, **given), known


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("qwen2.5-vl-3b", ProbeSizes(28, 4, 168, 56, 28, 308)),
        ("qwen2.5-vl-7b", ProbeSizes(28, 4, 168, 56, 28, 308)),
        ("qwen2-vl-7b", ProbeSizes(28, None, 168, 56, 28, 308)),
        ("qwen3-vl-4b", ProbeSizes(32, None, 160, 96, 96, 352)),  # it enlarges whatever is below 256 x 256 px
    ],
)
def test_sizes_by_hand(name: str, sizes: ProbeSizes) -> None:
    assert of_released(name)[0] == sizes


def test_the_embedded_model_reads_one_size(processor: Any, tmp_path: Path) -> None:
    """Its configuration says so; saved by Transformers, or copied, it still does."""
    assert sizes_for(parse_model("embedded"), processor) == EMBEDDED
    AutoConfig.from_pretrained(embedded_model_dir()).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).qvl_scene_cell == 28


@pytest.mark.parametrize("name", ["qwen2.5-vl-3b", "qwen3-vl-4b"])
def test_synthetic_weights_have_nothing_to_read(name: str) -> None:
    sizes = of_released(name, readable=False)[0]
    assert sizes.cell == sizes.row_cell


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("name", released_names())
def test_every_image_of_every_model(name: str, readable: bool) -> None:
    sizes, known = of_released(name, readable)
    probes = probe_samples(sizes, 0, 2)
    for sample in [*probes, *structure_rows(probes, sizes), *training_rows(probes, sizes)]:
        for image in (*sample.images, *(sample.swapped or ())):
            _, rows, columns = known.grid(image.height, image.width)
            assert (rows, columns) == (image.height // known.patch_size, image.width // known.patch_size), "resized"
    images = [image for sample in probes for image in sample.images]
    if readable:
        assert min(min(image.size) for image in images) >= 448
    assert max(known.visual_tokens(image.height, image.width) for image in images) >= 1024
    assert any(image.height != image.width for image in images)
    window = attention_window(released_config(name).vision_config)
    if window is None:
        return
    judged = [*images, *(i for s in structure_rows(probes, sizes) if len(s.images) == 1 for i in s.images)]
    grids = [known.grid(image.height, image.width) for image in judged]
    assert min(min(window_count(grid, known.merge_size, window)) for grid in grids) >= 2
    assert any(grid[1] // known.merge_size % window for grid in grids), "no partial window"


def test_training_images_are_as_small_as_they_were() -> None:
    """84 to 112 px for Qwen2.5-VL: memory of a training step is that of 14 images of 9 to 16 visual tokens."""
    sizes, _ = of_released("qwen2.5-vl-7b")
    rows = training_rows(probe_samples(sizes, 0, 2), sizes)
    assert [sample.skill for sample in rows] == list(ALL_SKILLS)
    assert {side for sample in rows for image in sample.images for side in image.size} == {84, 112}


def test_pixel_limits_of_the_processor_come_first() -> None:
    small, _ = of_released("qwen2.5-vl-7b", max_pixels=448 * 448)
    assert small.cell == small.large_cell == 112
    enlarged, _ = of_released("qwen2.5-vl-7b", min_pixels=256 * 256)
    assert enlarged.training_cell == 112


def test_pixel_limits_are_read_from_the_real_processor(processor: Any) -> None:
    assert pixel_limits(processor.image_processor) == (3136, 12845056)
    small = load_processor(embedded_model_dir(), max_pixels=200704)
    assert pixel_limits(small.image_processor) == (3136, 200704)


def test_windows_are_counted_with_the_partial_ones() -> None:
    assert window_count((1, 36, 48), 2, 4) == (ceil(18 / 4), 6)
    assert window_count((1, 8, 8), 2, 4) == (1, 1)


def test_one_probe_of_a_model_that_reads_one_size_is_as_any_other() -> None:
    images = [image.tobytes() for sample in probe_samples(EMBEDDED, 3, 2) for image in sample.images]
    assert images == [image.tobytes() for sample in scenes(3, 2) for image in sample.images]


# A user's own samples


def own(count: int, side: int = 56, text_only: int = 0) -> list[Sample]:
    image = Image.new("RGB", (side, side))
    with_images = [Sample((image,), "?", "a", "custom", f"line-{n}") for n in range(count)]
    return [*(Sample((), "?", "a", "custom", f"text-{n}") for n in range(text_only)), *with_images]


@pytest.mark.parametrize(
    ("samples", "sizes"),
    [
        (own(1), [1]),
        (own(10), [10]),
        (own(11), [11]),  # no row is alone: several checks compare it with its neighbours
        (own(25), [10, 10, 5]),
        (own(5, side=4000), [2, 3]),
        (own(12, text_only=3), [12, 3]),
        (own(0, text_only=3), [3]),
    ],
)
def test_all_of_a_users_samples_are_used(samples: list[Sample], sizes: list[int]) -> None:
    assert structure_rows(samples, EMBEDDED) == samples == first_of_each_skill(samples)
    groups = row_groups(samples)
    assert sorted(len(group) for group in groups) == sorted(sizes)
    assert {sample.id for group in groups for sample in group} == {sample.id for sample in samples}
    assert all(any(sample.images for sample in group) for group in groups) or not any(s.images for s in samples)
    assert training_rows(samples, EMBEDDED) == groups[0]


def test_photographs_beside_scenes_are_no_rows() -> None:
    probes = [*probe_samples(EMBEDDED, 0, 1), *own(3)]
    assert [sample.skill for sample in structure_rows(probes, EMBEDDED)] == list(ALL_SKILLS)


# The long row


def test_the_long_row_is_longer_than_2000_tokens_and_fits(processor: Any) -> None:
    sample = long_sample(processor, EMBEDDED, seed=0, longest=2048)
    batch = make_batch(processor, [sample])
    assert len(batch["image_grid_thw"]) == 2
    assert 2000 <= batch["input_ids"].shape[1] <= 2048


def test_positions_rounded_to_bfloat16_are_seen_in_a_long_row_only(processor: Any) -> None:
    from pytest_qvl.checks import mrope_positions
    from pytest_qvl.evidence import CheckFailed
    from pytest_qvl.faults.matrix.random_models import random_model
    from pytest_qvl.models.anatomy import anatomy
    from pytest_qvl.models.taps import positions_changed

    model = random_model("qwen2_5_vl", seed=0, dtype=torch.float32, quantization_config=None)
    long = make_batch(processor, [long_sample(processor, EMBEDDED, seed=0, longest=2048)])
    assert mrope_positions(model, long).ok
    with positions_changed(anatomy(model), lambda ids: ids.bfloat16().long()):
        assert mrope_positions(model, make_batch(processor, scenes(0, 1))).ok
        with pytest.raises(CheckFailed, match="t is 256, should be 257"):
            mrope_positions(model, long)
