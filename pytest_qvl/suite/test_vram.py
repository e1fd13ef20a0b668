"""Promise 11: peak VRAM, phase by phase, within its limit; and the forecast of it."""

from __future__ import annotations

from typing import Any

from pytest_qvl import checks


def test_peak_vram(
    qvl_lora_model: Any, mixed_batches: Any, training_batch: Any, qvl_vram: Any, qvl_vram_limit: int | None
) -> None:
    """Vision, prefill, decoding and a training step, each within ``--qvl-vram-limit`` if one is given."""
    checks.peak_vram(qvl_lora_model, mixed_batches[0], training_batch, qvl_vram, limit=qvl_vram_limit)


def test_forecast_fits_card(
    qvl_model: str, qvl_quantization_config: Any, qvl_lora_config: Any, qvl_card: Any, own_images: Any
) -> None:
    """Training this model with this adapter fits ``--qvl-card``, by the forecast: no GPU is asked."""
    checks.forecast_fits_card(qvl_model, qvl_quantization_config, qvl_lora_config, qvl_card, samples=own_images)


def test_forecast_agrees(qvl_lora_model: Any, mixed_batches: Any, training_batch: Any, qvl_vram: Any) -> None:
    """The forecast of each phase that ``peak_vram`` measures is what the GPU measures."""
    checks.forecast_agrees(qvl_lora_model, mixed_batches[0], training_batch, qvl_vram)
