"""Products in their own dtype, as the limits of layer arithmetic count them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.autocast import DEVICES

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def exact_products() -> Iterator[None]:
    """Switch off inside the block what torch may compute products in besides their dtype, of model and oracles alike.

    TF32, bfloat16 and autocast in place of float32; sums of 16-bit products in 16 bits on CUDA. They are settings of
    the process, autocast of the thread. Torch has two interfaces to the first, and refuses to read the old one where
    the two differ: both are set, and both are put back, the older one first, as it writes into the other.
    """
    import torch

    matmul, cudnn, mkldnn = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
    newer = [getattr(owner, name, None) for owner in (cudnn, mkldnn) for name in ("conv", "rnn", "matmul")]
    settings = [
        (cudnn, "allow_tf32", False),
        *((matmul, f"allow_{dtype}_reduced_precision_reduction", False) for dtype in ("bf16", "fp16")),
        (matmul, "allow_fp16_accumulation", False),
        *((owner, "fp32_precision", "ieee") for owner in (matmul, *newer)),
    ]
    settings = [each for each in settings if _readable(*each[:2])]
    before = [(owner, name, _value(owner, name)) for owner, name, _exact in settings]
    older = torch.get_float32_matmul_precision() if _readable(torch, "get_float32_matmul_precision", call=True) else ""
    autocasts = [device for device in DEVICES if torch.is_autocast_enabled(device)]
    try:
        if older:
            torch.set_float32_matmul_precision("highest")
        for owner, name, exact in settings:
            setattr(owner, name, exact)
        for device in autocasts:
            # Not by an ``autocast`` around the block, which would keep 16-bit copies of weights for all its forwards.
            torch.set_autocast_enabled(device, False)
        yield
    finally:
        for device in autocasts:
            torch.set_autocast_enabled(device, True)
        if older:
            torch.set_float32_matmul_precision(older)
        for owner, name, value in before:
            setattr(owner, name, value)


def _value(owner: Any, name: str) -> Any:
    """A setting as it has to be written to be what it is: some are read in two parts."""
    value, part = getattr(owner, name), f"{name}_split_k"
    return (value, getattr(owner, part)) if hasattr(owner, part) else value


def _readable(owner: Any, name: str, *, call: bool = False) -> bool:
    """Whether this release has a setting, and tells it: the older interface refuses where only the newer is used."""
    try:
        value = getattr(owner, name)
        return not call or bool(value())
    except (AttributeError, RuntimeError):
        return False
