"""What exceptions keep alive after everybody has seen them, and how it is let go."""

from __future__ import annotations

import sys
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

LAST = ("last_type", "last_value", "last_traceback", "last_exc")


def release_frames(error: BaseException | None) -> None:
    """A kept exception pins every local of its frames, half-built models too (pytest-dev/pytest#12198)."""
    for current in _all_of(error):
        traceback.clear_frames(current.__traceback__)
        for frame, _line in traceback.walk_tb(current.__traceback__):
            # Before Python 3.13, showing a frame's locals leaves a dictionary of them on it; reading it updates that.
            frame.f_locals  # noqa: B018


def forget(error: BaseException | None) -> None:
    """Drop tracebacks altogether: a cleared frame still pins its function, and a closure what it has caught.

    ``torch.nn.Module`` calls a module that has hooks through a closure over that module.
    """
    for current in _all_of(error):
        kept, current.__traceback__ = current.__traceback__, None
        if kept is not None:
            kept.tb_next = None  # a fixture's error is kept together with its traceback


def forget_last() -> None:
    """Drop what pytest keeps of a failed test for a debugger, until the next test is called."""
    forget(getattr(sys, "last_value", None))
    for name in LAST:
        vars(sys).pop(name, None)


def _all_of(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, its causes and contexts, and those of a group."""
    seen: set[int] = set()
    todo = [error]
    while todo:
        current = todo.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        todo += [current.__cause__, current.__context__, *getattr(current, "exceptions", ())]
        yield current
