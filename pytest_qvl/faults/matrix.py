"""The cross matrix, the healthy variations and the graded doses: one command, one loaded model per process."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import catalogue
from pytest_qvl.faults.freshness import definitions_digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_qvl.faults.case import Case
    from pytest_qvl.faults.catalogue import Fault
    from pytest_qvl.faults.healthy import Variation

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


def run(jobs: int = 1) -> Result:
    """Run everything; takes some minutes.

    Args:
        jobs: Processes that share the work; each loads the model once and keeps one core busy.

    Raises:
        RuntimeError: The model without a fault fails a check: nothing could be told by the table.
    """
    if jobs == 1:
        return _share(0, 1)
    # Not forked: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=end_with_parent) as pool:
        return _joined(list(pool.map(_share, range(jobs), [jobs] * jobs)))


def end_with_parent() -> None:
    """In a process of the pool: end when the one that started it was killed, which would leave it busy for an hour."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _share(index: int, count: int) -> Result:
    """Every ``count``-th fault and healthy variation; the first share has the doses too."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from pytest_qvl.faults.case import healthy_case
    from pytest_qvl.faults.doses import smallest_doses
    from pytest_qvl.faults.healthy import variations

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    disable_progress_bar()
    result = Result(definitions_digest(), _versions())
    case = healthy_case()
    with _timed(result, "faults"):
        _demand_health(case, "before any fault")
        for fault in list(catalogue().values())[index::count]:
            result.rows[fault.name] = _row(fault, case)
        _demand_health(case, "after all faults")
    if index == 0:
        with _timed(result, "doses"):
            result.doses = [asdict(dose) for dose in smallest_doses(case)]
    with _timed(result, "healthy variations"):
        _vary(result, list(variations(VARIATIONS))[index::count])
    return result


def _row(fault: Fault, case: Case) -> Row:
    from pytest_qvl.faults.case import apply
    from pytest_qvl.faults.panel import judge_all, smoke

    row = Row(missing=fault.missing() or "")
    if row.missing:
        return row
    with apply(fault.name, case) as damaged:
        verdicts = judge_all(damaged)
        row.smoke = smoke(damaged).outcome
    own = verdicts[fault.check]
    row.outcomes = {check: verdict.outcome for check, verdict in verdicts.items()}
    row.named = own.noticed and all(words in own.message for words in fault.says)
    also = [check for check, verdict in verdicts.items() if verdict.noticed and check != fault.check]
    _say(f"{'caught' if row.named else 'MISSED'} {fault.name} by {fault.check}; also {', '.join(also) or 'none'}")
    return row


def _vary(result: Result, chosen: Sequence[Variation]) -> None:
    from pytest_qvl.faults.healthy import Healthy
    from pytest_qvl.faults.panel import PASS, UNDECIDED, judge

    healthy, counts, undecided = Healthy(), Counter[str](), Counter[str]()
    for variation in chosen:
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
            _say(f"{result.variations} of {len(chosen)} healthy variations, {len(result.alarms)} false alarms")
    result.healthy, result.undecided = dict(counts), {k: v for k, v in undecided.items() if v}


def _joined(shares: Sequence[Result]) -> Result:
    """One result of all shares, as if one process had done everything."""
    rows = {name: row for share in shares for name, row in share.rows.items()}
    seconds: dict[str, float] = {}
    for share in shares:
        for part, spent in share.seconds.items():
            seconds[part] = seconds.get(part, 0.0) + spent
    return replace(
        shares[0],
        rows={name: rows[name] for name in catalogue()},
        healthy=dict(sum((Counter(share.healthy) for share in shares), Counter[str]())),
        undecided=dict(sum((Counter(share.undecided) for share in shares), Counter[str]())),
        variations=sum(share.variations for share in shares),
        alarms=[alarm for share in shares for alarm in share.alarms],
        seconds=seconds,
    )


@contextmanager
def _timed(result: Result, part: str) -> Iterator[None]:
    began = time.process_time()
    yield
    result.seconds[part] = time.process_time() - began


def _demand_health(case: Case, when: str) -> None:
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
