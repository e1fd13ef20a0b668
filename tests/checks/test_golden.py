"""The golden record of the embedded model: healthy models of every dtype and release give it, broken ones do not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pytest_qvl.checks import AdapterPolicy, golden_record
from pytest_qvl.checks.golden import TENSOR_FLOAT_STEP, rounding_step
from pytest_qvl.checks.support.golden_data import GOLDEN_FILE, PROBES, RESIZED, Golden, drawn, image, recipe_of
from pytest_qvl.checks.support.image_oracle import BICUBIC, STEPS_IN_8_BITS, resized
from pytest_qvl.evidence import CannotJudge, CheckFailed
from pytest_qvl.faults.case import load
from pytest_qvl.faults.matrix.random_models import random_model
from pytest_qvl.faults.subject import Subject
from pytest_qvl.faults.tools import attribute, values
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.families import FAMILIES
from pytest_qvl.models.sources.embedded import FIRST, embedded_model_dir
from pytest_qvl.models.sources.processors import load_processor
from pytest_qvl.models.sources.synthetic_processor import processor_for

OTHERS = sorted(row.embedded for row in FAMILIES.values() if row.embedded not in ("", FIRST) and row.installed)


@pytest.fixture(scope="module")
def model(fresh_model: Any) -> Any:
    """NF4 in bfloat16, whose limits are the widest; shared: whoever damages it puts it back."""
    return fresh_model(dtype="bfloat16")


@pytest.fixture
def own(tiny_dir: Path) -> Any:
    """A processor to damage."""
    return load_processor(tiny_dir)


def refused(model: Any, processor: Any) -> str:
    with pytest.raises(CheckFailed) as caught:
        golden_record(model, processor)
    return str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "quantized"),
    [
        ("float32", True),
        ("float16", False),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [("float16", True), ("bfloat16", False)]),
        pytest.param("float32", False, marks=pytest.mark.slow),
    ],
)
def test_a_healthy_model_stays_at_half_of_each_limit(
    fresh_model: Any, processor: Any, dtype: str, quantized: bool
) -> None:
    evidence = golden_record(fresh_model(dtype=dtype, quantized=quantized), processor)
    assert max(figure.utilisation for figure in evidence.figures if "drift" in figure.name) < 0.5
    assert len(evidence.table.rows) == 11


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_embedded_models_have_a_record_of_their_own(name: str, dtype: str, quantized: bool) -> None:
    subject = Subject.of(f"embedded:{name}", dtype=dtype)
    evidence = golden_record(load(subject=subject, quantized=quantized, lora=None), processor_for(subject.source))
    assert max(figure.utilisation for figure in evidence.figures if "drift" in figure.name) < 0.5
    assert len(evidence.table.rows) == 11


@pytest.mark.parametrize("name", OTHERS)
def test_images_of_other_embedded_models_have_whole_visual_tokens(name: str) -> None:
    golden = Golden.read(embedded_model_dir(name))
    assert golden is not None
    assert [each["size"] for each in golden.images] == [[160, 128], [96, 64], [64, 96], list(RESIZED)]
    assert [each["grid"] for each in golden.images][:3] == [[1, 8, 10], [1, 4, 6], [1, 6, 4]]


def test_an_adapter_is_off_and_stays_as_it_was(fresh_model: Any, processor: Any) -> None:
    model = fresh_model(dtype="bfloat16", lora={"use_dora": True, "init_lora_weights": False})
    inputs = {"input_ids": torch.tensor([[1, 2, 3]])}
    with torch.no_grad():
        before = model(**inputs).logits
        assert golden_record(model, processor).ok
        assert torch.equal(model(**inputs).logits, before)


def test_the_first_module_that_differs_is_named(model: Any, processor: Any) -> None:
    parts = anatomy(model)
    with values(parts.blocks[1].mlp.down_proj.weight, lambda weight: weight * 2):
        message = refused(model, processor)
    assert "the output of model.visual is not what verified releases gave" in message
    assert "model.visual.blocks.1 is the first that differs" in message
    with values(parts.lm_head.weight, lambda weight: weight.roll(1, 0)):
        assert "lm_head is the first that differs" in refused(model, processor)


def test_windows_and_positions_of_a_broken_library(model: Any, processor: Any) -> None:
    parts = anatomy(model)
    tower: Any = parts.vision_tower
    with attribute(tower, "fullatt_block_indexes", [0, 1, 2, 3]):
        assert "model.visual.blocks.0 is the first that differs" in refused(model, processor)
    original = parts.core.get_rope_index

    def one_more(*args: Any, **kwargs: Any) -> Any:
        positions, deltas = original(*args, **kwargs)
        positions[2, :, 5:] += 1
        return positions, deltas

    with attribute(parts.core, "get_rope_index", one_more):
        assert "M-RoPE positions are not those of verified releases: 36 of 'one image', first w of" in refused(
            model, processor
        )


def test_a_processor_of_other_files_is_told_from_the_model(model: Any, own: Any) -> None:
    own.image_processor.image_mean = [0.5, 0.5, 0.5]
    message = refused(model, own)
    assert "the processor makes other pixel_values than verified releases" in message
    assert "is the first that differs" not in message
    own.chat_template = "hello" + own.chat_template
    assert "the token ids of 'one image' (first other one at place 0)" in refused(model, own)


def test_other_quantizations_are_judged_as_far_as_they_are_recorded(fresh_model: Any, processor: Any) -> None:
    evidence = golden_record(fresh_model(bnb_4bit_use_double_quant=False), processor)
    assert any(note.startswith("logits are not judged") for note in evidence.notes)
    assert [row[0] for row in evidence.table.rows][-1] == "model.visual"


def test_weights_that_are_meant_to_be_others_are_not_judged(fresh_model: Any, model: Any, processor: Any) -> None:
    biased = fresh_model(lora={"bias": "lora_only"})
    with pytest.raises(CannotJudge, match="biases of the base model are trained with the adapter"):
        golden_record(biased, processor)
    block: Any = anatomy(model).blocks[0]
    block.requires_grad_(True)
    try:
        with pytest.raises(CannotJudge, match="as the policy names them"):
            golden_record(model, processor, AdapterPolicy.parse("language, vision:full"))
    finally:
        block.requires_grad_(False)


def test_a_model_without_a_record_is_not_judged(processor: Any) -> None:
    other = random_model("qwen2_5_vl", seed=0, dtype=torch.float32, quantization_config=None)
    with pytest.raises(CannotJudge, match=r"no golden record \(qvl_golden.json\) lies beside this checkpoint"):
        golden_record(other, processor)


def test_the_record_is_small_and_read_as_it_was_written(tiny_dir: Path, tmp_path: Path) -> None:
    assert (tiny_dir / GOLDEN_FILE).stat().st_size < 200_000
    golden = Golden.read(tiny_dir)
    assert golden is not None
    golden.write(tmp_path)
    assert json.loads((tmp_path / GOLDEN_FILE).read_text()) == json.loads((tiny_dir / GOLDEN_FILE).read_text())
    releases = {each["transformers"] for each in [golden.recorded_with, *golden.confirmed_with]}
    assert {"4.57.6", "5.17.0", "5.24.0"} <= releases


def test_images_have_whole_visual_tokens_and_several_windows(model: Any) -> None:
    recipe = recipe_of(anatomy(model))
    step = recipe.patch * recipe.merge
    assert all(width % step == height % step == 0 for probe in PROBES for width, height in probe.sizes(recipe))
    assert max(PROBES[0].sizes(recipe)[0]) > anatomy(model).config.vision_config.window_size
    assert drawn(140, 112)[3, 5].tolist() == [218, 0, 92]


def test_the_step_is_that_of_the_coarsest_dtype_before_a_module(fresh_model: Any, model: Any) -> None:
    assert rounding_step(anatomy(model), "lm_head") == 2**-7
    mixed = anatomy(fresh_model(bnb_4bit_compute_dtype=torch.float16))
    assert rounding_step(mixed, "lm_head") == 2**-10
    assert rounding_step(mixed, "model.visual") == pytest.approx(2**-23 * (1176 / 6) ** 0.5)
    assert TENSOR_FLOAT_STEP == 2**-10


def test_either_order_of_passes_gives_the_resized_image(model: Any) -> None:
    """Pillow resizes columns or rows first, by release; torchvision in its own order. Nothing is cut off at 0 or 255."""
    recipe = recipe_of(anatomy(model))
    pixels = np.asarray(image(*RESIZED))
    size = recipe.size(*pixels.shape[:2])
    made = [resized(pixels, size, replace(BICUBIC, passes=passes)) for passes in ("columns", "rows", "once")]
    apart = [np.abs(each.astype(float) - made[0].astype(float)).max() for each in made]
    assert max(apart) <= STEPS_IN_8_BITS
    assert made[0].min() > 0
    assert made[0].max() < 255
