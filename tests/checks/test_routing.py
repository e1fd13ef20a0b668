"""The routing checks against healthy models, damaged models and batches that were put together wrongly."""

from __future__ import annotations

import random
import re
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image, ImageOps

from pytest_qvl.checks import (
    causality,
    feature_scatter,
    image_isolation,
    malformed_inputs,
    picture_pairing,
    placeholder_counts,
    validate_batch,
    visual_token_order,
)
from pytest_qvl.checks.positions import decode_positions, mrope_positions
from pytest_qvl.checks.support.mrope import VisionIds, mrope_oracle
from pytest_qvl.evidence import CannotJudge, CheckFailed
from pytest_qvl.faults.case import Case, apply
from pytest_qvl.faults.catalogue import find
from pytest_qvl.faults.tools import before
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.taps import embeddings_changed, features_replaced
from pytest_qvl.samples import Sample, make_batch, scenes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Batch = dict[str, torch.Tensor]
TRANSFORMERS_4 = transformers.__version__.startswith("4.")
BATCH_CHECKS = (placeholder_counts, feature_scatter, visual_token_order, causality, malformed_inputs)


@pytest.fixture(scope="module")
def model(fresh_model: Any) -> Any:
    return fresh_model(quantized=False)


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height))


def sample(name: str, *images: Image.Image, question: str = "What is it?") -> Sample:
    return Sample(images, question, "red", "colour", name)


# Equal sizes side by side (rows 0 and 2), different ones, a row without a picture, rows of unequal length.
SAMPLES = (
    sample("two", picture(0, 84, 112), picture(1, 84, 112), question="What colour is the first?"),
    sample("none", question="Say blue."),
    sample("one", picture(2, 84, 112), question="What shape is it?"),
    sample("mixed", picture(3, 112, 56), picture(4, 56, 112), picture(5, 84, 84), question="How many?"),
)
IMAGES_PER_ROW = (2, 0, 1, 3)
VISUAL = (12, 12, 12, 8, 8, 9)


@pytest.fixture(params=["left", "right"])
def batch(request: pytest.FixtureRequest, processor: Any) -> Batch:
    return make_batch(processor, SAMPLES, padding_side=request.param)


def rows_of(batch: Batch, image: int) -> slice:
    """The patch rows of one picture."""
    sizes = batch["image_grid_thw"].prod(dim=1).tolist()
    return slice(sum(sizes[:image]), sum(sizes[: image + 1]))


def first_placeholder(model: Any, batch: Batch, image: int) -> tuple[int, int]:
    places = (batch["input_ids"] == anatomy(model).image_token_id).nonzero()
    row, token = places[sum(VISUAL[:image])].tolist()
    return row, token


def figures(evidence: Any) -> dict[str, Any]:
    return {figure.name: figure.value for figure in evidence.figures}


# Healthy models


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_healthy_quantized_model_with_trained_adapter(fresh_model: Any, processor: Any, dtype: str) -> None:
    model = fresh_model(dtype=dtype, lora={"init_lora_weights": False})
    samples = [each.noise(1) for each in scenes(1, 1, ("nth_colour", "text", "count"))]
    for side in ("left", "right"):
        batch = make_batch(processor, samples, padding_side=side, answers=True)
        for check in BATCH_CHECKS:
            assert check(model, batch).ok
        assert picture_pairing(model, processor, samples, batch).ok
        assert image_isolation(model, processor, samples, padding_side=side).ok


@pytest.mark.parametrize("seed", range(5))
def test_rendered_scenes(model: Any, processor: Any, seed: int) -> None:
    samples = scenes(seed, 1)
    batch = make_batch(processor, samples)
    for check in (placeholder_counts, visual_token_order, causality, malformed_inputs):
        assert check(model, batch).ok
    assert picture_pairing(model, processor, samples, batch).ok


def test_figures_count_what_was_looked_at(model: Any, processor: Any, batch: Batch) -> None:
    assert figures(placeholder_counts(model, batch)) == {"placeholders": sum(VISUAL), "images": 6}
    assert figures(feature_scatter(model, batch))["visual tokens that differ from each other"] == sum(VISUAL)
    assert figures(visual_token_order(model, batch))["runs of the vision tower"] == 2 * 6 + 1
    assert figures(causality(model, batch, probes=4))["visual tokens changed"] == 4
    assert figures(picture_pairing(model, processor, SAMPLES, batch))["images"] == 6


def test_a_cast_of_the_pixels_is_no_difference(model: Any, processor: Any) -> None:
    batch = make_batch(processor, SAMPLES, pixel_dtype=torch.bfloat16)
    assert picture_pairing(model, processor, SAMPLES, batch).ok


