"""Mutations in parallel processes, each with a model of its own; cut off, a run goes on where it was."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.matrix.freshness import definitions_digest
from pytest_qvl.faults.matrix.journal import JsonLines
from pytest_qvl.faults.matrix.pool import pooled
from pytest_qvl.faults.matrix.work import Plan, Task, do, quiet_process, say
from pytest_qvl.faults.mutation.judging import RAISES, Judged, judge_mutation
from pytest_qvl.faults.subject import embedded

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from pytest_qvl.faults.case import Case
    from pytest_qvl.faults.mutation.places import Places
    from pytest_qvl.faults.mutation.probes import Healthy

# In float32 rounding hides least: fewest mutations are too small to be seen.
DTYPE = "float32"
DIED = "its process died"


def run(
    count: int, seed: int, jobs: int = 1, *, partial: Path | None = None, minutes: float | None = None
) -> list[Judged]:
    """Judge the first `count` mutations of a seed; what was done of them, if the time was up before the end.

    Args:
        count: How many.
        seed: Which ones.
        jobs: Processes; each takes half a minute to start.
        partial: Where results are kept as they come; what is there already is not done again.
        minutes: Begin nothing new after so many.

    Raises:
        ValueError: `partial` holds the results of another run, or a check fails the healthy model.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    journal = JsonLines(partial, {"seed": seed, "subject": str(embedded(DTYPE)), "definitions": definitions_digest()})
    done = {kept["number"]: Judged(**kept) for kept in journal.kept}
    todo = [number for number in range(count) if number not in done]
    for judged in _judged(seed, todo, jobs, deadline):
        journal.write(asdict(judged))
        done[judged.number] = judged
        say(f"{len(done)} of {count}: {judged.outcome:16} {judged.by:24} {judged.what}")
    return [done[number] for number in sorted(done) if number < count]


def _judged(seed: int, todo: Sequence[int], jobs: int, deadline: float | None) -> Iterator[Judged]:
    if not todo:
        return
    checks = _judging_checks(jobs)
    waiting = [(seed, number, checks) for number in todo]
    left: list[tuple[int, int, tuple[str, ...]]] = []
    for (_, number, _), judged in pooled(judge_number, waiting, jobs, deadline, left.extend):
        assert judged.number == number
        yield judged
    # Some of these ended their process, and took the others along: one at a time, it shows which.
    for one in left:
        alone: list[Any] = []
        yield from (judged for _, judged in pooled(judge_number, [one], 1, None, alone.extend))
        if alone:
            yield Judged(one[1], "", "", RAISES, said=DIED)


def _judging_checks(jobs: int) -> tuple[str, ...]:
    """The checks that pass the healthy model.

    Raises:
        ValueError: One fails it: that would catch every mutation.
    """
    from pytest_qvl.faults.matrix.panel import PASS, UNDECIDED, all_checks

    broken: list[Task] = []
    tasks = [Task("health", name) for name in all_checks()]
    judged = pooled(partial(do, Plan(embedded(DTYPE))), tasks, jobs, None, broken.extend)
    found = {task.key: done.found["outcome"] for task, done in judged}
    failing = [f"{name} ({outcome})" for name, outcome in found.items() if outcome not in (PASS, UNDECIDED)]
    failing += [task.key for task in broken]
    if failing:
        raise ValueError(f"without any mutation the model fails {', '.join(failing)}: nothing can be said of mutations")
    return tuple(name for name in all_checks() if found[name] == PASS)


def judge_number(asked: tuple[int, int, tuple[str, ...]]) -> Judged:
    """Judge the mutation of a seed with a number, by the checks named; in a process that loads the model once."""
    from pytest_qvl.faults.matrix.restored import state
    from pytest_qvl.faults.mutation.drawn import draw

    seed, number, checks = asked
    case, places, healthy = _prepared()
    mutation = draw(seed, number, places)
    before = state(case)
    judged = judge_mutation(mutation, number, case, healthy, checks)
    if state(case) != before:  # a mutation may write where nothing is put back, such as into a shared buffer
        _prepared.cache_clear()
    return judged


@cache
def _prepared() -> tuple[Case, Places, Healthy]:
    """This process's model, what can be changed in it, and what it makes of the probes."""
    from pytest_qvl.faults.case import healthy_case
    from pytest_qvl.faults.mutation.places import Places
    from pytest_qvl.faults.mutation.probes import Healthy

    quiet_process("cpu")
    case = healthy_case(subject=embedded(DTYPE))
    return case, Places.of(case), Healthy.of(case)
