"""``pytest-qvl faults --random``: draw mutations, judge them, and go on with those of an earlier call."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

OTHERS = ("model", "device", "dtype", "only", "named_only", "matrix", "table", "docs", "name", "healthy", "isa")
GOOD, BAD, UNFINISHED = 0, 1, 3


def add_random(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how many mutations are drawn, and which."""
    parser.add_argument(
        "--random",
        type=int,
        metavar="N",
        help="mutation testing: change N tensors, settings or lines of code of the embedded model at random, in place "
        "of the faults, and say which are caught, equivalent or missed",
    )
    parser.add_argument("--seed", type=int, metavar="S", help="with --random: which ones (default: 0)")


def randomly(options: argparse.Namespace, jobs: int) -> int:
    """Judge random mutations, print what became of them, and write their record if asked.

    Args:
        options: The command line.
        jobs: Processes.

    Returns:
        The exit status: 1 if fewer than 95 % of those that change something are caught, 3 if the time of
        ``--minutes`` was up before the end, 0 otherwise.

    Raises:
        ValueError: Options that do not go together, or a file that holds the results of another run.
    """
    from pytest_qvl.faults.mutation.judging import MISSED
    from pytest_qvl.faults.mutation.record import BAR, record, share_caught, totals
    from pytest_qvl.faults.mutation.running import run

    _check(options)
    out, seed = options.out, options.seed or 0
    partial = None if out is None else out.with_name(out.name + ".part")
    data = record(run(options.random, seed, jobs, partial=partial, minutes=options.minutes), options.random, seed)
    if out is not None:
        out.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if partial is not None and data["complete"]:
        partial.unlink()
    missed = [one for one in data["mutations"] if one["outcome"] == MISSED]
    lines = [f"missed: {one['number']}, {one['kind']}: {one['what']}" for one in missed]
    sys.stdout.write("\n".join([*lines, *totals(data)]) + "\n")
    if share_caught(data["mutations"]) < BAR:
        return BAD
    return GOOD if data["complete"] else UNFINISHED


def _check(options: Any) -> None:
    given = [f"--{name.replace('_', '-')}" for name in OTHERS if getattr(options, name) not in (None, False)]
    if given:
        raise ValueError(f"--random takes no {', no '.join(given)}")
    if options.random < 1:
        raise ValueError(f"--random is a number of mutations from 1, not {options.random}")
    if options.minutes is not None and options.minutes <= 0:
        raise ValueError(f"--minutes is a time above 0, not {options.minutes:g}")
