"""Autocast around or inside of a model: what it keeps of weights, and what it computes in."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

DEVICES = ("cpu", "cuda")


@contextmanager
def casts_not_kept() -> Iterator[None]:
    """Let no forward inside the block compute with a 16-bit copy of a weight that was made for an earlier one.

    Until the outermost ``autocast`` of the thread is left, be it a disabled one, torch keeps the 16-bit copies that
    autocast makes of trainable float32 weights, and takes no notice of a weight that is written in place: inside of a
    user's ``autocast``, a check that steps an optimizer would see the weights of its first forward for ever. Here
    nothing is kept in the autocast around, and one that a forward brings of its own is the outermost: it drops its
    copies when it is left, as in training. What is computed in which dtype stays as it is.
    """
    import torch

    kept = torch.is_autocast_cache_enabled()
    torch.autocast_increment_nesting()
    around = 0
    while torch.autocast_decrement_nesting() > 0:
        around += 1
    if any(torch.is_autocast_enabled(device) for device in DEVICES):
        torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(kept)
        for _ in range(around):
            torch.autocast_increment_nesting()


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast computes in now on a type of device; ``None`` outside of one."""
    import torch

    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def autocast_to(device: str, dtype: torch.dtype | None) -> torch.autocast:
    """An autocast of the dtype that :func:`autocast_dtype` told, or none inside of it."""
    import torch

    return torch.autocast(device, dtype, enabled=dtype is not None)
