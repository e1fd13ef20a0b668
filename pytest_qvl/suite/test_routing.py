"""Promise 5: every visual token lands on its own placeholder."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_qvl import checks

both_sides = pytest.mark.parametrize("padding_side", ["left", "right"])


@both_sides
def test_placeholder_counts(qvl_quantized_model: Any, qvl_batch: Any, row_samples: Any, padding_side: str) -> None:
    """As many placeholders per image as its grid has visual tokens."""
    for samples in row_samples:
        checks.placeholder_counts(qvl_quantized_model, qvl_batch(samples, padding_side=padding_side))


@both_sides
def test_feature_scatter(qvl_quantized_model: Any, qvl_batch: Any, noise_samples: Any, padding_side: str) -> None:
    """Each visual token sits bitwise at its own placeholder, text embeddings everywhere else."""
    for samples in noise_samples:
        checks.feature_scatter(qvl_quantized_model, qvl_batch(samples, padding_side=padding_side))


@both_sides
def test_placeholder_counts_of_videos(qvl_quantized_model: Any, video_batch: Any, padding_side: str) -> None:
    """As many placeholders per video, or per frame where frames stand apart, as its grid has visual tokens."""
    checks.placeholder_counts(qvl_quantized_model, video_batch(padding_side))


@both_sides
def test_feature_scatter_of_videos(qvl_quantized_model: Any, video_batch: Any, padding_side: str) -> None:
    """Each visual token of a video sits bitwise at its own placeholder, beside those of images."""
    checks.feature_scatter(qvl_quantized_model, video_batch(padding_side))


def test_visual_token_order(qvl_quantized_model: Any, mixed_batches: Any) -> None:
    """The vision tower gives its visual tokens back in the order of the patches."""
    for batch in mixed_batches:
        checks.visual_token_order(qvl_quantized_model, batch)


def test_causality(qvl_quantized_model: Any, mixed_batches: Any) -> None:
    """Changing one visual token moves its own placeholder's embedding and no logit before it."""
    for batch in mixed_batches:
        checks.causality(qvl_quantized_model, batch)


def test_image_isolation(qvl_quantized_model: Any, qvl_processor: Any, row_samples: Any) -> None:
    """Changing one image moves no row, image span or earlier position that does not see it."""
    for samples in row_samples:
        checks.image_isolation(qvl_quantized_model, qvl_processor, samples)


def test_image_preprocessing(qvl_quantized_model: Any, qvl_processor: Any, qvl_image_samples: Any) -> None:
    """The processor resizes, normalises and cuts images as documented, with the family's constants."""
    checks.image_preprocessing(qvl_quantized_model, qvl_processor, qvl_image_samples)


def test_picture_pairing(qvl_quantized_model: Any, qvl_processor: Any, row_samples: Any, mixed_batches: Any) -> None:
    """Prompt, pixel rows and grids are those of each sample alone, in the order of the prompt."""
    for samples, batch in zip(row_samples, mixed_batches, strict=True):
        checks.picture_pairing(qvl_quantized_model, qvl_processor, samples, batch)


def test_picture_pairing_in_training(
    qvl_quantized_model: Any, qvl_processor: Any, training_samples: Any, training_batch: Any
) -> None:
    """The same of the batch that is trained on: it begins with the prompt that is asked later."""
    checks.picture_pairing(qvl_quantized_model, qvl_processor, training_samples, training_batch)


def test_placeholder_counts_in_training(qvl_quantized_model: Any, training_batch: Any) -> None:
    """As many placeholders per image as its grid has visual tokens, in the batch that is trained on."""
    checks.placeholder_counts(qvl_quantized_model, training_batch)


def test_causality_in_training(qvl_quantized_model: Any, training_batch: Any) -> None:
    """No output of another row, nor of another sample packed into the row, moves in the batch that is trained on."""
    checks.causality(qvl_quantized_model, training_batch)


def test_malformed_inputs(qvl_quantized_model: Any, mixed_batches: Any) -> None:
    """Count mismatches, placeholders without pixels and pixels without placeholders do not pass unnoticed."""
    for batch in mixed_batches:
        checks.malformed_inputs(qvl_quantized_model, batch)
