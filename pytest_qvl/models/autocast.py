"""Autocast around or inside of a model: what it keeps of weights, and what it computes in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
