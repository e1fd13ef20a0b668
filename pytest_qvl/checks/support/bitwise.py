"""Bitwise comparison of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def bits_of(values: torch.Tensor) -> torch.Tensor:
    """The bit patterns, so that NaN equals itself and 0 differs from -0."""
    import torch

    return values.contiguous().view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    )


def differs(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Which vectors along the last axis differ in any bit."""
    return (bits_of(one) != bits_of(other)).any(dim=-1)
