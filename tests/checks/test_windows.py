"""Window attention at the released ratios: judged on images of several windows, refused on images of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from pytest_qvl.checks.support.reference import record_reference
from pytest_qvl.checks.vision import vision_stability
from pytest_qvl.evidence import CannotJudge, CheckFailed
from pytest_qvl.faults.matrix.random_models import random_model
from pytest_qvl.faults.tools import attribute
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.samples import Sample, pixel_limits, probe_sizes, scenes

FULL = (1, 3)
WINDOW = 112  # px, as in every released Qwen2.5-VL; the embedded model has 56


@pytest.fixture(scope="module")
def model() -> Any:
    vision = {"window_size": WINDOW, "fullatt_block_indexes": list(FULL)}
    return random_model("qwen2_5_vl", seed=0, dtype=torch.float32, quantization_config=None, vision=vision)


@pytest.fixture(scope="module")
def samples(model: Any, processor: Any) -> list[Sample]:
    least, most = pixel_limits(processor.image_processor)
    sizes = probe_sizes(model.config.vision_config, min_pixels=least, max_pixels=most, readable=False)
    return scenes(0, 1, ("side", "nth_colour"), cell=sizes.cell)


@pytest.fixture(scope="module")
def reference(model: Any, processor: Any, samples: list[Sample]) -> Any:
    return record_reference(model, processor, samples)


def figures(evidence: Any) -> dict[str, Any]:
    return {figure.name: figure.value for figure in evidence.figures}


def test_healthy(model: Any, processor: Any, samples: list[Sample], reference: Any) -> None:
    found = figures(vision_stability(model, processor, samples, reference))
    assert found["images of a single attention window"] == 0
    assert found["most attention windows of an image"] == 4
    assert found["window blocks that attend outside their window"] == 0
    assert found["full-attention blocks that stay inside a window"] == 0


@pytest.mark.parametrize(
    ("full", "says"),
    [
        ([0, 1, 2, 3], "moves 128 patches of other windows in vision block 0: it attends outside its window, as do 2"),
        ([], "moves nothing outside it in vision block 1, which attends over the whole image"),
        ([1], "moves nothing outside it in vision block 3"),
        ([1, 2, 3], "patches of other windows in vision block 2: it attends outside its window, as do 1 of the 2"),
    ],
)
def test_wrong_windows(
    model: Any, processor: Any, samples: list[Sample], reference: Any, full: list[int], says: str
) -> None:
    with attribute(anatomy(model).vision_tower, "fullatt_block_indexes", full):
        with pytest.raises(CheckFailed) as caught:
            vision_stability(model, processor, samples, None)
        assert says in str(caught.value)
        with pytest.raises(CheckFailed, match="visual features before the merger moved away"):
            vision_stability(model, processor, samples, reference)


@pytest.mark.parametrize("size", [(300, 200), (1100, 60)])
def test_an_image_of_one_colour_is_healthy(fresh_model: Any, processor: Any, size: tuple[int, int]) -> None:
    """The trained tower attends to equal patches alone there, and gives a negated one a weight of exactly 0."""
    plain = Sample((Image.new("RGB", size, "red"),), "What colour?", "red", "own", "plain")
    found = figures(vision_stability(fresh_model(), processor, [plain], None))
    assert found["most attention windows of an image"] > 1


@pytest.mark.parametrize("full", [list(FULL), [0, 1, 2, 3]], ids=["healthy", "damaged"])
def test_images_of_one_window_are_no_evidence(model: Any, processor: Any, full: list[int]) -> None:
    """84 to 112 px, as all probes once were: damaged or not, these models are bitwise the same on them."""
    small = scenes(0, 1, ("side", "nth_colour"))
    with attribute(anatomy(model).vision_tower, "fullatt_block_indexes", full):
        with pytest.raises(CannotJudge, match=r"each of the 4 images is a single attention window \(112 px per side\)"):
            vision_stability(model, processor, small, None)


def test_a_defect_is_reported_although_windows_cannot_be_judged(model: Any, processor: Any, reference: Any) -> None:
    weight = anatomy(model).merger.mlp[2].weight
    before = weight.data.clone()
    weight.data.fill_(float("nan"))
    try:
        with pytest.raises(CheckFailed, match="not finite"):
            vision_stability(model, processor, scenes(0, 1, ("side",)), None)
    finally:
        weight.data.copy_(before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_healthy_in_every_dtype(fresh_model: Any, processor: Any, dtype: str) -> None:
    """The embedded model: windows of 56 px, partial ones at the edges of images with 3 cells."""
    evidence = vision_stability(fresh_model(dtype=dtype), processor, scenes(1, 1, ("side", "list")), None)
    assert figures(evidence)["most attention windows of an image"] == 4


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_families_without_windows_say_nothing_of_them(processor: Any, family: str) -> None:
    other = random_model(family, seed=0, dtype=torch.float32, quantization_config=None)
    with attribute(processor.image_processor, "patch_size", other.config.vision_config.patch_size):
        evidence = vision_stability(other, processor, scenes(0, 1, ("side",)), None)
    assert not any("window" in name for name in figures(evidence))
