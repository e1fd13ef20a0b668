"""Tensors that should be gone: which are still alive, and what keeps them."""

from __future__ import annotations

import gc
import sys
from types import FrameType, ModuleType
from typing import Any

from pytest_qvl.vram.holders import Holder

SHOWN = 5
_STEPS = 3  # a tensor in a list in a dictionary of a module


def tensors_alive(torch: Any, device: str, besides: frozenset[int] = frozenset()) -> tuple[Holder, ...]:
    """The biggest tensors that Python still holds on a device, biggest first; views of one storage count once.

    What only C++ holds (a graph of autograd, an optimizer's managed memory) is not among them.

    Args:
        torch: The module.
        device: Type of the device, such as ``"cuda"``.
        besides: Addresses of storages to pass over.
    """
    found: dict[int, tuple[int, Any]] = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), torch.Tensor):  # isinstance() asks lazy objects who they are
            continue
        try:
            storage = thing.untyped_storage()
            # Of the storage: a tensor that torch.compile has traced with says "cuda" and has no data.
            if storage.device.type != device:
                continue
            address, size = storage.data_ptr(), storage.nbytes()
        except (RuntimeError, NotImplementedError):  # tensors without data
            continue
        if size and address not in besides:
            found.setdefault(address, (size, thing))
    biggest = sorted(found.values(), key=lambda pair: -pair[0])[:SHOWN]
    ours = {id(found), id(biggest), *map(id, biggest)}
    return tuple(Holder(_describe_tensor(thing, ours), size, 1) for size, thing in biggest)


def _describe_tensor(tensor: Any, ours: set[int]) -> str:
    shape = " x ".join(map(str, tensor.shape)) or "scalar"
    keeper = _keeper(tensor, ours, _STEPS)
    return f"a tensor {shape} of {str(tensor.dtype).removeprefix('torch.')}{f', kept by {keeper}' if keeper else ''}"


def _keeper(thing: Any, ours: set[int], steps: int) -> str:
    """What refers to a thing, in words; empty where nothing with a name does."""
    referrers = [r for r in gc.get_referrers(thing) if id(r) not in ours and not _is_here(r)]
    ours = {*ours, id(referrers)}
    for referrer in referrers:
        name = _name_in(referrer, thing)
        if name:
            return name
    for referrer in referrers if steps > 1 else ():
        if isinstance(referrer, dict | list | tuple | set):
            name = _keeper(referrer, ours, steps - 1)
            if name:
                return f"a {type(referrer).__name__} in {name}"
    return ""


def _name_in(referrer: Any, thing: Any) -> str:
    if isinstance(referrer, FrameType):
        return f"a local of {referrer.f_code.co_name}()"
    if isinstance(referrer, dict):
        key = next((key for key, value in referrer.items() if value is thing), None)
        module = next((m for m in list(sys.modules.values()) if getattr(m, "__dict__", None) is referrer), None)
        if isinstance(module, ModuleType):
            return f"{module.__name__}.{key}"
        owner = next((o for o in gc.get_referrers(referrer) if getattr(o, "__dict__", None) is referrer), None)
        return "" if owner is None else f"{type(owner).__name__}.{key}"
    if isinstance(referrer, list | tuple | set):
        return ""
    attributes = getattr(referrer, "__dict__", {})
    name = next((name for name, value in attributes.items() if value is thing), None)
    return "" if name is None else f"{type(referrer).__name__}.{name}"


def _is_here(referrer: Any) -> bool:
    return isinstance(referrer, FrameType) and referrer.f_globals is globals()
