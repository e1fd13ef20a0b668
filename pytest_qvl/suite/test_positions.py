"""Promise 6: M-RoPE positions are those of the paper, at prefill and while decoding."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_qvl import checks


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_mrope_positions(qvl_quantized_model: Any, qvl_batch: Any, row_samples: Any, padding_side: str) -> None:
    """Position ids at prefill equal the oracle's."""
    for samples in row_samples:
        checks.mrope_positions(qvl_quantized_model, qvl_batch(samples, padding_side=padding_side))


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_mrope_positions_of_videos(qvl_quantized_model: Any, video_batch: Any, padding_side: str) -> None:
    """Position ids of frames equal the oracle's: along time, or apart behind their times in words."""
    checks.mrope_positions(qvl_quantized_model, video_batch(padding_side))


def test_mrope_positions_in_training(qvl_quantized_model: Any, training_batch: Any) -> None:
    """The same of the batch that is trained on, whose collator may bring ``position_ids`` of its own."""
    checks.mrope_positions(qvl_quantized_model, training_batch, training=True)


def test_decode_positions(qvl_quantized_model: Any, mixed_batches: Any, long_batch: Any) -> None:
    """Position ids of every decode step inside ``generate`` equal the oracle's, also in a row of over 2,000 tokens."""
    for batch in (*mixed_batches, long_batch):
        checks.decode_positions(qvl_quantized_model, batch)


def test_decode_positions_of_videos(qvl_quantized_model: Any, video_batch: Any) -> None:
    """The tokens that follow a video are counted from behind it."""
    checks.decode_positions(qvl_quantized_model, video_batch("left"))


def test_position_state(qvl_quantized_model: Any, mixed_batches: Any) -> None:
    """``rope_deltas`` of an earlier call do not leak into the next."""
    for batch in mixed_batches:
        checks.position_state(qvl_quantized_model, batch)
