"""The pieces of work that the matrix consists of, each done by one process with one loaded model."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import catalogue, find
from pytest_qvl.faults.matrix.results import After, Row

if TYPE_CHECKING:
    from pytest_qvl.faults.case import Case
    from pytest_qvl.faults.catalogue import Fault
    from pytest_qvl.faults.subject import Subject

VARIATIONS = 200
# Beside the named check where only that is run: they read the model without a forward, in milliseconds.
CHEAP = ("quantization_census", "adapter_census", "placeholder_counts")


_KEPT: list[AbstractContextManager[Any]] = []


class DeviceBroken(RuntimeError):
    """CUDA answers nothing any more in this process."""


@dataclass(frozen=True)
class Plan:
    """Which faults and checks run, on which model.

    Attributes:
        subject: The model.
        only: Names of faults; empty for all.
        named_only: Each fault against its named check and three cheap ones, without smoke test.
    """

    subject: Subject
    only: tuple[str, ...] = ()
    named_only: bool = False

    @property
    def whole(self) -> bool:
        """Whether the healthy variations are part of it: they are made of the embedded model."""
        return self.subject.is_default and not self.only and not self.named_only

    @property
    def faults(self) -> dict[str, Fault]:
        """The faults of the plan by name: those given, or the whole catalogue."""
        return {name: fault for name, fault in catalogue().items() if not self.only or name in self.only}


@dataclass(frozen=True)
class Task:
    """One piece of the matrix: a check of the healthy model, a fault, a graded defect or a healthy variation.

    Attributes:
        part: ``"health"`` (a check of the model without a fault), ``"fault"``, ``"after"`` (a fault that is in the
            reference too), ``"dose"`` or ``"variation"``.
        key: Name of the check or fault, or number of the dose or variation.
    """

    part: str
    key: str


@dataclass(frozen=True)
class Done:
    """A task with what it found and the CPU time that it took.

    Attributes:
        task: Which one.
        found: What came of it, as plain data.
        seconds: CPU time of its process.
    """

    task: Task
    found: Any
    seconds: float


def tasks(plan: Plan) -> list[Task]:
    """All tasks of a plan: checks of the healthy model, faults, faults in the reference too, doses, variations."""
    from pytest_qvl.faults.common_mode import same_outcome
    from pytest_qvl.faults.matrix.doses import GRADED
    from pytest_qvl.faults.matrix.panel import all_checks

    named = {fault.check for fault in plan.faults.values()}
    checks = [
        check
        for check in all_checks(plan.subject.device)
        if not (plan.only or plan.named_only) or check in {*named, *CHEAP}
    ]
    found = [Task("health", check) for check in checks] + [Task("fault", name) for name in plan.faults]
    if not plan.named_only:
        found += [Task("after", name) for name, fault in plan.faults.items() if not same_outcome(fault)]
    if not plan.only:
        found += [Task("dose", str(number)) for number in range(len(GRADED))]
    if plan.whole:
        found += [Task("variation", str(number)) for number in range(VARIATIONS)]
    return found


def do(plan: Plan, task: Task) -> Done:
    """Do one task in this process, which loads the model for its first one."""
    quiet_process(plan.subject.device)
    began = time.process_time()
    found = WORK[task.part](plan, task.key)
    return Done(task, found, time.process_time() - began)


@cache
def quiet_process(device: str) -> None:
    """Compute with one thread on the CPU, or as the suite does on CUDA, and write no warnings."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    if device == "cpu":
        torch.set_num_threads(1)
    else:
        from pytest_qvl.vram.cap import pinned_attention

        # For the life of the process, as the suite does for its session; kept, because leaving it would undo it.
        _KEPT.append(pinned_attention(torch.cuda.get_device_capability()))
        _KEPT[-1].__enter__()
    warnings.simplefilter("ignore")
    disable_progress_bar()


@cache
def _case(subject: Subject) -> Case:
    from pytest_qvl.faults.case import healthy_case

    return healthy_case(subject=subject)


def _health(plan: Plan, check: str) -> dict[str, str]:
    from pytest_qvl.faults.matrix.panel import judge

    verdict = judge(_case(plan.subject), check)
    return {"outcome": verdict.outcome, "message": verdict.message}