def test_the_model_is_left_as_it_was(lora_model: Any, processor: Any) -> None:
    parts = anatomy(lora_model)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lora_model.modules()]
    forwards = ["forward" in vars(block) for block in parts.blocks]
    batch = make_batch(processor, SAMPLES)
    lora_model.train()
    try:
        for check in BATCH_CHECKS:
            check(lora_model, batch)
        image_isolation(lora_model, processor, SAMPLES[:2])
        assert lora_model.training
    finally:
        lora_model.eval()
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lora_model.modules()] == hooks
    assert ["forward" in vars(block) for block in parts.blocks] == forwards
    assert parts.core.rope_deltas is None


# Routing inside the model


@contextmanager
def placeholder_mask_changed(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Let the model scatter by another image mask than its own, through its own code."""
    core = anatomy(model).core
    own = core.get_placeholder_mask

    def changed(*args: Any, **kwargs: Any) -> Any:
        image, video = own(*args, **kwargs)
        return change(image), video

    core.get_placeholder_mask = changed
    try:
        yield
    finally:
        del core.get_placeholder_mask


def test_scatter_off_by_one(model: Any, batch: Batch) -> None:
    row, token = first_placeholder(model, batch, 0)
    with placeholder_mask_changed(model, lambda mask: mask.roll(1, dims=1)):
        with pytest.raises(CheckFailed) as failure:
            feature_scatter(model, batch)
        assert str(failure.value).startswith(
            f"row {row}, token {token} (image 0, visual token 0) still holds the placeholder's own text "
            f"embedding; {sum(VISUAL)} tokens in 3 rows are wrong"
        )
        assert f"row {row}, token {token + VISUAL[0]} (text) holds visual token 11 of row 0, image 0" in str(
            failure.value
        )
        with pytest.raises(CheckFailed, match=r"changing visual token 0 of row 0, image 0 moved .*own placeholder"):
            causality(model, batch)
        # The tower itself is sound.
        assert visual_token_order(model, batch).ok


def test_visual_tokens_reordered_inside_a_picture_after_the_tower(model: Any, batch: Batch) -> None:
    parts = anatomy(model)
    row, token = first_placeholder(model, batch, 2)

    def exchanged(embeddings: torch.Tensor) -> torch.Tensor:
        embeddings = embeddings.clone()
        embeddings[row, [token, token + 1]] = embeddings[row, [token + 1, token]]
        return embeddings

    with (
        embeddings_changed(parts, exchanged),
        pytest.raises(
            CheckFailed,
            match=rf"row {row}, token {token} \(image 0, visual token 0\) holds visual token 1 of row 2, "
            r"image 0; 2 tokens in 1 rows are wrong",
        ),
    ):
        feature_scatter(model, batch)


def test_pixels_damaged_inside_of_the_model(model: Any, processor: Any, batch: Batch) -> None:
    """Alike for one row and for many, so that nothing compares a batch with its rows and finds it."""
    nothing: Any = None
    case = Case(model, processor, nothing, nothing, [], [], nothing, nothing)
    with apply("pixels-kept-in-8-bits", case) as damaged, pytest.raises(CheckFailed) as failure:
        feature_scatter(damaged.model, batch)
    said = str(failure.value)
    assert all(words in said for words in find("pixels-kept-in-8-bits").words()), said
    assert "visual token 0 of row 0, image 0 first; 244 of 244 patches differ, by 0." in said


def test_one_bit_of_one_pixel_is_seen(model: Any, batch: Batch) -> None:
    def nudged(_module: Any, args: Any, kwargs: Any) -> Any:
        pixels = args[0].clone()
        pixels.view(torch.int32)[50, 7] ^= 1
        return (pixels, *args[1:]), kwargs

    with before([anatomy(model).vision_tower], nudged), pytest.raises(CheckFailed, match="1 of 244 patches differ"):
        feature_scatter(model, batch)


def test_text_embedding_exchanged(model: Any, batch: Batch) -> None:
    row, token = first_placeholder(model, batch, 0)

    def nudged(embeddings: torch.Tensor) -> torch.Tensor:
        embeddings = embeddings.clone()
        embeddings[row, token - 2, 5] *= 1.01
        return embeddings

    with (
        embeddings_changed(anatomy(model), nudged),
        pytest.raises(CheckFailed, match=rf"row {row}, token {token - 2} \(text\) holds neither"),
    ):
        feature_scatter(model, batch)


@pytest.mark.parametrize(
    ("order", "sentence"),
    [
        ([1, 0, 2], "visual token 0 of row 0, image 0 is made of .* visual token 1 of row 0, image 0; 2 of"),
        ([0, 1, 12], "visual token 2 of row 0, image 0 is made of .* visual token 0 of row 0, image 1; 2 of"),
    ],
    ids=["inside a picture", "across pictures"],
)
def test_visual_tokens_reordered_by_the_tower(model: Any, batch: Batch, order: list[int], sentence: str) -> None:
    def reordered(features: torch.Tensor) -> torch.Tensor:
        index = torch.arange(len(features))
        index[torch.tensor(order)] = torch.arange(3)
        index[torch.arange(3)] = torch.tensor(order)
        return features[index]

    with features_replaced(anatomy(model), reordered):
        with pytest.raises(CheckFailed, match=sentence):
            visual_token_order(model, batch)
        # What the tower put out does arrive; only its order is wrong.
        assert feature_scatter(model, batch).ok


def test_window_order_left_as_it_is(model: Any, batch: Batch) -> None:
    """The tower sorts patches into windows; unsorted, the language model would see them in window order."""
    parts = anatomy(model)
    merged: list[torch.Tensor] = []
    handle = parts.merger.register_forward_hook(lambda _module, _args, output: merged.append(output))
    try:
        with (
            features_replaced(parts, lambda _features: merged[-1]),
            pytest.raises(CheckFailed, match=r"visual token \d+ of row 0, image 0 is made of the patches of"),
        ):
            visual_token_order(model, batch)
    finally:
        handle.remove()


def test_patches_merged_across_groups(model: Any, batch: Batch) -> None:
    def exchanged(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[[0, 4]] = output[[4, 0]]
        return output

    handle = anatomy(model).patch_embed.register_forward_hook(exchanged)
    try:
        with pytest.raises(CheckFailed, match=r"visual token 0 of row 0, image 0 is made of several patch groups"):
            visual_token_order(model, batch)
    finally:
        handle.remove()


def test_a_tower_that_ignores_its_pictures(model: Any, processor: Any, batch: Batch) -> None:
    with features_replaced(anatomy(model), torch.zeros_like):
        with pytest.raises(CheckFailed, match=r"visual token 0 of row 0, image 0 depends on no patch; 61 of 61"):
            visual_token_order(model, batch)
        with pytest.raises(CheckFailed, match=r"changing row 0, image 0 \(sample 'two'\) .*moves no output"):
            image_isolation(model, processor, SAMPLES)
        with pytest.raises(CannotJudge, match="only 1 of 61 visual tokens differ"):
            feature_scatter(model, batch)


def test_attention_that_sees_the_future(model: Any, processor: Any, batch: Batch) -> None:
    length = batch["input_ids"].shape[1]

    def bidirectional(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        open_mask = torch.zeros(len(SAMPLES), 1, length, length)
        return args, {**kwargs, "attention_mask": open_mask}

    handle = anatomy(model).language_backbone.register_forward_pre_hook(bidirectional, with_kwargs=True)
    try:
        message = r"changing visual token 0 of row 0, image 0 moved row 0, token \d+ \(text\): .*causal"
        with pytest.raises(CheckFailed, match=message):
            causality(model, batch)
        with pytest.raises(CheckFailed, match=r"changing row 0, image 0 \(sample 'two'\) moved row 0, .*causal"):
            image_isolation(model, processor, SAMPLES)
    finally:
        handle.remove()


def test_rows_that_mix(model: Any, processor: Any, batch: Batch) -> None:
    def mixed(_module: Any, _args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden + hidden.mean(dim=0, keepdim=True)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = anatomy(model).language_backbone.layers[0].register_forward_hook(mixed)
    try:
        message = r"moved row 1, token \d+ \(text\): it must move no output of another row"
        with pytest.raises(CheckFailed, match=message):
            causality(model, batch)
        with pytest.raises(CheckFailed, match=message):
            image_isolation(model, processor, SAMPLES)
    finally:
        handle.remove()


def test_vision_attention_across_pictures(model: Any, processor: Any) -> None:
    """Boundaries that never reach the attention let the pictures of a batch read each other."""

    def without_boundaries(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        ends = kwargs["cu_seqlens"][[0, -1]]
        return args, {**kwargs, "cu_seqlens": ends, "max_seqlen": int(ends[1])}

    handles = [block.register_forward_pre_hook(without_boundaries, with_kwargs=True) for block in anatomy(model).blocks]
    try:
        with pytest.raises(
            CheckFailed,
            match=r"changing row 0, image 0 \(sample 'two'\) moved row 0, token \d+ "
            r"\(image 1, visual token 0\): .*does vision attention mix images",
        ):
            image_isolation(model, processor, SAMPLES)
    finally:
        for handle in handles:
            handle.remove()


def test_a_model_that_does_not_repeat_itself(model: Any, batch: Batch) -> None:
    def noisy(embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings + 0.01 * torch.randn_like(embeddings)

    with embeddings_changed(anatomy(model), noisy), pytest.raises(CannotJudge, match="twice differs bitwise"):
        causality(model, batch)


# Pictures and placeholders that do not belong together


def test_sound_batches_have_no_problem(model: Any, batch: Batch) -> None:
    assert validate_batch(model, batch) == []


def test_placeholder_missing(model: Any, batch: Batch) -> None:
    row, token = first_placeholder(model, batch, 2)
    batch["input_ids"][row, token] = batch["input_ids"][row, token - 2]
    message = (
        rf"row {row}, image 0, tokens {token + 1} to {token + 11}: 11 placeholders, but grid 1x8x6 of image "
        r"2 of the batch makes 12 visual tokens; the batch has 60 placeholders for 61 visual tokens "
        r"\[placeholders 60 \(== 61\)\]"
    )
    with pytest.raises(CheckFailed, match=message):
        placeholder_counts(model, batch)
    with pytest.raises(ValueError, match=r"malformed: .*11 placeholders"):
        feature_scatter(model, batch)


def test_placeholder_too_many(model: Any, batch: Batch) -> None:
    row, token = first_placeholder(model, batch, 2)
    batch["input_ids"][row, token - 1] = batch["input_ids"][row, token]
    with pytest.raises(CheckFailed, match=rf"row {row}, image 0, tokens {token - 1} to {token + 11}: 13 placeholders"):
        placeholder_counts(model, batch)


def test_placeholders_cut_off_with_their_pixels_left(model: Any, processor: Any) -> None:
    batch = make_batch(processor, SAMPLES, padding_side="right")
    cut = first_placeholder(model, batch, 5)[1] + 4
    aligned = {"input_ids", "attention_mask", "mm_token_type_ids"}
    batch = {name: value[:, :cut] if name in aligned else value for name, value in batch.items()}
    with pytest.raises(CheckFailed, match=r"row 3, image 2, tokens .*: 4 placeholders, but grid 1x6x6 of image 5"):
        placeholder_counts(model, batch)


def test_one_field_cut_without_the_others(model: Any, batch: Batch) -> None:
    batch["attention_mask"] = batch["attention_mask"][:, :-1]
    with pytest.raises(CheckFailed, match=r"attention_mask has shape \(4, \d+\), input_ids \(4, \d+\)"):
        placeholder_counts(model, batch)


def test_placeholders_without_pixels(model: Any, batch: Batch) -> None:
    row, token = first_placeholder(model, batch, 0)
    del batch["pixel_values"], batch["image_grid_thw"]
    with torch.no_grad():
        model(**batch)  # silent: this is what makes the check necessary
    message = rf"row {row}, token {token}: 12 placeholders \(61 in all\) but no pixel_values"
    with pytest.raises(CheckFailed, match=message):
        placeholder_counts(model, batch)


def test_pixels_without_placeholders(model: Any, batch: Batch) -> None:
    places = batch["input_ids"] == anatomy(model).image_token_id
    batch["input_ids"][places] = batch["input_ids"][1, -2]
    with pytest.raises(CheckFailed, match=r"images 0 to 5 of the batch: pixels but no placeholders; .* 0 placehold"):
        placeholder_counts(model, batch)


def test_pixels_of_one_picture_left_over(model: Any, batch: Batch) -> None:
    row, token = first_placeholder(model, batch, 5)
    batch["input_ids"][row, token : token + VISUAL[5]] = batch["input_ids"][row, token - 2]
    with pytest.raises(CheckFailed, match=r"image 5 of the batch: pixels but no placeholders"):
        placeholder_counts(model, batch)


def test_grid_missing_or_promising_other_pixels(model: Any, batch: Batch) -> None:
    pixels = batch["pixel_values"]
    lost = {name: value for name, value in batch.items() if name != "image_grid_thw"}
    assert validate_batch(model, lost)[0] == f"pixel_values has {len(pixels)} patches but there is no image_grid_thw"
    assert validate_batch(model, {**batch, "pixel_values": pixels[:-4]}) == [
        f"pixel_values has {len(pixels) - 4} patches, the grids of the batch promise {len(pixels)}"
    ]
    odd = batch["image_grid_thw"].clone()
    odd[5] = torch.tensor([1, 4, 9])
    assert "image 5 of the batch: grid 1x4x9 is no multiple of the merge size 2" in validate_batch(
        model, {**batch, "image_grid_thw": odd}
    )


def test_placeholders_that_are_hidden(model: Any, batch: Batch) -> None:
    row, token = first_placeholder(model, batch, 2)
    batch["attention_mask"][row, token] = 0
    with pytest.raises(CheckFailed, match=rf"row {row}, token {token}: a placeholder that the attention_mask hides"):
        placeholder_counts(model, batch)


def test_grids_in_another_order(model: Any, processor: Any, batch: Batch) -> None:
    batch["image_grid_thw"] = batch["image_grid_thw"][[0, 1, 3, 2, 4, 5]]
    with pytest.raises(CheckFailed, match=r"row 2, image 0, .*: 12 placeholders, but grid 1x4x8 of image 2"):
        placeholder_counts(model, batch)
    with pytest.raises(CheckFailed, match=r"row 2, image 0 \(sample 'one'\): grid 1x4x8, but alone it makes 1x8x6"):
        picture_pairing(model, processor, SAMPLES, batch)


def test_grid_transposed(model: Any, processor: Any, batch: Batch) -> None:
    """Fits the placeholders, raises nothing."""
    batch["image_grid_thw"][2] = torch.tensor([1, 6, 8])
    assert validate_batch(model, batch) == []
    with torch.no_grad():
        model(**batch)
    message = (
        r"row 2, image 0 \(sample 'one'\): grid 1x6x8, but alone it makes 1x8x6 "
        r"\(height and width are transposed\) \[wrong grids 1"
    )
    with pytest.raises(CheckFailed, match=message):
        picture_pairing(model, processor, SAMPLES, batch)


def test_pictures_swapped_before_the_processor(model: Any, processor: Any) -> None:
    swapped = [replace(SAMPLES[0], images=SAMPLES[0].images[::-1]), *SAMPLES[1:]]
    batch = make_batch(processor, swapped)
    assert validate_batch(model, batch) == []
    message = (
        r"row 0, image 0 \(sample 'two'\): holds the pixels of row 0, image 1 \(sample 'two'\); "
        r"row 0, image 1 \(sample 'two'\): holds the pixels of row 0, image 0"
    )
    with pytest.raises(CheckFailed, match=message):
        picture_pairing(model, processor, SAMPLES, batch)


def test_pictures_of_different_sizes_swapped_before_the_processor(model: Any, processor: Any) -> None:
    wide, tall, square = SAMPLES[3].images
    batch = make_batch(processor, [*SAMPLES[:3], replace(SAMPLES[3], images=(tall, wide, square))])
    message = (
        r"(?s)row 3, image 0 \(sample 'mixed'\): grid 1x8x4, but alone it makes 1x4x8 .*"
        r"row 3, image 0 \(sample 'mixed'\): holds the pixels of row 3, image 1"
    )
    with pytest.raises(CheckFailed, match=message):
        picture_pairing(model, processor, SAMPLES, batch)


def test_pictures_swapped_in_pixel_values(model: Any, processor: Any, batch: Batch) -> None:
    one, other = rows_of(batch, 1), rows_of(batch, 2)
    pixels = batch["pixel_values"].clone()
    pixels[one], pixels[other] = batch["pixel_values"][other], batch["pixel_values"][one]
    batch["pixel_values"] = pixels
    message = r"row 0, image 1 \(sample 'two'\): holds the pixels of row 2, image 0 \(sample 'one'\)"
    with pytest.raises(CheckFailed, match=message):
        picture_pairing(model, processor, SAMPLES, batch)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_an_image_read_without_its_exif_orientation(model: Any, processor: Any, orientation: int) -> None:
    file = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(6, 84, 112).save(file, "PNG", exif=exif)
    stored = Image.open(file)
    shown = ImageOps.exif_transpose(stored)
    batch = make_batch(processor, [sample("lying", stored.convert("RGB"))])
    message = (
        rf"row 0, image 0 \(sample 'lying'\): lies as a file with EXIF orientation {orientation} stores it; turn images "
        r"as EXIF says \(PIL\.ImageOps\.exif_transpose\)"
    )
    with pytest.raises(CheckFailed, match=message):
        picture_pairing(model, processor, [sample("lying", shown.convert("RGB"))], batch)


def test_one_pixel_changed(model: Any, processor: Any, batch: Batch) -> None:
    batch["pixel_values"][rows_of(batch, 3).start + 7, 100] += 0.5
    with pytest.raises(CheckFailed, match=r"row 3, image 0 \(sample 'mixed'\): patch 7 differs .* by up to 0.5"):
        picture_pairing(model, processor, SAMPLES, batch)


def test_a_picture_that_reached_no_row(model: Any, processor: Any, batch: Batch) -> None:
    last = rows_of(batch, 5)
    batch["pixel_values"] = batch["pixel_values"][: last.start]
    batch["image_grid_thw"] = batch["image_grid_thw"][:5]
    with pytest.raises(CheckFailed, match=r"the batch has 5 images, its samples have 6"):
        picture_pairing(model, processor, SAMPLES, batch)


def test_rows_exchanged(model: Any, processor: Any) -> None:
    """The pictures stay, the texts go: rows of equal shape, so nothing else notices."""
    samples = (SAMPLES[2], sample("other", picture(9, 84, 112), question="How many?"))
    batch = make_batch(processor, samples)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in batch:
            batch[name] = batch[name].flip(0)
    assert validate_batch(model, batch) == []
    message = r"row 0 does not hold the question of sample 'one' \('What shape is it\?'\)"
    with pytest.raises(CheckFailed, match=message):
        picture_pairing(model, processor, samples, batch)


def test_a_picture_moved_to_another_row(model: Any, processor: Any) -> None:
    one, two = picture(7, 84, 84), picture(8, 56, 84)
    batch = make_batch(processor, [sample("a", one, two), sample("b")])
    with pytest.raises(CheckFailed, match=r"row 0 has 15 placeholders, the images of its sample 'a' make 9"):
        picture_pairing(model, processor, [sample("a", one), sample("b", two)], batch)


def test_model_without_its_count_check(model: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    core = anatomy(model).core

    def unchecked(input_ids: torch.Tensor, inputs_embeds: torch.Tensor, **_: Any) -> Any:
        masks = [input_ids == token for token in (core.config.image_token_id, core.config.video_token_id)]
        return tuple(mask.unsqueeze(-1).expand_as(inputs_embeds) for mask in masks)

    evidence = malformed_inputs(model, batch)
    assert [row[1] for row in evidence.table.rows][:4] == ["ValueError", "not asked", "not asked", "ValueError"]
    monkeypatch.setattr(core, "get_placeholder_mask", unchecked)
    with pytest.raises(
        CheckFailed, match="takes one placeholder too few and pixels without placeholders without an error"
    ):
        malformed_inputs(model, batch)


def test_a_placeholder_moved_to_another_row_leaves_the_total_right(model: Any, batch: Batch) -> None:
    """Transformers up to 5.2 says nothing to it; the batch's own validation has to."""
    name, said_by_model, said = malformed_inputs(model, batch).table.rows[-1]
    assert name == "one placeholder moved off its image"
    assert (said_by_model == "accepted") == (Version(transformers.__version__) < Version("5.3"))
    assert re.search(r"row \d, image \d.* placeholders, but grid", said)


def test_validation_that_counts_totals_only_is_caught(
    model: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def totals(_model: Any, inputs: Any) -> list[str]:
        grids = inputs.get("image_grid_thw")
        promised = 0 if grids is None else int(grids.prod(dim=1).sum()) // 4
        placed = int((inputs["input_ids"] == anatomy(model).image_token_id).sum())
        return [] if placed == promised else ["totals differ"]

    monkeypatch.setattr("pytest_qvl.checks.routing.validate_batch", totals)
    with pytest.raises(CheckFailed, match="validate_batch overlooks: one placeholder moved off its image"):
        malformed_inputs(model, batch)


# Pixels of another kind, types and prompts


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda pixels: pixels.to(torch.uint8), "pixel_values are uint8: the processor makes float32"),
        (lambda pixels: pixels.long(), "pixel_values are int64"),
        (lambda pixels: pixels.to(torch.float8_e4m3fn), "pixel_values are float8_e4m3fn"),
        (lambda pixels: (pixels + 2) * 60, "where the processor makes about -2.2 to 2.2: rescaling (1/255)"),
        (lambda pixels: pixels / pixels.new_tensor([[0.0]]), "values that are NaN or infinite, the first in patch 0"),
    ],
    ids=["uint8", "int64", "float8", "0 to 255", "infinite"],
)
def test_pixels_that_no_processor_makes(model: Any, processor: Any, batch: Batch, change: Any, says: str) -> None:
    """The model casts them without a word, and sees black."""
    batch["pixel_values"] = change(batch["pixel_values"])
    for check, arguments in ((placeholder_counts, (batch,)), (picture_pairing, (processor, SAMPLES, batch))):
        with pytest.raises(CheckFailed, match=re.escape(says)):
            check(model, *arguments)
    with pytest.raises(ValueError, match="the batch is malformed: pixel_values"):
        causality(model, batch)


