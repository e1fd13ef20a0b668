"""Attributes replaced for the length of a block."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_ABSENT = object()


@contextmanager
def attributes_replaced(changes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes on objects themselves, and put back what each had of its own on leaving.

    An object's class is left as it is, and so are the submodules, parameters and buffers of a torch module: an
    attribute of that name hides them.

    Args:
        changes: Owner (an instance, a class or a Python module), name and value of each.
    """
    changes = list(changes)
    before = [(owner, name, vars(owner).get(name, _ABSENT)) for owner, name, _ in changes]
    for owner, name, value in changes:
        _base(owner).__setattr__(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            if value is _ABSENT:
                _base(owner).__delattr__(owner, name)
            else:
                _base(owner).__setattr__(owner, name, value)


def _base(owner: Any) -> Any:
    """Whose methods set an attribute past those of ``torch.nn.Module``."""
    return type if isinstance(owner, type) else object
