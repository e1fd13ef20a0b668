"""What operations on tensors without data return, found once per operation and layouts of its arguments.

Many operations reach ``meta`` through Python reference code that takes 50-250 µs a call, and making a tensor on
``meta`` takes several. A model repeats the same few hundred calls in every layer, so what a call returns is remembered
as a plan: layouts of new tensors, and which argument is returned or viewed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from pytest_qvl.vram.forecast.engine.dataless import DatalessTensor, Layout

# Its offset counts from the storage's beginning, not from where its argument begins.
_ABSOLUTE_OFFSET = torch.ops.aten.as_strided.default


class Returned(NamedTuple):
    """One tensor that an operation returns.

    Attributes:
        argument: Which tensor without data among the arguments is returned; -1 for another tensor.
        viewed: Which of them it is a view of; -1 for a storage of its own.
        layout: Of the result.
        offset: Elements between the beginning of what is viewed and the view's.
        nbytes: Bytes of its own storage.
    """

    argument: int
    viewed: int
    layout: Layout
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """What a call returns.

    Attributes:
        results: :class:`Returned` for each tensor, and the value of everything else.
        container: The type that holds them; ``None`` where one result is returned by itself.
        scratch: Bytes that the kernel allocates for itself.
    """

    results: tuple[Any, ...]
    container: Any
    scratch: tuple[int, ...]


class Call:
    """The arguments of one call, read once.

    Args:
        args: Positional arguments.
        kwargs: Arguments by name.

    Attributes:
        dataless: Every tensor without data among them.
    """

    __slots__ = ("_key", "args", "dataless", "kwargs")

    def __init__(self, args: Any, kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs
        self.dataless: list[DatalessTensor] = []
        self._key: list[Any] = []
        self._read(args)
        for name, value in kwargs.items():
            self._key.append(name)
            self._read((value,))

    def _read(self, values: Any) -> None:
        key = self._key
        for value in values:
            kind = type(value)
            if kind is DatalessTensor:
                self.dataless.append(value)
                key.append(value.layout_)
            elif kind is list or kind is tuple:
                key.append(len(value))
                self._read(value)
            elif isinstance(value, torch.Tensor):
                # One with data is never what a plan returns or views.
                key += ("data", Layout.of(value))
            elif isinstance(value, (list, tuple)):
                key.append(len(value))
                self._read(value)
            else:
                # 1, 1.0 and True are equal keys but promote types differently.
                key += (kind, value)

    def key(self, func: Any) -> tuple[Any, ...]:
        """Equal for calls that return the same."""
        return (func, *self._key)


class _Meta:
    """Arguments as tensors on ``meta`` that share storages as those without data do."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self._storages: dict[int, torch.UntypedStorage] = {}

    def of(self, value: Any) -> Any:
        if isinstance(value, DatalessTensor):
            self.tensors.append(made := self._tensor(value))
            return made
        if isinstance(value, (list, tuple)):
            return [self.of(item) for item in value]
        if isinstance(value, torch.Tensor):
            return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
        return value

    def _tensor(self, value: DatalessTensor) -> torch.Tensor:
        storage = self._storages.get(id(value.storage_))
        if storage is None:
            storage = torch.empty(value.storage_.nbytes, dtype=torch.uint8, device="meta").untyped_storage()
            self._storages[id(value.storage_)] = storage
        layout = value.layout_
        empty = torch.empty(0, dtype=layout.dtype, device="meta")
        return empty.set_(storage, value.offset, layout.size, layout.stride)

    @property
    def share(self) -> bool:
        """Whether two arguments have one storage, so that a view cannot be told to be of the one or the other."""
        return len(self._storages) < len(self.tensors)


class Plans:
    """Plans of calls, made by running them on ``meta`` and remembered."""

    def __init__(self) -> None:
        self._known: dict[Any, Plan] = {}

    def find(self, func: Any, call: Call) -> Plan | None:
        """The plan of a call that was seen before."""
        return self._known.get(call.key(func))

    def make(self, func: Any, call: Call, scratch: tuple[int, ...]) -> Plan:
        """The plan of a call, from running it on ``meta``."""
        meta = _Meta()
        args = meta.of(call.args)
        kwargs = {name: meta.of(value) for name, value in call.kwargs.items()}
        out = func(*args, **kwargs)
        many = isinstance(out, (list, tuple))
        results = tuple(_returned(item, meta.tensors) for item in (out if many else (out,)))
        plan = Plan(results, type(out) if many else None, scratch)
        if _holds_again(func, results, call, meta):
            self._known[call.key(func)] = plan
        return plan


def _returned(out: Any, arguments: list[torch.Tensor]) -> Any:
    if not isinstance(out, torch.Tensor):
        return out
    layout, storage = Layout.of(out), out.untyped_storage()
    for index, argument in enumerate(arguments):
        if argument is out:
            return Returned(index, index, layout, 0, 0)
    for index, argument in enumerate(arguments):
        if argument.untyped_storage()._cdata == storage._cdata:
            return Returned(-1, index, layout, int(out.storage_offset() - argument.storage_offset()), 0)
    return Returned(-1, -1, layout, int(out.storage_offset()), storage.nbytes())


def _holds_again(func: Any, results: tuple[Any, ...], call: Call, meta: _Meta) -> bool:
    """Whether a plan holds for every call with its key: views are told by their argument and where it begins."""
    viewed = [r for r in results if isinstance(r, Returned) and r.viewed >= 0]
    if not viewed:
        return True
    if meta.share or func is _ABSOLUTE_OFFSET:
        return False
    return all(r.layout.dtype == call.dataless[r.viewed].layout_.dtype for r in viewed)