def test_pixels_that_were_stacked(model: Any, batch: Batch) -> None:
    with pytest.raises(CheckFailed, match=r"pixel_values has shape \(1, \d+, 1176\) where the processor makes"):
        placeholder_counts(model, {**batch, "pixel_values": batch["pixel_values"][None]})


def test_token_ids_of_another_dtype_than_int64(model: Any, processor: Any) -> None:
    """The forward crashes on them: "Index put requires the source and destination dtypes match"."""
    batch = make_batch(processor, SAMPLES, answers=True)
    cast = {**batch, "input_ids": batch["input_ids"].int(), "labels": batch["labels"].int()}
    with pytest.raises(CheckFailed, match="int64 .*, and the batch has input_ids int32 and labels int32: let the"):
        placeholder_counts(model, cast)
    with pytest.raises(ValueError, match="the batch is malformed: token ids have to be int64"):
        causality(model, {**batch, "input_ids": batch["input_ids"].int()})


@pytest.mark.parametrize("kind", ["text", "positions"])
def test_int32_ids_of_which_the_model_makes_no_positions_are_as_good(model: Any, processor: Any, kind: str) -> None:
    """The embedding takes them, the model trains; labels have to be int64 all the same."""
    batch = make_batch(processor, SAMPLES if kind == "positions" else [sample("none")], answers=True)
    shape = batch["input_ids"].shape
    if kind == "positions":
        batch["position_ids"] = torch.arange(shape[1]).expand(3, *shape)
    batch["input_ids"] = batch["input_ids"].int()
    with torch.no_grad():
        assert model(**batch).loss.isfinite()
    assert validate_batch(model, batch) == []
    for name, cast in (("labels", torch.int32), ("input_ids", torch.int16)):
        (problem,) = validate_batch(model, {**batch, name: batch[name].to(cast)})
        assert f"the batch has {name} {str(cast).removeprefix('torch.')}: let the collator" in problem


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("patch_size", 16, "1536 values per patch, which is 3 x 2 x 16 x 16, where the vision tower takes 1176"),
        ("temporal_patch_size", 1, "588 values per patch, where the vision tower takes 1176"),
        ("merge_size", 1, "4 times as many: .* more than once, or did the processor count with merge_size 1, where"),
        ("merge_size", 4, "12 placeholders, but .*; did the processor count with merge_size 4, where the model's is 2"),
    ],
)
def test_a_processor_of_another_model(
    model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch, setting: str, value: int, says: str
) -> None:
    monkeypatch.setattr(processor.image_processor, setting, value)
    batch = make_batch(processor, [sample("one", picture(2, 168, 224))])
    with pytest.raises(CheckFailed, match=says):
        placeholder_counts(model, batch)


