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


# By name: width, MLP, layers, heads, of keys and values, of linear attention's values (0: it has none), tied
# head; of the vision tower:
# depth, width, MLP, DeepStack indexes. From the checkpoints' configuration files and model cards.
FACTS: dict[str, tuple[tuple[int, int, int, int, int, int, bool], tuple[int, int, int, list[int]]]] = {
    "qwen3-vl-2b": ((2048, 6144, 28, 16, 8, 0, True), (24, 1024, 4096, [5, 11, 17])),
    "qwen3-vl-4b": ((2560, 9728, 36, 32, 8, 0, True), (24, 1024, 4096, [5, 11, 17])),
    "qwen3-vl-8b": ((4096, 12288, 36, 32, 8, 0, False), (27, 1152, 4304, [8, 16, 24])),
    "qwen3.5-0.8b": ((1024, 3584, 24, 8, 2, 16, True), (12, 768, 3072, [])),
    "qwen3.5-2b": ((2048, 6144, 24, 8, 2, 16, True), (24, 1024, 4096, [])),
    "qwen3.5-4b": ((2560, 9216, 32, 16, 4, 32, True), (24, 1024, 4096, [])),
    "qwen3.5-9b": ((4096, 12288, 32, 16, 4, 32, False), (27, 1152, 4304, [])),
    "qwen3.5-27b": ((5120, 17408, 64, 24, 4, 48, False), (27, 1152, 4304, [])),
}


@pytest.mark.parametrize("name", [name for name in FACTS if name in released_names()])
def test_the_model_has_the_layers_of_the_release(name: str) -> None:
    """Weights of the class that is built, not what a configuration says of them."""
    config = released_config(name)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    (width, mlp, depth, heads, keys, of_values, tied), (blocks, vision_width, vision_mlp, deep) = FACTS[name]
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    text = "model.language_model"
    words, head, gated = (151936, 128, 1) if not of_values else (248320, 256, 2)
    assert shapes[f"{text}.embed_tokens.weight"] == shapes["lm_head.weight"] == (words, width)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied == config.tie_word_embeddings
    attends = [index for index in range(depth) if not of_values or index % 4 == 3]
    for index in range(depth):
        layer = f"{text}.layers.{index}"
        assert shapes[f"{layer}.mlp.gate_proj.weight"] == (mlp, width)
        if index in attends:
            assert shapes[f"{layer}.self_attn.q_proj.weight"] == (gated * heads * head, width)
            assert shapes[f"{layer}.self_attn.k_proj.weight"] == (keys * head, width)
        else:
            assert shapes[f"{layer}.linear_attn.in_proj_qkv.weight"] == (2 * 16 * 128 + of_values * 128, width)
            assert shapes[f"{layer}.linear_attn.in_proj_z.weight"] == (of_values * 128, width)
            assert shapes[f"{layer}.linear_attn.A_log"] == (of_values,)
            assert shapes[f"{layer}.linear_attn.conv1d.weight"] == (2 * 16 * 128 + of_values * 128, 1, 4)
    assert f"{text}.layers.{depth}.mlp.gate_proj.weight" not in shapes
    visual = model.model.visual
    assert len(visual.blocks) == blocks
    assert shapes["model.visual.blocks.0.mlp.linear_fc1.weight"] == (vision_mlp, vision_width)
    assert shapes["model.visual.patch_embed.proj.weight"] == (vision_width, 3, 2, 16, 16)
    assert shapes["model.visual.pos_embed.weight"] == (2304, vision_width)
    assert shapes["model.visual.merger.linear_fc2.weight"] == (width, 4 * vision_width)
    assert len(getattr(visual, "deepstack_merger_list", ())) == len(deep)
    assert config.vision_config.deepstack_visual_indexes == deep
    fields = config.get_text_config().to_dict()
    rope = {"rope_theta": fields.get("rope_theta"), **(fields.get("rope_parameters") or fields["rope_scaling"])}
    theta, sections, share = (5e6, [24, 20, 20], 1.0) if not of_values else (1e7, [11, 11, 10], 0.25)
    assert rope["rope_theta"] == theta
    assert (rope["mrope_section"], rope.get("partial_rotary_factor", 1.0)) == (sections, share)
    assert rope["mrope_interleaved"]


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
