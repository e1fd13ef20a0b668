"""Healthy variations in a process of their own, whose instruction set was chosen before torch started.

It reads lines on stdin: threads, seed of the probes and model as JSON, then numbers of variations. It writes lines that
begin with :data:`SEPARATOR` on stdout: what it computes with, then a :class:`Judged` for each number. It ends with its
stdin, so also with the process that started it.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_qvl.faults.matrix.healthy import Healthy, Variation

SEPARATOR = "healthy variations: "


@dataclass(frozen=True)
class Judged:
    """What the checks said of one variation.

    Attributes:
        number: Of the variation.
        judged: Checks that gave a verdict.
        undecided: Check to how often it could not judge.
        why: Check to its reason, the last one.
        alarms: False alarms, in words.
        seconds: CPU time, over all threads.
    """

    number: int
    judged: int = 0
    undecided: dict[str, int] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    alarms: list[str] = field(default_factory=list)
    seconds: float = 0.0


def judge_variation(healthy: Healthy, variation: Variation) -> Judged:
    """Make one variation and run its checks."""
    from pytest_qvl.faults.matrix.panel import PASS, UNDECIDED, judge

    began = time.process_time()
    judged, undecided, why, alarms = 0, Counter[str](), {}, []
    with healthy.case(variation) as made:
        for check in variation.checks:
            verdict = judge(made, check)
            if verdict.outcome == UNDECIDED:
                undecided[check] += 1
                why[check] = verdict.message
                continue
            judged += 1
            if verdict.outcome != PASS:
                alarms.append(f"{variation}, {check} ({verdict.outcome}): {verdict.message}")
    seconds = round(time.process_time() - began, 2)
    return Judged(variation.number, judged, dict(undecided), why, alarms, seconds)


@cache
def _variation(number: int, model: str) -> Variation:
    from pytest_qvl.faults.matrix.healthy import variations

    return variations(number + 1, model)[number]


def main() -> None:
    """Read a line with settings, then numbers of variations; answer each with a line of JSON until stdin ends."""
    asked = json.loads(sys.stdin.readline())
    numbers: queue.SimpleQueue[int] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            numbers.put(int(line))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    import torch
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(asked["threads"])
    warnings.simplefilter("ignore")
    disable_progress_bar()
    from pytest_qvl.faults.matrix.healthy import Healthy
    from pytest_qvl.faults.matrix.isa_used import used

    _say(asdict(used()))
    healthy = Healthy(asked["seed"])
    while True:
        _say(asdict(judge_variation(healthy, _variation(numbers.get(), asked["model"]))))


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(f"\n{SEPARATOR}{json.dumps(answer)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
