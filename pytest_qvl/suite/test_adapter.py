"""Promises 2 and 3: the adapter is where it should be, and changes nothing until it is trained."""

from __future__ import annotations

from typing import Any

from pytest_qvl import checks


def test_adapter_census(qvl_lora_model: Any, qvl_lora_config: Any, qvl_optimizer: Any, qvl_adapter_policy: Any) -> None:
    """LoRA where the policy has it and nowhere else, on every module asked for, with the exact parameter count."""
    checks.adapter_census(qvl_lora_model, qvl_lora_config, qvl_optimizer, policy=qvl_adapter_policy)


def test_adapter_roundtrip(qvl_lora_model: Any, qvl_adapter: Any, qvl_vram: Any) -> None:
    """The adapter is bitwise what ``--qvl-adapter`` holds; a fresh one survives saving and loading."""
    with qvl_vram.phase("save and load adapter"):
        checks.adapter_roundtrip(qvl_lora_model, qvl_adapter)


def test_adapter_neutrality(qvl_lora_model: Any, mixed_batches: Any) -> None:
    """A fresh adapter (B = 0) and a disabled one give bitwise the base model's logits, with images."""
    checks.adapter_neutrality(qvl_lora_model, mixed_batches)
