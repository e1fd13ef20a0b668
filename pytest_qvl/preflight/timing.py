"""How long regular expressions from strangers may work, and how many threads small tensors are given."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from pytest_qvl.preflight.refusals import UnsafeFileError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
MOST_THREADS = 4  # each holds a few MiB
PATIENCE_S = 20.0  # the slowest step that is timed, PEFT on a 7B model, takes about one


@contextmanager
def patience(what: str, seconds: float | None = None) -> Iterator[None]:
    """Stop what takes longer, as a regular expression that backtracks without end does.

    Python's ``re`` looks for signals while it matches, so a timer of the process can stop it; only in the main thread,
    and only where no other timer runs (pytest-timeout's). Elsewhere there is no limit.

    Raises:
        UnsafeFileError: It took longer.
    """
    limit = PATIENCE_S if seconds is None else seconds
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(*_: Any) -> None:
        raise UnsafeFileError(
            f"{what} took more than {limit:g} s, as a regular expression that backtracks without end does; stopped"
        )

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def each_in_a_thread(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """The results of tensor work on large files, in order: torch and the system let go of the interpreter meanwhile."""
    import torch

    def alone(item: _Item) -> _Result:
        torch.set_num_threads(1)  # of this thread
        with torch.no_grad():
            return work(item)

    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
        yield from threads.map(alone, items)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread inside the block.

    Pieces that fit the cache are done before further threads have woken up; on busy cores those take ten times as long.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
