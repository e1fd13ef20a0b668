"""Threads of xdist workers: together as many as there are cores, unless somebody has chosen otherwise.

Left alone, torch starts a thread per core in every worker, and they spend their time waiting for one another: on two
cores two workers take five times as long as one process with one thread. Done in a worker when the first test that uses
this package's fixtures is set up, so that the workers of other projects are left as they are.

Imports stdlib and pytest only.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

# Whoever sets one of these has chosen.
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def share(workers: int) -> int:
    """Threads of each of so many workers."""
    return max(1, len(os.sched_getaffinity(0)) // workers)


def limit_threads(config: pytest.Config) -> None:
    """In one of several xdist workers: give torch its share of the cores, whether it is imported yet or not."""
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers < 2 or _chosen():
        return
    threads = share(workers)
    # Read by OpenMP when the first library that uses it is loaded; bitsandbytes may bring one of its own.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def described(config: pytest.Config) -> list[str]:
    """One line for the header of the process that starts the workers; none where torch's threads are left alone."""
    workers = _workers(config)
    if workers < 2 or _chosen() or hasattr(config, "workerinput"):
        return []
    threads = share(workers)
    number = "1 thread" if threads == 1 else f"{threads} threads"
    return [f"{workers} workers with {number} each where they use a model (OMP_NUM_THREADS is not set)"]


def _workers(config: pytest.Config) -> int:
    """How many processes xdist starts: ``3*popen`` are three."""
    specs: list[Any] = config.getoption("tx", None) or []
    return sum(int(count) if star and count.isdecimal() else 1 for count, star, _ in (s.partition("*") for s in specs))


def _chosen() -> bool:
    return any(os.environ.get(name) for name in VARIABLES)
