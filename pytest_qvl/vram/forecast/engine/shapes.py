"""Shapes of results, computed once per operation and argument shapes.

Many operations reach ``meta`` through Python reference code that takes 50-250 µs a call. A model repeats the
same few hundred calls in every layer, so results are remembered as (size, stride, dtype) and made again in 2
µs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class _Layout(NamedTuple):
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> torch.Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta")


class ShapeCache:
    """Runs operations on ``meta`` tensors, from memory where the same call was seen before.

    Only results that own their storage are remembered; views and in-place results always run for real, so
    aliasing stays torch's own.
    """

    def __init__(self) -> None:
        self._layouts: dict[Any, tuple[bool, list[Any]]] = {}
        self._always: set[Any] = set()

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """``func(*args, **kwargs)`` for arguments whose tensors are all on ``meta``."""
        if func in self._always:
            return func(*args, **kwargs)
        if func.is_view or func._schema.is_mutable:
            self._always.add(func)
            return func(*args, **kwargs)
        tensors: list[torch.Tensor] = []
        key = (func, _key(args, tensors), _key(kwargs.items(), tensors) if kwargs else None)
        known = self._layouts.get(key)
        if known is not None:
            single, layouts = known
            made = [layout.make() if isinstance(layout, _Layout) else layout for layout in layouts]
            return made[0] if single else tuple(made)
        out = func(*args, **kwargs)
        single = isinstance(out, torch.Tensor)
        outputs = [out] if single else out
        if isinstance(outputs, (list, tuple)) and _own_storages(outputs, tensors):
            self._layouts[key] = (
                single,
                [_Layout(o.size(), o.stride(), o.dtype) if isinstance(o, torch.Tensor) else o for o in outputs],
            )
        return out


def _key(values: Any, tensors: list[torch.Tensor]) -> Any:
    parts: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            parts.append((value.size(), value.stride(), value.dtype))
        elif isinstance(value, (list, tuple)):
            parts.append(_key(value, tensors))
        else:
            # 1, 1.0 and True are equal keys but promote types differently.
            parts.append((type(value), value))
    return tuple(parts)


def _own_storages(outputs: Any, inputs: list[torch.Tensor]) -> bool:
    seen = {tensor.untyped_storage()._cdata for tensor in inputs}
    for out in outputs:
        if not isinstance(out, torch.Tensor):
            continue
        if out.storage_offset():
            return False
        storage = out.untyped_storage()
        if storage._cdata in seen or storage.nbytes() > max(1, out.numel()) * out.element_size():
            return False
        seen.add(storage._cdata)
    return True
