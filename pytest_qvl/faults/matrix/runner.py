"""The cross matrix, the healthy variations and the graded doses: one command, one loaded model per process."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pytest_qvl.faults.catalogue import catalogue
from pytest_qvl.faults.matrix.freshness import deciding_definitions, definitions_digest
from pytest_qvl.faults.matrix.journal import Journal, versions
from pytest_qvl.faults.matrix.pool import pooled
from pytest_qvl.faults.matrix.results import UNDECIDED, After, Result, Row
from pytest_qvl.faults.matrix.work import DeviceBroken, Done, Plan, Task, do, say, tasks

if TYPE_CHECKING:
    from pathlib import Path

PROGRESS = 20
ILL = "the model without a fault fails this check"
NOTHING_TOLD = {"caught": "", "missed": (), "undecided": ILL}
NAMES = {
    "health": "healthy model",
    "fault": "faults",
    "after": "faults in the reference",
    "dose": "doses",
    "variation": "healthy variations",
}


class MatrixStopped(RuntimeError):
    """The matrix cannot go on; the message says what happened and how it does."""


def run(
    plan: Plan,
    jobs: int = 1,
    *,
    partial: Path | None = None,
    minutes: float | None = None,
    doses_only: bool = False,
) -> Result:
    """Run the plan; the whole matrix takes more than an hour of one core.

    Args:
        plan: What to run.
        jobs: Processes that share the work; each loads the model once and keeps one core busy.
        partial: Where results are kept as they come; what is there already is not done again.
        minutes: Begin nothing new after so many.
        doses_only: The graded doses of the plan, and their checks on the model without a fault, in place of all.

    Returns:
        What was found; of what was done, if the time was up before the end.

    Raises:
        ValueError: There is no GPU to be had, or `partial` holds the results of something else.
        MatrixStopped: A process died, or CUDA broke.
    """
    wanted = [task for task in tasks(plan) if not doses_only or _is_about_doses(task)]
    journal = Journal(partial, plan, deciding_definitions(str(plan.subject.source)))
    done = {one.task for one in journal.done}
    todo = [task for task in wanted if task not in done]
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    with _leased(plan):
        for count, one in enumerate(_results(plan, todo, jobs, deadline), start=1):
            journal.add(one)
            if one.task.part == "variation" and count % PROGRESS == 0:
                say(f"{len(journal.done)} of {len(wanted)} done")
            if one.task.part == "fault" and one.found["broken"].startswith(DeviceBroken.__name__):
                raise MatrixStopped(
                    f"CUDA answers nothing after {one.task.key}: {one.found['said']}; run it again to go on behind it"
                )
        found = [one for one in journal.done if one.task in wanted]
        result = assembled(plan, found, _device_name(plan, jobs))
    left = len(wanted) - len({one.task for one in found})
    if left:
        say(f"{left} of {len(wanted)} pieces are left: run the same again to go on")
    return result


def _is_about_doses(task: Task) -> bool:
    from pytest_qvl.faults.matrix.doses import GRADED

    return task.part == "dose" or (task.part == "health" and any(task.key in graded.checks for graded in GRADED))


def complete(plan: Plan, result: Result, *, doses_only: bool = False) -> bool:
    """Whether everything, or all doses, was done before the time was up."""
    from pytest_qvl.faults.matrix.doses import GRADED
    from pytest_qvl.faults.matrix.work import VARIATIONS

    doses = bool(plan.only) or {dose["defect"] for dose in result.doses} == {graded.defect for graded in GRADED}
    if doses_only:
        return doses
    after = plan.named_only or all(row.same or row.missing or row.after is not None for row in result.rows.values())
    variations = VARIATIONS if plan.whole else 0
    return len(result.rows) == len(plan.faults) and after and doses and result.variations == variations


def _results(plan: Plan, todo: Sequence[Task], jobs: int, deadline: float | None) -> Iterator[Done]:
    """Do the pieces, in this process or in a pool of them, and yield each as it is done.

    No piece is begun after the deadline; those that run are waited for.
    """
    if jobs == 1:
        for task in todo:
            if deadline is not None and time.monotonic() >= deadline:
                return
            yield do(plan, task)
        return
    for _, one in pooled(functools.partial(do, plan), todo, jobs, deadline, _stop):
        yield one


def _stop(_running: Sequence[Task]) -> None:
    raise MatrixStopped(
        "a process of the matrix died, as one does that finds no memory: give fewer --jobs; with --out the "
        "same command goes on where it was"
    ) from None


@contextmanager
def _leased(plan: Plan) -> Iterator[None]:
    """Hold the lease of a GPU for all processes of the pool, which inherit it; this process starts no CUDA itself.

    Unless it does the work alone.
    """
    if plan.subject.device != "cuda":
        yield
        return
    from pytest_qvl.gpu.errors import LeaseError
    from pytest_qvl.gpu.lease import acquire
    from pytest_qvl.gpu.visible import VisibleDevicesError, visible_gpus

    try:
        lease = acquire(visible_gpus(), say=say)
    except (LeaseError, VisibleDevicesError) as error:
        raise ValueError(f"--device cuda: {error}") from None
    with lease:
        yield


def _device_name(plan: Plan, jobs: int) -> str:
    if plan.subject.device == "cpu":
        return "CPU"
    from pytest_qvl.gpu.visible import visible_gpus

    name = next((gpu.name for gpu in visible_gpus().gpus), "CUDA")
    return name if jobs == 1 else f"{name}, {jobs} processes"


def assembled(plan: Plan, done: Sequence[Done], device: str) -> Result:
    """One result of all pieces, as if one process had done everything.

    A check that does not pass on the model without a fault tells nothing about the faults: what it is named for
    counts as not judged, and the result as not good. One that cannot judge the healthy model for lack of knowledge
    is no such check: its faults need knowledge too.
    """
    subject = plan.subject
    fine = ("pass",) if subject.is_default else ("pass", UNDECIDED)
    model = str(subject.source)
    result = Result(definitions_digest(model), versions(), model, subject.label, device, subject.dtype)
    counts, undecided = Counter[str](), Counter[str]()
    rows: dict[str, Row] = {}
    after: dict[str, After | None] = {}
    graded: dict[int, list[dict[str, object]]] = {}
    for one in done:
        part, key = one.task.part, one.task.key
        result.seconds[NAMES[part]] = result.seconds.get(NAMES[part], 0.0) + one.seconds
        if part == "health" and one.found["outcome"] not in fine:
            result.ill[key] = f"{one.found['outcome']}: {one.found['message']}"
        elif part == "fault":
            rows[key] = Row.from_dict(one.found)
        elif part == "after":
            after[key] = one.found and After(**one.found)
        elif part == "dose":
            graded[int(key)] = one.found
        elif part == "variation":
            counts.update(one.found["outcomes"].keys())
            undecided.update(check for check, outcome in one.found["outcomes"].items() if outcome == UNDECIDED)
            result.alarms += one.found["alarms"]
            result.variations += 1
    for name, row in rows.items():
        row.after = after.get(name)
        if row.check in result.ill and not row.missing:
            row.named, row.outcomes[row.check] = False, UNDECIDED
            row.said = ILL
    result.rows = {name: rows[name] for name in catalogue() if name in rows}
    result.healthy, result.undecided = dict(counts), dict(undecided)
    doses = [dose for number in sorted(graded) for dose in graded[number]]
    result.doses = [{**dose, **NOTHING_TOLD} if dose["check"] in result.ill else dose for dose in doses]
    return result