def test_placeholders_expanded_twice(model: Any, batch: Batch) -> None:
    ids = batch["input_ids"][2]
    row = torch.cat([ids, ids[ids == anatomy(model).image_token_id]]).sort(descending=True).values[None]
    doubled = {"input_ids": row, "pixel_values": batch["pixel_values"][rows_of(batch, 2)]}
    doubled["image_grid_thw"] = batch["image_grid_thw"][2:3]
    with pytest.raises(CheckFailed, match="24 placeholders, but .* 2 times as many: were they expanded more than once"):
        placeholder_counts(model, doubled)


@pytest.mark.skipif(TRANSFORMERS_4, reason="Transformers 4 makes positions from the ids")
def test_types_padded_on_the_other_side(model: Any, processor: Any) -> None:
    batch = make_batch(processor, SAMPLES, padding_side="left")
    types, mask = batch["mm_token_type_ids"], batch["attention_mask"].bool()
    batch["mm_token_type_ids"] = torch.stack(
        [torch.cat([row[keep], row[~keep]]) for row, keep in zip(types, mask, strict=True)]
    )
    with pytest.raises(CheckFailed, match=r"its mm_token_type_ids is \d: the types are wrong at \d+ tokens"):
        placeholder_counts(model, batch)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (torch.zeros_like, "all of its values are 0, so nothing of the image is left"),
        (torch.round, "all of its values are whole numbers, so they were rounded or went through an integer dtype"),
    ],
)
def test_what_is_left_of_an_image_is_named(model: Any, processor: Any, batch: Batch, change: Any, says: str) -> None:
    with pytest.raises(CheckFailed, match=f"patch 0 differs from the image's own by up to .*: {says}"):
        picture_pairing(model, processor, SAMPLES, {**batch, "pixel_values": change(batch["pixel_values"])})


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("<|im_end|>\n<|im_start|>assistant", "\n<|im_end|>\n<|im_start|>assistant", "the template has '<|im_end|>"),
        ("<|im_start|>user", "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user", "has 'system"),
        ("<|im_start|>user\n", "<|im_start|>user\n\n", "row 0 (sample 'two') has "),
    ],
    ids=["break", "system prompt", "break before the image"],
)
@pytest.mark.parametrize("answers", [False, True])
def test_a_prompt_of_another_template(
    model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch, before: str, after: str, says: str, answers: bool
) -> None:
    template = processor.apply_chat_template

    def another(*args: Any, **kwargs: Any) -> str:
        made: str = template(*args, **kwargs)
        assert before in made
        return made.replace(before, after)

    assert picture_pairing(model, processor, SAMPLES, make_batch(processor, SAMPLES, answers=answers)).ok
    with monkeypatch.context() as patched:
        patched.setattr(processor, "apply_chat_template", another)
        drifted = make_batch(processor, SAMPLES, answers=answers)
    with pytest.raises(CheckFailed, match="4 of 4 prompts are not those of the processor's chat template") as caught:
        picture_pairing(model, processor, SAMPLES, drifted)
    assert says in str(caught.value)


