"""Pieces of work in parallel processes, which end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


def pooled(
    work: Callable[[Any], Any],
    todo: Sequence[Any],
    jobs: int,
    deadline: float | None,
    died: Callable[[Sequence[Any]], None],
) -> Iterator[tuple[Any, Any]]:
    """Give pieces of work to processes, and yield each with its result as it is done.

    No piece is begun after the deadline; those that run are waited for. Where a process dies the pool is broken: what
    was running goes to `died`, and a new pool goes on with the rest unless that raises.
    """
    waiting = deque(todo)

    def due() -> bool:
        return bool(waiting) and (deadline is None or time.monotonic() < deadline)

    # Not forked: torch's threads do not survive a fork, and neither does CUDA.
    context = multiprocessing.get_context("spawn")
    while due():
        running: dict[Future[Any], Any] = {}
        with ProcessPoolExecutor(min(jobs, len(waiting)), mp_context=context, initializer=end_with_parent) as pool:
            try:
                while running or due():
                    while len(running) < jobs and due():
                        future = pool.submit(work, waiting[0])  # raises if a process has died meanwhile
                        running[future] = waiting.popleft()
                    ready, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in ready:
                        result = future.result()
                        yield running.pop(future), result
            except BrokenProcessPool:
                died(list(running.values()))


def end_with_parent() -> None:
    """In a process of the pool: end when the one that started it was killed, which would leave it busy for an hour."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
