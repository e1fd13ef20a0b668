"""Whether a trainer is still inside its ``train()``. Standard library only."""

from __future__ import annotations

import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType


def inside_train(state: Any) -> Callable[[], bool]:
    """How to ask later whether the training that calls this is still going on.

    A training that ends by an exception outside of the guard (memory, Ctrl-C, another callback) tells no callback of
    it. It is going on as long as the outermost method of its trainer that was running at first is on the stack of its
    thread, and the trainer's state is the object that it was: another ``train()`` begins with one of its own.

    No frame is kept, which would keep a dead training's tensors.

    Args:
        state: The trainer's ``TrainerState`` as callbacks are given it.

    Returns:
        Whether the training goes on; always True where no trainer with this state is on the stack.
    """
    thread = threading.get_ident()
    running = [frame for frame in _stack(thread) if getattr(_self_of(frame), "state", None) is state]
    trainers = [frame for frame in running if hasattr(_self_of(frame), "callback_handler")]
    if not trainers:
        return lambda: True
    code, trainer = trainers[-1].f_code, weakref.ref(_self_of(trainers[-1]))
    del running, trainers

    def alive() -> bool:
        known = trainer()
        if known is None or known.state is not state:
            return False
        return any(frame.f_code is code and _self_of(frame) is known for frame in _stack(thread))

    return alive


def _stack(thread: int) -> Iterator[FrameType]:
    """Frames of a thread from the innermost; autograd and DataParallel call a model from threads of their own."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _self_of(frame: FrameType) -> Any:
    return frame.f_locals.get("self")
