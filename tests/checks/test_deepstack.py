"""DeepStack's features arrive behind their layers and at their places, on random Qwen3-VL models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_qvl.checks import CheckFailed, QuantizationPolicy, feature_scatter
from pytest_qvl.faults.case import Case, apply, load, lora_config
from pytest_qvl.faults.catalogue import catalogue, find
from pytest_qvl.faults.matrix.random_models import random_config, random_model
from pytest_qvl.faults.subject import embedded
from pytest_qvl.faults.tools import attribute
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.quantized import usual_quantization
from pytest_qvl.samples import scenes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")
FAULTS = [n for n, f in catalogue().items() if "DeepStack" in f.requires and f.check == "feature_scatter"]
# Those of layer_arithmetic that move or lose features are seen here as well.
OTHERS = {
    "deepstack-lost": "the feature of DeepStack's merger 0 is due and nothing is added",
    "deepstack-exchanged": "the feature of DeepStack's merger 0 is due and what merger 1 made of visual token 0",
    "deepstack-added-twice": "the feature of DeepStack's merger 0 is due and something else is added",
}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def case(processor: Any, request: pytest.FixtureRequest) -> Iterator[Case]:
    """A random Qwen3-VL with two mergers, and rows with one image, several and none."""
    from peft import get_peft_model

    dtype = request.param
    base = random_model("qwen3_vl", seed=0, dtype=getattr(torch, dtype), quantization_config=_usual(dtype))
    unrecorded: Any = None
    rows, policy = scenes(3, 1, ["side", "text", "nth_colour"]), QuantizationPolicy(compute_dtype=dtype)
    rows = [sample.noise(number) for number, sample in enumerate(rows)]
    config = lora_config()
    with attribute(processor.image_processor, "patch_size", base.config.vision_config.patch_size):
        model = get_peft_model(base, config).eval()
        yield Case(model, processor, config, policy, rows, rows, unrecorded, load, embedded(dtype))


def _usual(dtype: str) -> Any:
    return usual_quantization(getattr(torch, dtype))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_healthy_model_passes_and_every_layer_was_judged(case: Case, side: Any) -> None:
    evidence = feature_scatter(case.model, case.batch(padding_side=side))
    assert evidence.notes == ()
    names = [figure.name for figure in evidence.figures]
    indexes = anatomy(case.model).config.vision_config.deepstack_visual_indexes
    for number, index in enumerate(indexes):
        assert f"DeepStack's merger {number} is given what block {index} returned" in names
        assert f"tokens behind layer {number} without their DeepStack features, or with others" in names


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(case: Case, name: str) -> None:
    assert not find(name).missing(case)
    with apply(name, case) as damaged, pytest.raises(CheckFailed) as failure:
        feature_scatter(damaged.model, damaged.batch())
    for words in find(name).words():
        assert words in str(failure.value)


@pytest.mark.parametrize("name", OTHERS)
def test_faults_of_the_arithmetic_are_seen_too(case: Case, name: str) -> None:
    with apply(name, case) as damaged, pytest.raises(CheckFailed, match=OTHERS[name]):
        feature_scatter(damaged.model, damaged.batch())


def test_features_added_at_text_are_named(case: Case) -> None:
    backbone: Any = anatomy(case.model).language_backbone
    add = backbone._deepstack_process

    def everywhere(hidden: torch.Tensor, places: torch.Tensor, features: torch.Tensor) -> Any:
        return add(hidden, places, features) + (~places[..., None]).to(hidden)

    with attribute(backbone, "_deepstack_process", everywhere), pytest.raises(CheckFailed, match="nothing is due and"):
        feature_scatter(case.model, case.batch())


def _features_at_one_layer_later(add: Callable[..., Any]) -> Callable[..., Any]:
    waiting: list[torch.Tensor] = []

    def later(hidden: torch.Tensor, places: torch.Tensor, features: torch.Tensor) -> Any:
        waiting.append(features)
        return add(hidden, places, waiting.pop(0)) if len(waiting) > 1 else hidden

    return later


def test_features_behind_a_later_layer_are_named(case: Case) -> None:
    backbone: Any = anatomy(case.model).language_backbone
    later = _features_at_one_layer_later(backbone._deepstack_process)
    with attribute(backbone, "_deepstack_process", later), pytest.raises(CheckFailed) as failure:
        feature_scatter(case.model, case.batch())
    assert "merger 0 is due and nothing is added" in str(failure.value)
    assert "merger 1 is due and what merger 0 made of visual token" in str(failure.value)


def test_more_mergers_than_layers_is_named(processor: Any) -> None:
    from transformers import AutoModelForImageTextToText

    config = random_config("qwen3_vl", layers=2, vision={"deepstack_visual_indexes": [0, 1, 2]})
    model = AutoModelForImageTextToText.from_config(config).float().eval()
    rows = [sample.noise(0) for sample in scenes(3, 1, ["side"])]
    unrecorded: Any = None
    with attribute(processor.image_processor, "patch_size", config.vision_config.patch_size):
        healthy = Case(model, processor, None, unrecorded, rows, rows, unrecorded, load, embedded("float32"))
        with pytest.raises(CheckFailed, match="belong behind layer 2, and the backbone has 2 layers"):
            feature_scatter(model, healthy.batch())


def test_a_family_without_deepstack_is_not_asked(processor: Any) -> None:
    model = random_model("qwen2_vl", seed=0, dtype=torch.float32, quantization_config=None)
    rows = [sample.noise(0) for sample in scenes(3, 1, ["side"])]
    unrecorded: Any = None
    case = Case(model, processor, None, unrecorded, rows, rows, unrecorded, load, embedded("float32"))
    with attribute(processor.image_processor, "patch_size", model.config.vision_config.patch_size):
        evidence = feature_scatter(model, case.batch())
    assert not any("DeepStack" in figure.name for figure in evidence.figures)
