"""Bitwise comparison of tensors, and whether two are one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def bits_of(values: torch.Tensor) -> torch.Tensor:
    """The bit patterns, so that NaN equals itself and 0 differs from -0."""
    import torch

    return values.contiguous().view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    )


def identity_of(tensor: torch.Tensor) -> Any:
    """What two tensors have together if they are one; without data (the meta device) there is no pointer to compare."""
    return (tensor.device, tensor.data_ptr()) if tensor.data_ptr() else id(tensor)


def differs(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Which vectors along the last axis differ in any bit."""
    return (bits_of(one) != bits_of(other)).any(dim=-1)
