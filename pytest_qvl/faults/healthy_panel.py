"""Healthy variations under every instruction set that the CPU offers: whatever is no fault is called one nowhere."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_qvl.evidence import Table, printable
from pytest_qvl.faults.healthy_child import SEPARATOR, Share
from pytest_qvl.faults.isa import Cpu, Setting

if TYPE_CHECKING:
    from collections.abc import Sequence

PER_PROCESS = 40  # a process spends some 20 s on its start and on references, whatever it is asked
CAPABILITIES = {"default": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}
COLUMNS = ("setting", "variations", "checks judged", "false alarms", "not judged")


@dataclass
class Outcome:
    """One setting.

    Attributes:
        setting: The setting.
        missing: CPU flags that it needs and this CPU lacks: then nothing ran.
        share: What was found.
        broken: Why processes of it gave no result.
        seconds: Wall time of its processes together.
    """

    setting: Setting
    missing: tuple[str, ...] = ()
    share: Share = field(default_factory=Share)
    broken: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def green(self) -> bool:
        """Whether it ran through without a false alarm, or could not run here."""
        return not self.share.alarms and not self.broken

    def row(self) -> tuple[Any, ...]:
        """Its row of the table."""
        if self.missing:
            return (str(self.setting), f"not offered (no {', '.join(self.missing)})", None, None, None)
        undecided = sum(self.share.undecided.values())
        alarms = "broken" if self.broken else len(self.share.alarms)
        return (str(self.setting), self.share.variations, self.share.judged, alarms, undecided)


def run(count: int, settings: Sequence[Setting], cpu: Cpu, jobs: int) -> list[Outcome]:
    """Spread `count` healthy variations over the settings that the CPU offers, each in processes of its own.

    Args:
        count: How many variations in all.
        settings: Where to run them.
        cpu: What this CPU offers.
        jobs: Processes at a time.
    """
    outcomes = [Outcome(setting, setting.lacks(cpu)) for setting in settings]
    offered = [outcome for outcome in outcomes if not outcome.missing]
    numbers = list(range(count))
    # Kinds of variations recur with small periods, as do the settings: in order, some would never meet.
    random.Random(0).shuffle(numbers)
    work = []
    for place, outcome in enumerate(offered):
        own = numbers[place :: len(offered)]
        work += [(outcome, sorted(own[start : start + PER_PROCESS])) for start in range(0, len(own), PER_PROCESS)]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda one: _process(*one), work))
    return outcomes


def _process(outcome: Outcome, numbers: list[int]) -> None:
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest_qvl.faults.healthy_child"]
    environment = os.environ | outcome.setting.environment
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdin.write(json.dumps({"numbers": numbers, "threads": outcome.setting.threads}) + "\n")
        child.stdin.flush()
        with ThreadPoolExecutor(1) as reader:  # a full pipe would stop the child
            errors = reader.submit(child.stderr.read)
            lines = [line for line in child.stdout if line.startswith(SEPARATOR)]
            said = errors.result()
    outcome.seconds += time.monotonic() - began
    if not lines:
        last = said.strip().splitlines()[-1:] or ["without a word"]
        outcome.broken.append(f"{outcome.setting}: the process ended with {child.returncode}: {printable(last[0])}")
        return
    _add(outcome, Share(**json.loads(lines[-1].removeprefix(SEPARATOR))))
    _say(f"{outcome.setting}: {outcome.share.variations} variations, {len(outcome.share.alarms)} false alarms")


def _add(outcome: Outcome, share: Share) -> None:
    wanted = CAPABILITIES.get(outcome.setting.aten, share.capability)
    if share.capability != wanted:
        outcome.broken.append(f"{outcome.setting}: torch computes with {share.capability}: the setting had no effect")
    total = outcome.share
    total.capability = share.capability
    total.judged += share.judged
    total.variations += share.variations
    total.alarms += share.alarms
    for check, times in share.undecided.items():
        total.undecided[check] = total.undecided.get(check, 0) + times


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def shown(outcomes: Sequence[Outcome], cpu: Cpu) -> str:
    """The table, what went wrong, and the sum of it."""
    ran = [outcome for outcome in outcomes if not outcome.missing]
    alarms = [f"FALSE ALARM under {o.setting}: {alarm}" for o in ran for alarm in o.share.alarms]
    broken = [f"BROKEN {reason}" for o in ran for reason in o.broken]
    used = sum(o.share.variations > 0 for o in ran)
    total = (
        f"{cpu.model}: {len(alarms)} false alarms over {sum(o.share.variations for o in ran):,} healthy variations "
        f"({sum(o.share.judged for o in ran):,} checks) under {used} of {len(outcomes)} settings; "
        f"{len(outcomes) - len(ran)} not offered by this CPU"
    )
    table = Table(COLUMNS, tuple(outcome.row() for outcome in outcomes))
    return printable("\n".join([str(table), "", *alarms, *broken, total]))


def record(outcomes: Sequence[Outcome], cpu: Cpu) -> dict[str, Any]:
    """Everything, as plain data: the CPU, the versions, and each setting."""
    from importlib.metadata import version

    from pytest_qvl.faults.freshness import definitions_digest

    return {
        "cpu": asdict(cpu),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "definitions": definitions_digest(),
        "settings": [
            {**asdict(o.setting), "offered": not o.missing, "missing": o.missing, **asdict(o.share)}
            | {"broken": o.broken, "seconds": round(o.seconds, 1)}
            for o in outcomes
        ],
    }
