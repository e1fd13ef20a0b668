"""What exceptions keep alive after everybody has seen them, and how it is let go."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
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
        current.with_traceback(None)


def write_down(error: BaseException) -> None:
    """Keep a traceback as lines of text, from below pytest's own frames, where it will be dropped but not yet shown."""
    entries = traceback.extract_tb(error.__traceback__)
    own = [i for i, entry in enumerate(entries) if not {"_pytest", "pluggy"}.isdisjoint(Path(entry.filename).parts)]
    error.add_note("".join(traceback.format_list(entries[max(own, default=-1) + 1 :])).rstrip())


def forget_last() -> None:
    """Drop what pytest keeps of a failed test for a debugger, until the next test is called."""
    forget(getattr(sys, "last_value", None))
    for name in LAST:
        vars(sys).pop(name, None)


def _all_of(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, its causes and contexts, and those of a group."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        current = todo.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        todo += [current.__cause__, current.__context__]
        if isinstance(current, BaseExceptionGroup):
            todo += current.exceptions
        yield current
