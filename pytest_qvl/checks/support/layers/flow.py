"""What each module was given and what it made of it, kept until the layer around it is judged."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_qvl.models.autocast import autocast_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch
    from torch import nn


class Call(NamedTuple):
    """One call of a module.

    Attributes:
        module: The module.
        positional: What it was called with by position.
        kwargs: What it was called with by name.
        output: What it returned.
        given: The first tensor that it was called with, on the device of the next.
        made: The first tensor that it returned.
        autocast: The dtype of the ``torch.autocast`` around it; None outside of one. What its own forward brings, or
            switches off, is not seen from here: the dtype of what was made tells.
    """

    module: Any
    positional: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    given: torch.Tensor
    made: torch.Tensor
    autocast: torch.dtype | None


class Flow:
    """Inputs and outputs by module, without copies: a layer's tensors live until it is judged, or else called again."""

    def __init__(self) -> None:
        self._given: dict[int, torch.Tensor] = {}
        self._made: dict[int, torch.Tensor] = {}
        self._handles: list[Any] = []
        self._watched: set[int] = set()
        self._inside = False

    def given_to(self, module: Any) -> torch.Tensor:
        """The first tensor that a module was called with last."""
        return self._given[id(module)]

    def made_by(self, module: Any) -> torch.Tensor:
        """The first tensor that a module returned last."""
        return self._made[id(module)]

    def watch(self, module: nn.Module, judge: Callable[[Call], None] | None = None) -> None:
        """Record a module's calls, and judge each right after it.

        Judging runs without gradients and without the model's hooks being recorded: an oracle may call the module. It
        runs outside of autocast, which generation (Unsloth) or a forward (Accelerate) may bring of its own, and which
        would round an oracle's float32 as it rounds the model's.
        """

        def after(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            import torch

            if self._inside:
                return
            given, made = first_tensor((*args, *kwargs.values())), first_tensor(output)
            if given is None or made is None:
                return
            # Over several GPUs, Accelerate moves what a module is given inside of its forward.
            given, made = given.detach().to(made.device), made.detach()
            self._given[id(module)], self._made[id(module)] = given, made
            if judge is not None:
                self._inside = True
                autocast = autocast_dtype(made.device.type)
                try:
                    with torch.no_grad(), torch.autocast(made.device.type, enabled=False):
                        judge(Call(module, args, kwargs, output, given, made, autocast))
                finally:
                    self._inside = False

        self._watched.add(id(module))
        self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    def record(self, modules: Iterable[nn.Module]) -> None:
        """Record the calls of those of these modules that are not watched yet."""
        for module in modules:
            if id(module) not in self._watched:
                self.watch(module)

    def before(self, module: nn.Module, note: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        """Call ``note(args, kwargs)`` before each of a module's calls, behind all hooks that change them."""

        def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._inside:
                note(args, kwargs)

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))

    def seen(self, modules: Iterable[Any]) -> bool:
        """Whether all of these modules were called since they were last forgotten."""
        return all(id(module) in self._made for module in modules)

    def forget(self, modules: Iterable[Any]) -> None:
        """Drop what these modules were given and made."""
        for module in modules:
            self._given.pop(id(module), None)
            self._made.pop(id(module), None)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Take all hooks off after the block."""
        try:
            yield
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self._watched.clear()
            self._given.clear()
            self._made.clear()


def first_tensor(values: Any) -> torch.Tensor | None:
    """The first tensor among values: a module's hidden states, under whatever name they come."""
    import torch

    if isinstance(values, torch.Tensor):
        return values
    found = values.values() if hasattr(values, "values") else values
    if not isinstance(found, tuple | list) and not hasattr(found, "__iter__"):
        return None
    return next((value for value in found if isinstance(value, torch.Tensor)), None)