@pytest.mark.parametrize("damage", ["dropped", "all ones"])
def test_attended_padding_is_not_blamed_on_the_template(model: Any, processor: Any, damage: str) -> None:
    batch = make_batch(processor, SAMPLES, padding_side="left")
    mask = batch.pop("attention_mask")
    if damage == "all ones":
        batch["attention_mask"] = torch.ones_like(mask)
    with pytest.raises(CheckFailed) as caught:
        picture_pairing(model, processor, SAMPLES, batch)
    (problem,) = caught.value.evidence.problems
    why = "the batch has no attention_mask" if damage == "dropped" else "the attention_mask is 1 there"
    padded = [row for row in range(4) if not mask[row].all()]
    length = int((mask[padded[0]] == 0).sum())
    says = (
        f"padding is attended to in {len(padded)} of 4 rows, since {why}: row {padded[0]} begins with {length} pad tok"
    )
    assert problem.startswith(says)
    assert "template" not in problem


# Packed rows


def packed(model: Any, processor: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Two samples in one row without padding, its text positions ``(1, 1, length)`` and M-RoPE ids ``(3, 1, length)``."""
    parts = anatomy(model)
    alone = [make_batch(processor, [each]) for each in (SAMPLES[2], SAMPLES[0])]
    joined = {
        name: torch.cat(
            [one[name] for one in alone], dim=1 if alone[0][name].shape[0] == 1 and name != "image_grid_thw" else 0
        )
        for name in alone[0]
        if name != "attention_mask"
    }
    ids = VisionIds(parts.image_token_id, parts.video_token_id)
    text = torch.cat([torch.arange(one["input_ids"].shape[1]) for one in alone])[None, None]
    right = torch.cat([mrope_oracle(one["input_ids"], None, one["image_grid_thw"], ids, 2) for one in alone], dim=2)
    return joined, text, right


def test_packed_rows(model: Any, processor: Any) -> None:
    """Positions and isolation, each by its own check, in the layouts that collators make."""
    inputs, text, right = packed(model, processor)
    for positions in (torch.cat([text, right]), right):
        assert figures(mrope_positions(model, {**inputs, "position_ids": positions}))["samples packed into rows"] == 2
    isolated = {**inputs, "position_ids": torch.cat([text, right])}
    assert causality(model, isolated).ok
    with pytest.raises(CheckFailed, match=r"no output of another sample that is packed into its row; .*\(4, rows"):
        causality(model, {**inputs, "position_ids": right})
    contaminated = mrope_oracle(
        inputs["input_ids"], None, inputs["image_grid_thw"], VisionIds(*vision_ids(model)), 2
    ).clone()
    start = int((text[0, 0] == 0).nonzero()[-1])
    contaminated[1:, :, start + 20 :] += 1
    with pytest.raises(CheckFailed, match="wrong position ids"):
        mrope_positions(model, {**inputs, "position_ids": torch.cat([text, contaminated])})
    with pytest.raises(CheckFailed, match=r"the batch has plain 1-D positions of its own \(position_ids of \(1, "):
        mrope_positions(model, {**inputs, "position_ids": text[0]})
    with pytest.raises(CannotJudge, match="several samples are packed into a row"):
        decode_positions(model, isolated)
    with pytest.raises(CannotJudge, match="several samples are packed into a row, so which tokens and images"):
        picture_pairing(model, processor, SAMPLES[:2], isolated)
    with pytest.raises(ValueError, match=r"position_ids are \(2, 1, "):
        mrope_positions(model, {**inputs, "position_ids": right[:2]})


def vision_ids(model: Any) -> tuple[int, int]:
    parts = anatomy(model)
    return parts.image_token_id, parts.video_token_id


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_the_collators_own(model: Any, processor: Any, side: str) -> None:
    inputs = make_batch(processor, SAMPLES, padding_side=side)
    right = mrope_oracle(
        inputs["input_ids"], inputs["attention_mask"], inputs["image_grid_thw"], VisionIds(*vision_ids(model)), 2
    )
    given = {**inputs, "position_ids": right}
    assert mrope_positions(model, given).ok
    for check in BATCH_CHECKS:
        assert check(model, given).ok
    given["position_ids"] = right + 3  # equivalent
    assert mrope_positions(model, given).ok
    wrong = right.clone()
    wrong[2, 2, inputs["attention_mask"][2].nonzero().flatten()[-1]] += 1
    with pytest.raises(CheckFailed, match="1 tokens in 1 of 4 rows are wrong"):
        mrope_positions(model, {**inputs, "position_ids": wrong})


# Inputs that are wrong or cannot decide


@pytest.mark.parametrize("check", BATCH_CHECKS)
def test_batches_without_pictures_or_with_a_video(model: Any, processor: Any, check: Any) -> None:
    with pytest.raises(CannotJudge, match="no image"):
        check(model, make_batch(processor, [SAMPLES[1]]))
    with pytest.raises((CannotJudge, CheckFailed, ValueError), match="holds a video|there is no video_grid_thw"):
        check(model, {**make_batch(processor, SAMPLES), "pixel_values_videos": torch.zeros(4, 1176)})
    with pytest.raises(ValueError, match="input_ids of shape"):
        check(model, {})


def test_plain_pictures_cannot_judge_the_scatter(model: Any, processor: Any) -> None:
    batch = make_batch(processor, [SAMPLES[0].blank(), SAMPLES[1]])
    with pytest.raises(CannotJudge, match=r"only \d+ of 24 visual tokens differ .*sample.noise"):
        feature_scatter(model, batch)
    assert visual_token_order(model, batch).ok


def test_wrong_arguments(model: Any, processor: Any, batch: Batch) -> None:
    with pytest.raises(ValueError, match="probes must be at least 1, got 0"):
        causality(model, batch, probes=0)
    with pytest.raises(ValueError, match="3 samples, 4 rows"):
        picture_pairing(model, processor, SAMPLES[:3], batch)
    with pytest.raises(CannotJudge, match="two samples or more"):
        image_isolation(model, processor, SAMPLES[:1])
    with pytest.raises(CannotJudge, match="no sample has an image"):
        picture_pairing(model, processor, [SAMPLES[1]], make_batch(processor, [SAMPLES[1]]))
