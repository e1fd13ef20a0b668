"""``pytest-qvl faults --random``: draw mutations, judge them, and go on with those of an earlier call."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pytest_qvl.faults.matrix.healthy_command import BAD, GOOD, UNFINISHED, check_count
from pytest_qvl.faults.matrix.journal import partial_file, write_record

if TYPE_CHECKING:
    import argparse

OTHERS = ("model", "device", "dtype", "only", "named_only", "matrix", "table", "docs", "name", "isa")


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

    check_count(options, "random", "mutations", OTHERS)
    out, seed = options.out, options.seed or 0
    partial = partial_file(out)
    data = record(run(options.random, seed, jobs, partial=partial, minutes=options.minutes), options.random, seed)
    if out is not None:
        write_record(out, data)
    if partial is not None and data["complete"]:
        partial.unlink()
    missed = [one for one in data["mutations"] if one["outcome"] == MISSED]
    lines = [f"missed: {one['number']}, {one['kind']}: {one['what']}" for one in missed]
    sys.stdout.write("\n".join([*lines, *totals(data)]) + "\n")
    if share_caught(data["mutations"]) < BAR:
        return BAD
    return GOOD if data["complete"] else UNFINISHED
