"""Tensors without data: a layout, and a storage whose end is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_CPU = torch.device("cpu")


class Layout:
    """Size, strides and dtype; one object for all that are equal, so that it is compared by identity."""

    __slots__ = ("dtype", "size", "stride")
    _known: ClassVar[dict[Any, Layout]] = {}

    def __init__(self, size: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> None:
        self.size, self.stride, self.dtype = size, stride, dtype

    def __deepcopy__(self, _: Any) -> Layout:
        return self

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Layout:
        """The layout of a tensor with data or on ``meta``."""
        key = (tensor.size(), tensor.stride(), tensor.dtype)
        found = cls._known.get(key)
        if found is None:
            found = cls._known[key] = cls(*key)
        return found


class Storage:
    """What tensors without data share that are views of each other.

    Args:
        nbytes: Its size.

    Attributes:
        number: Of its allocation on a trace; -1 before it is followed.
        run: In which run it was followed.
        released: Called with it when the last tensor lets go of it; ``None`` before it is followed.
    """

    __slots__ = ("nbytes", "number", "released", "run")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.number = self.run = -1
        self.released: Callable[[Storage], None] | None = None

    def __deepcopy__(self, _: Any) -> Storage:
        """Another storage, which is not followed yet: nobody allocated it on the device."""
        return Storage(self.nbytes)

    def __del__(self) -> None:
        if self.released is not None:
            self.released(self)


class DatalessTensor(torch.Tensor):
    """A tensor without data; only valid inside the recorder that made it.

    Attributes:
        layout_: Its size, strides and dtype.
        offset: Elements of the storage before its first.
        storage_: Its storage.
    """

    layout_: Layout
    offset: int
    storage_: Storage
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, layout: Layout, offset: int, storage: Storage) -> DatalessTensor:
        """A tensor of that layout, ``offset`` elements into ``storage``."""
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, layout.size, layout.stride, offset, None, layout.dtype, torch.strided, _CPU
        )
        made.layout_ = layout
        made.offset = offset
        made.storage_ = storage
        return made  # type: ignore[no-any-return]

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What it says it is: of a packed weight, whose kind PEFT tells by the name of its class, ``poses_as``."""
        return self.__dict__.get("poses_as", DatalessTensor)

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise RuntimeError(f"{func} was called on a tensor without data outside the recorder that follows it")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DatalessTensor({tuple(self.layout_.size)}, {self.layout_.dtype})"
