"""Promise 9: the image matters as much as it did in full precision."""

from __future__ import annotations

from typing import Any

from pytest_qvl import checks


def test_alignment(qvl_lora_model: Any, qvl_processor: Any, qvl_image_samples: Any, qvl_reference: Any) -> None:
    """Accuracy per skill and the answer's margin over blank, noise and swapped images."""
    checks.alignment(qvl_lora_model, qvl_processor, qvl_image_samples, qvl_reference)
