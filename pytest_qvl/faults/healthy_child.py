"""Some healthy variations in a process of their own, whose instruction set was chosen before torch started."""

from __future__ import annotations

import json
import os
import sys
import threading
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field

SEPARATOR = "healthy variations: "


@dataclass
class Share:
    """What one process found.

    Attributes:
        capability: Which of its own kernels torch chose.
        judged: Checks that gave a verdict.
        undecided: Check to how often it could not judge.
        alarms: False alarms, in words.
        variations: How many were made.
    """

    capability: str = ""
    judged: int = 0
    undecided: dict[str, int] = field(default_factory=dict)
    alarms: list[str] = field(default_factory=list)
    variations: int = 0


def judge_variations(numbers: list[int]) -> Share:
    """Make the variations with these numbers and run the checks of each."""
    import torch

    from pytest_qvl.faults.healthy import Healthy, variations
    from pytest_qvl.faults.panel import PASS, UNDECIDED, judge

    healthy, undecided = Healthy(), Counter[str]()
    share = Share(torch.backends.cpu.get_cpu_capability())
    chosen = variations(max(numbers, default=-1) + 1)
    for variation in (chosen[number] for number in numbers):
        with healthy.case(variation) as made:
            for check in variation.checks:
                verdict = judge(made, check)
                if verdict.outcome == UNDECIDED:
                    undecided[check] += 1
                    continue
                share.judged += 1
                if verdict.outcome != PASS:
                    share.alarms.append(f"{variation}, {check} ({verdict.outcome}): {verdict.message}")
        share.variations += 1
    share.undecided = dict(undecided)
    return share


def main() -> None:
    """Numbers and threads as JSON on the first line of stdin; the share as JSON on the last line of stdout."""
    asked = json.loads(sys.stdin.readline())

    def end_with_parent() -> None:
        sys.stdin.read()  # until its other end is gone
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    import torch
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(asked["threads"])
    warnings.simplefilter("ignore")
    disable_progress_bar()
    share = judge_variations(asked["numbers"])
    sys.stdout.write(f"\n{SEPARATOR}{json.dumps(asdict(share))}\n")
    sys.stdout.flush()
    os._exit(0)  # the watching thread still reads


if __name__ == "__main__":
    main()
