"""Promise 7: features and merger output are finite and stay near full precision."""

from __future__ import annotations

from typing import Any

from pytest_qvl import checks


def test_vision_stability(
    qvl_quantized_model: Any, qvl_processor: Any, qvl_image_samples: Any, qvl_reference: Any
) -> None:
    """Vision features equal those of full precision within the derived limit."""
    checks.vision_stability(qvl_quantized_model, qvl_processor, qvl_image_samples, qvl_reference)
