"""The cross matrix, the healthy variations and the graded doses: one command, one process, one loaded model."""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import catalogue
from pytest_qvl.faults.freshness import definitions_digest

if TYPE_CHECKING:
    pass

VARIATIONS = 200
PROGRESS = 20


@dataclass
class Row:
    """One fault against every check.

    Attributes:
        outcomes: Check name to outcome.
        named: Whether the named check notices it and its message holds the words it must.
        smoke: Outcome of the plain smoke test.
        missing: Why the fault could not be made, or empty.
    """

    outcomes: dict[str, str] = field(default_factory=dict)
    named: bool = False
    smoke: str = ""
    missing: str = ""


@dataclass
class Result:
    """Everything that one run found."""

    definitions: str
    versions: dict[str, str]
    rows: dict[str, Row] = field(default_factory=dict)
    healthy: dict[str, int] = field(default_factory=dict)
    undecided: dict[str, int] = field(default_factory=dict)
    variations: int = 0
    alarms: list[str] = field(default_factory=list)
    doses: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def made(self) -> dict[str, Row]:
        """The faults that could be made here."""
        return {name: row for name, row in self.rows.items() if not row.missing}

    @property
    def caught(self) -> int:
        """How many faults their named check caught, in the right words."""
        return sum(row.named for row in self.made.values())

    def silent(self) -> list[str]:
        """Faults at which Transformers raises nothing."""
        faults = catalogue()
        return [name for name in self.made if faults[name].silent]

    def smoke_passes(self) -> list[str]:
        """Silent faults that the smoke test does not notice."""
        return [name for name in self.silent() if self.rows[name].smoke == "pass"]

    def only(self, check: str) -> list[str]:
        """Faults that no other check catches; one that refuses the same inputs repeats ``validate_batch``."""
        return [
            name
            for name, row in self.made.items()
            if row.outcomes[check] == "caught"
            and not any(outcome == "caught" for other, outcome in row.outcomes.items() if other != check)
        ]

    def without_own_fault(self) -> list[str]:
        """Checks of which every fault is caught by another check too."""
        checks = next(iter(self.made.values())).outcomes
        return [check for check in checks if not self.only(check)]


def run() -> Result:
    """Run everything; takes some minutes on one core."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from pytest_qvl.faults.case import apply, healthy_case
    from pytest_qvl.faults.panel import PASS, UNDECIDED, judge, judge_all, smoke

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    disable_progress_bar()
    result = Result(definitions_digest(), _versions())
    began = time.process_time()
    case = healthy_case()
    _demand_health(case, "before any fault")
    for name, fault in catalogue().items():
        row = result.rows[name] = Row(missing=fault.missing() or "")
        if row.missing:
            continue
        with apply(name, case) as damaged:
            verdicts = judge_all(damaged)
            row.smoke = smoke(damaged).outcome
        own = verdicts[fault.check]
        row.outcomes = {check: verdict.outcome for check, verdict in verdicts.items()}
        row.named = own.noticed and all(words in own.message for words in fault.says)
        also = [check for check, verdict in verdicts.items() if verdict.noticed and check != fault.check]
        _say(f"{'caught' if row.named else 'MISSED'} {name} by {fault.check}; also {', '.join(also) or 'none'}")
    _demand_health(case, "after all faults")
    result.seconds["faults"] = time.process_time() - began

    from pytest_qvl.faults.doses import smallest_doses

    began = time.process_time()
    result.doses = [asdict(dose) for dose in smallest_doses(case)]
    result.seconds["doses"] = time.process_time() - began

    from pytest_qvl.faults.healthy import Healthy, variations

    began = time.process_time()
    healthy, counts, undecided = Healthy(), Counter[str](), Counter[str]()
    for variation in variations(VARIATIONS):
        with healthy.case(variation) as made:
            for check in variation.checks:
                verdict = judge(made, check)
                counts[check] += 1
                undecided[check] += verdict.outcome == UNDECIDED
                if verdict.outcome not in (PASS, UNDECIDED):
                    result.alarms.append(f"{variation}, {check} ({verdict.outcome}): {verdict.message}")
                    _say(f"FALSE ALARM {result.alarms[-1]}")
        result.variations += 1
        if result.variations % PROGRESS == 0:
            _say(f"{result.variations} healthy variations, {len(result.alarms)} false alarms")
    result.healthy, result.undecided = dict(counts), {k: v for k, v in undecided.items() if v}
    result.seconds["healthy variations"] = time.process_time() - began
    return result


def _demand_health(case: Any, when: str) -> None:
    from pytest_qvl.faults.panel import PASS, judge_all

    ill = {name: v for name, v in judge_all(case).items() if v.outcome != PASS}
    if ill:
        raise RuntimeError(f"the healthy model fails {when}: {ill}")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def summary(result: Result) -> str:
    """The figures, a line each."""
    silent, passes = result.silent(), result.smoke_passes()
    return (
        f"{result.caught} of {len(result.made)} faults caught by the named check, in the right words; "
        f"{len(result.rows) - len(result.made)} cannot be made here\n"
        f"{len(result.alarms)} false alarms over {result.variations} healthy variations "
        f"({sum(result.healthy.values()):,} checks)\n"
        f"{len(silent)} of {len(result.made)} faults raise nothing in Transformers; "
        f"{len(passes)} of these {len(silent)} pass a plain test that trains one step and generates text\n"
        f"checks without a fault that only they catch: {', '.join(result.without_own_fault()) or 'none'}"
    )
