"""What each module was given and what it made of it, kept until the layer around it is judged."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch
    from torch import nn

    Judge = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]


class Flow:
    """Inputs and outputs by module, without copies: a layer's tensors live until the layer is done.

    Attributes:
        given: First tensor that a module was called with, by the module's id.
        made: First tensor that it returned.
    """

    def __init__(self) -> None:
        self.given: dict[int, torch.Tensor] = {}
        self.made: dict[int, torch.Tensor] = {}
        self._handles: list[Any] = []
        self._inside = False

    def watch(self, module: nn.Module, judge: Judge | None = None) -> None:
        """Record a module's calls, and judge each right after it with ``judge(module, args, kwargs, output)``.

        Judging runs without gradients and without the model's hooks being recorded: an oracle may call the module.
        """

        def after(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            import torch

            if self._inside:
                return
            given, made = first_tensor((*args, *kwargs.values())), first_tensor(output)
            if given is None or made is None:
                return
            self.given[id(module)], self.made[id(module)] = given.detach(), made.detach()
            if judge is not None:
                self._inside = True
                try:
                    with torch.no_grad():
                        judge(module, args, kwargs, output)
                finally:
                    self._inside = False

        self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    def before(self, module: nn.Module, note: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        """Call ``note(args, kwargs)`` before each of a module's calls, behind all hooks that change them."""

        def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._inside:
                note(args, kwargs)

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))

    def seen(self, modules: Iterable[Any]) -> bool:
        """Whether all of these modules were called since they were last forgotten."""
        return all(id(module) in self.made for module in modules)

    def forget(self, modules: Iterable[Any]) -> None:
        """Drop what these modules were given and made."""
        for module in modules:
            self.given.pop(id(module), None)
            self.made.pop(id(module), None)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Take all hooks off after the block."""
        try:
            yield
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self.given.clear()
            self.made.clear()


def first_tensor(values: Any) -> torch.Tensor | None:
    """The first tensor among values: a module's hidden states, under whatever name they come."""
    import torch

    if isinstance(values, torch.Tensor):
        return values
    found = values.values() if hasattr(values, "values") else values
    if not isinstance(found, tuple | list) and not hasattr(found, "__iter__"):
        return None
    return next((value for value in found if isinstance(value, torch.Tensor)), None)
