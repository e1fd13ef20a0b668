"""Before anything is loaded: what files, configurations and the class without data say. No GPU, no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytest_qvl.preflight import require_green


def test_preflight(
    qvl_model: str,
    qvl_adapter: Path | None,
    qvl_lora_config: Any,
    qvl_quantization_config: Any,
    *,
    qvl_adapter_policy: Any,
    qvl_quantized_layers: Any,
) -> None:
    """Base, skip list, adapter and processor belong together, by their files."""
    require_green(
        qvl_model,
        qvl_adapter,
        qvl_lora_config,
        qvl_quantization_config,
        policy=qvl_adapter_policy,
        layers=qvl_quantized_layers,
    )
