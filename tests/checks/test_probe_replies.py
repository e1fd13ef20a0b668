"""What the report shows of probes: replies with and without the adapter, and the grid of visual tokens."""

from __future__ import annotations

import base64
import io

import pytest
import torch
from PIL import Image

from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.samples import scenes
from pytest_qvl.session.probe_replies import (
    ADAPTED,
    FULL,
    IMAGES,
    NF4,
    SHOWN,
    ProbeReplies,
    chosen,
    data_uri,
    replies_of,
    with_grid,
)


@pytest.fixture(scope="module")
def samples():
    return scenes(0, 2)


def test_probes_are_the_first_of_each_skill(samples):
    shown = chosen(samples)
    assert len(shown) == SHOWN
    assert len({sample.skill for sample in shown}) == SHOWN
    assert all(sample.images for sample in shown)
    own = [sample for sample in samples if sample.skill == shown[0].skill]
    assert chosen(own) == own[:SHOWN]


def test_a_square_of_the_grid_is_a_visual_token(processor):
    image = Image.new("RGB", (84, 56), "black")
    _, rows, columns = processor.image_processor(images=[image], return_tensors="pt")["image_grid_thw"][0].tolist()
    merge = processor.image_processor.merge_size
    shown = with_grid(image, processor)
    bright = [x for x in range(shown.width) if shown.getpixel((x, 3))[0] > 100]
    down = [y for y in range(shown.height) if shown.getpixel((3, y))[0] > 100]
    assert (len(bright), len(down)) == (columns // merge - 1, rows // merge - 1)
    assert max(shown.size) == 360


def test_images_are_inside_of_the_page():
    drawn = data_uri(Image.new("RGB", (40, 40), "red"))
    assert drawn.startswith("data:image/png;base64,")
    noise = Image.frombytes("RGB", (300, 300), bytes(torch.randint(256, (270_000,), dtype=torch.uint8).tolist()))
    photo = data_uri(noise)
    assert photo.startswith("data:image/jpeg;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(photo.partition(",")[2]))).size == (300, 300)


def test_replies_come_with_and_without_the_adapter_and_leave_the_model_alone(lora_model, processor, samples):
    probes, given = ProbeReplies(), {"qvl_processor": processor, "qvl_image_samples": samples}
    layers = [m for m in anatomy(lora_model).wrapped.modules() if hasattr(m, "lora_B")]
    kept = [layer.lora_B["default"].weight.detach().clone() for layer in layers]
    with torch.no_grad():
        for layer in layers:
            layer.lora_B["default"].weight.normal_(0, 1)
    try:
        probes.ask_full(lora_model, processor, samples)
        probes._ask("embedded on cpu", {"qvl_lora_model": lora_model, **given})
        healthy = replies_of(lora_model, processor, chosen(samples), adapted=False)
    finally:
        with torch.no_grad():
            for layer, before in zip(layers, kept, strict=True):
                layer.lora_B["default"].weight.copy_(before)
    assert len(probes.found) == SHOWN
    for sample, seen in zip(chosen(samples), probes.found, strict=True):
        assert list(seen.replies) == [FULL, NF4, ADAPTED]
        assert seen.replies[NF4] == seen.replies[FULL] == healthy[sample.id]
        assert seen.images and seen.answer == sample.answer
    assert any(seen.replies[ADAPTED] != seen.replies[NF4] for seen in probes.found)
    assert not any(layer._disable_adapters for layer in layers)


def test_a_model_that_cannot_reply_says_so_in_the_report(processor, samples):
    probes, model = ProbeReplies(), torch.nn.Linear(2, 2)
    probes.ask_full(model, processor, samples)
    assert probes.found == ()
    probes._ask("embedded on cpu", {"qvl_lora_model": model, "qvl_processor": processor, "qvl_image_samples": samples})
    assert len(probes.found) == SHOWN
    for seen in probes.found:
        assert seen.images and seen.replies == {}
        assert list(seen.failed) == [FULL, NF4, ADAPTED]
        assert all(": " in why and "\n" not in why for why in seen.failed.values())


def test_images_that_cannot_be_drawn_are_said(samples):
    probes = ProbeReplies()
    probes._ask("t", {"qvl_lora_model": None, "qvl_processor": None, "qvl_image_samples": samples})
    assert set(probes.found[0].failed) == {NF4, ADAPTED, IMAGES}  # nobody asked in full precision
    assert probes.found[0].images == ()
