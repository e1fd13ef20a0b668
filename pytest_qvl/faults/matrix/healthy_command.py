"""``pytest-qvl faults --healthy``: run healthy variations, and go on with those of an earlier call."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.matrix.journal import partial_file, write_record

if TYPE_CHECKING:
    import argparse
    from collections.abc import Collection
    from pathlib import Path

    from pytest_qvl.faults.matrix.healthy_record import Outcome

OTHERS = ("device", "dtype", "only", "named_only", "matrix", "table", "docs", "name")
GOOD, BAD, UNFINISHED = 0, 1, 3


def healthy(options: argparse.Namespace, jobs: int) -> int:
    """Run healthy variations, print what they showed, and write their record if asked.

    Args:
        options: The command line.
        jobs: Threads of all processes together.

    Returns:
        The exit status: 1 if a check called one broken or a process gave no result, 3 if the time of ``--minutes``
        was up before all were judged and no such thing happened so far, 0 otherwise.

    Raises:
        ValueError: Options that do not go together, or a file that holds the results of another run.
    """
    from pytest_qvl.faults.matrix.healthy import DEFAULT
    from pytest_qvl.faults.matrix.healthy_panel import run
    from pytest_qvl.faults.matrix.healthy_record import record, shown
    from pytest_qvl.faults.matrix.isa import settings, this_cpu
    from pytest_qvl.models.sources.model_source import parse_model

    check_count(options, "healthy", "variations", OTHERS)
    cpu, out, model = this_cpu(), options.out, options.model or DEFAULT
    parse_model(model)
    partial = partial_file(out)
    chosen = settings(options.isa or "native")
    outcomes = run(options.healthy, chosen, cpu, jobs, partial=partial, minutes=options.minutes, model=model)
    left = options.healthy - sum(len(outcome.numbers) for outcome in outcomes)
    if out is not None:
        write_record(out, record(outcomes, cpu, options.healthy, model))
    if partial is not None and not left:
        partial.unlink()
    sys.stdout.write(shown(outcomes, cpu) + "\n")
    if left:
        again = "run the same again to go on" if out is not None else "with --out FILE.json the next call goes on there"
        sys.stdout.write(f"unfinished: {left:,} of {options.healthy:,} variations are left: {again}\n")
    return exit_status(outcomes, left)


def exit_status(outcomes: list[Outcome], left: int) -> int:
    """The exit code of the command for these outcomes."""
    if not all(outcome.green for outcome in outcomes):
        return BAD
    return UNFINISHED if left else GOOD


def check_count(options: argparse.Namespace, name: str, what: str, others: Collection[str]) -> None:
    """Refuse what does not go with an option that says how many are run.

    Args:
        options: The command line.
        name: The option, as an attribute of `options`.
        what: What it counts, in the plural.
        others: Options that do not go with it.

    Raises:
        ValueError: One of them was given, or a number below 1, or no time.
    """
    given = [f"--{other.replace('_', '-')}" for other in others if getattr(options, other) not in (None, False)]
    if given:
        raise ValueError(f"--{name} takes no {', no '.join(given)}")
    if (count := getattr(options, name)) < 1:
        raise ValueError(f"--{name} is a number of {what} from 1, not {count}")
    if options.minutes is not None and options.minutes <= 0:
        raise ValueError(f"--minutes is a time above 0, not {options.minutes:g}")


def split_records(files: list[Path], schema: str) -> tuple[list[dict[str, Any]], list[Path]]:
    """The records of a schema among the files, read, and the other files, readable or not."""
    found, others = [], []
    for file in files:
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            data = None
        if isinstance(data, dict) and data.get("schema") == schema:
            found.append(data)
        else:
            others.append(file)
    return found, others
