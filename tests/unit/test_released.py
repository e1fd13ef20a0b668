"""Built-in configurations: exactly the released sizes, on every supported Transformers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText

from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.sources.released import (
    MAX_ASPECT_RATIO,
    expectations,
    hub_id,
    image_sizes,
    released_config,
    released_names,
)


@pytest.mark.parametrize("name", released_names())
def test_the_model_built_from_it_has_the_released_size(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(released_config(name))
    model.tie_weights()
    parts = anatomy(model)
    linears = [parts.group_of(linear) for linear, _ in parts.named_linears()]
    vision = sum(p.numel() for p in parts.vision_tower.parameters())
    total = sum(p.numel() for p in model.parameters())
    built = {
        "total_params": total,
        "vision_params": vision,
        "text_params": total - vision,
        "text_linear_modules": linears.count("language"),
        "vision_linear_modules": linears.count("vision"),
        "merger_linear_modules": linears.count("merger"),
    }
    expected = expectations(name)
    expected.pop("lora_r16_language_only", None)
    assert {key: built[key] for key in expected} == expected
    assert "total_params" in expected


@pytest.mark.parametrize("name", ["qwen2.5-vl-3b", "qwen2.5-vl-7b"])
def test_no_class_default_is_left_in_place(name: str) -> None:
    config = released_config(name)
    assert config.vision_config.hidden_size == 1280
    assert config.vision_config.tokens_per_second == 2
    assert config.get_text_config().rms_norm_eps == 1e-6
    assert config.vision_config.out_hidden_size == config.get_text_config().hidden_size


def test_each_call_gives_a_configuration_of_its_own() -> None:
    released_config("qwen2.5-vl-3b").vision_config.depth = 1
    assert released_config("qwen2.5-vl-3b").vision_config.depth == 32
    expectations("qwen2.5-vl-3b")["total_params"] = 0
    assert expectations("qwen2.5-vl-3b")["total_params"] == 3_754_622_976


@pytest.mark.parametrize("ask", [released_config, expectations, image_sizes, hub_id])
def test_unknown_names_are_refused_with_the_known(ask: object) -> None:
    with pytest.raises(ValueError, match=r"'qwen9'; known: qwen2-vl-2b, .*qwen3-vl-8b"):
        ask("qwen9")  # type: ignore[operator]


@pytest.mark.parametrize(
    ("height", "width", "grid", "tokens"),
    [
        (32, 32, (1, 4, 4), 4),
        (50, 320, (1, 4, 22), 22),
        (224, 224, (1, 16, 16), 64),
        (480, 640, (1, 34, 46), 391),
        (1024, 1024, (1, 74, 74), 1369),
        (1080, 1920, (1, 78, 138), 2691),
        (2160, 3840, (1, 154, 274), 10549),
    ],
)
def test_known_images(height: int, width: int, grid: tuple[int, int, int], tokens: int) -> None:
    sizes = image_sizes("qwen2.5-vl-7b")
    assert sizes.grid(height, width) == grid
    assert sizes.visual_tokens(height, width) == tokens


@settings(max_examples=300)
@given(st.integers(1, 6000), st.integers(1, 6000), st.sampled_from(["qwen2.5-vl-7b", "qwen3-vl-8b"]))
def test_images_are_cut_as_the_processor_cuts_them(height: int, width: int, name: str) -> None:
    """Bitwise the sizes of ``smart_resize``, the function Transformers' image processor calls."""
    pil = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    assume(max(height, width) <= MAX_ASPECT_RATIO * min(height, width))
    sizes = image_sizes(name)
    step = sizes.patch_size * sizes.merge_size
    rows, columns = pil.smart_resize(height, width, step, sizes.min_pixels, sizes.max_pixels)
    assert sizes.grid(height, width) == (1, rows // sizes.patch_size, columns // sizes.patch_size)


def test_images_the_processor_refuses_are_refused() -> None:
    sizes = image_sizes("qwen2.5-vl-7b")
    with pytest.raises(ValueError, match="has no pixels"):
        sizes.grid(0, 10)
    with pytest.raises(ValueError, match="more than 200 times"):
        sizes.grid(10, 2001)