def _fault(plan: Plan, name: str) -> dict[str, Any]:
    """Make one fault on this process's model, let the checks judge it, and see that it is undone."""
    from pytest_qvl.faults.common_mode import same_outcome
    from pytest_qvl.faults.matrix.restored import state
    from pytest_qvl.models.backends import one_line
    from pytest_qvl.models.memory import collect

    case, fault = _case(plan.subject), find(name)
    row = Row(check=fault.check, missing=fault.missing(case) or "", same=same_outcome(fault))
    if row.missing:
        return asdict(row)
    before = state(case)
    try:
        _judge(row, plan, fault, case)
        undone = state(case) == before
    except Exception as error:
        row.broken, undone = one_line(error), False
    if fault.target == "load":
        collect()  # models refer to themselves: the next one would be loaded beside this one
    if not undone:
        _case.cache_clear()
        row.broken = row.broken or "it was not undone: the model is not as it was before"
    also = [check for check, outcome in row.outcomes.items() if outcome in ("caught", "refused")]
    others = ", ".join(check for check in also if check != fault.check)
    say(f"{row.verdict:11} {name} by {fault.check}; also {others or 'none'}{': ' * bool(row.broken)}{row.broken}")
    return asdict(row)


def _judge(row: Row, plan: Plan, fault: Fault, case: Case) -> None:
    """Fill the row with what the checks say of the damaged case."""
    from pytest_qvl.faults.case import apply
    from pytest_qvl.faults.matrix.after import names_cause, shortened
    from pytest_qvl.faults.matrix.panel import judge_all, smoke

    with apply(fault.name, case) as damaged:
        verdicts = judge_all(damaged, dict.fromkeys((fault.check, *CHEAP)) if plan.named_only else ())
        if not plan.named_only:
            row.smoke = smoke(damaged).outcome
    own = verdicts[fault.check]
    row.outcomes = {check: verdict.outcome for check, verdict in verdicts.items()}
    row.named, row.said = names_cause(own, fault, case), shortened(own)
    if any("CUDA error" in verdict.message for verdict in verdicts.values()):
        raise DeviceBroken(row.said)


@cache
def _full(subject: Subject) -> Case:
    from pytest_qvl.faults.common_mode import in_full_precision

    return in_full_precision(_case(subject))


def _after(plan: Plan, name: str) -> dict[str, Any] | None:
    """Make one fault on the reference's model and then on this process's; ``None`` where it cannot be made."""
    from pytest_qvl.faults.matrix.after import judge_after
    from pytest_qvl.models.backends import one_line
    from pytest_qvl.models.memory import collect

    case, fault = _case(plan.subject), find(name)
    if fault.missing(case):
        return None
    try:
        after = judge_after(fault, case, _full(plan.subject))
    except Exception as error:
        after = After(broken=one_line(error))
        _full.cache_clear()
        _case.cache_clear()
    if fault.target == "load":
        collect()
    say(f"{'caught' if after.named else 'not caught':11} {name} by {fault.check}, reference after; {after.broken}")
    return asdict(after)


def _graded(plan: Plan, number: str) -> list[dict[str, Any]]:
    from pytest_qvl.faults.matrix.doses import GRADED
    from pytest_qvl.faults.matrix.graded import smallest_doses

    return [asdict(dose) for dose in smallest_doses(_case(plan.subject), GRADED[int(number)])]


def _variation(_plan: Plan, number: str) -> dict[str, Any]:
    from pytest_qvl.faults.matrix.healthy import variations
    from pytest_qvl.faults.matrix.panel import PASS, UNDECIDED, judge

    variation = variations(VARIATIONS)[int(number)]
    outcomes: dict[str, str] = {}
    alarms: list[str] = []
    with _healthy().case(variation) as made:
        for check in variation.checks:
            verdict = judge(made, check)
            outcomes[check] = verdict.outcome
            if verdict.outcome not in (PASS, UNDECIDED):
                alarms.append(f"{variation}, {check} ({verdict.outcome}): {verdict.message}")
                say(f"FALSE ALARM {alarms[-1]}")
    return {"outcomes": outcomes, "alarms": alarms}


@cache
def _healthy() -> Any:
    """Shares full-precision references between the variations that one process makes."""
    from pytest_qvl.faults.matrix.healthy import Healthy

    return Healthy()


WORK: dict[str, Callable[[Plan, str], Any]] = {
    "health": _health,
    "fault": _fault,
    "after": _after,
    "dose": _graded,
    "variation": _variation,
}


def say(line: str) -> None:
    """Write a line of progress to standard error."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
