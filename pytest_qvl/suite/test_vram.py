"""Promise 11: peak VRAM, phase by phase, within its limit."""

from __future__ import annotations

from typing import Any

from pytest_qvl import checks


def test_peak_vram(
    qvl_lora_model: Any, mixed_batch: Any, training_batch: Any, qvl_vram: Any, qvl_vram_limit: int | None
) -> None:
    """Vision, prefill, decoding and a training step, each within ``--qvl-vram-limit`` if one is given."""
    checks.peak_vram(qvl_lora_model, mixed_batch, training_batch, qvl_vram, limit=qvl_vram_limit)
