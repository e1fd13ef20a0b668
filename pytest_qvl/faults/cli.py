"""``pytest-qvl faults``: list the catalogue, explain one fault, or run the whole matrix."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from pytest_qvl.faults.catalogue import catalogue, find


def add_faults(subparsers: Any) -> None:
    """Register the subcommand ``faults`` with an ``argparse`` sub-parser collection."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "faults",
        help="list the deliberate faults that the checks are proved on",
        description="List the deliberate faults, explain one, or hold them all against every check.",
    )
    parser.add_argument("name", nargs="?", help="explain this fault")
    parser.add_argument(
        "--matrix",
        action="store_true",
        help="apply every fault, run every check on it and on 200 healthy variations (some 40 minutes of one core)",
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="with --matrix: processes (default: one per core)")
    parser.add_argument(
        "--docs", type=Path, metavar="FOLDER", help="with --matrix: write faults.md and faults.svg here"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Do what the command line asks; returns the exit code: 1 if the matrix has a missed fault or a false alarm.

    Raises:
        ValueError: No such fault, or options that do not go together.
    """
    if options.docs is not None and not options.matrix:
        raise ValueError("--docs says where to write the page of --matrix: give both")
    if options.matrix:
        if options.name:
            raise ValueError(f"--matrix takes every fault: drop {options.name!r}")
        return matrix(options.docs, _jobs(options.jobs))
    if options.jobs is not None:
        raise ValueError("--jobs says over how many processes --matrix is spread: give both")
    sys.stdout.write((explain(options.name) if options.name else listed()) + "\n")
    return 0


def _jobs(given: int | None) -> int:
    if given is None:
        return os.cpu_count() or 1
    if given < 1:
        raise ValueError(f"--jobs is a number of processes from 1, not {given}")
    return given


def matrix(docs: Path | None, jobs: int) -> int:
    """Run the matrix, print its figures, and write its page and picture into the folder ``docs`` if given."""
    from pytest_qvl.faults.matrix import run as run_matrix
    from pytest_qvl.faults.matrix import summary

    result = run_matrix(jobs)
    if docs is not None:
        from pytest_qvl.faults.page import page, picture

        docs.mkdir(parents=True, exist_ok=True)
        (docs / "faults.md").write_text(page(result), encoding="utf-8")
        (docs / "faults.svg").write_text(picture(result), encoding="utf-8")
    sys.stdout.write(summary(result) + "\n")
    return 0 if result.caught == len(result.made) and not result.alarms else 1


def listed() -> str:
    """One line per fault, family by family."""
    faults, family = catalogue(), ""
    lines: list[str] = []
    for fault in faults.values():
        if fault.family != family:
            family = fault.family
            lines += ["", family] if lines else [family]
        lines.append(f"  {fault.name:38} {fault.check:28} {fault.summary}")
    silent = sum(fault.silent for fault in faults.values())
    lines += ["", f"{len(faults)} faults, {silent} of them silent in Transformers"]
    return "\n".join([*lines, "see one: pytest --pyargs pytest_qvl.suite --qvl-fault NAME"])


def explain(name: str) -> str:
    """What a fault is, and how its check has to name it.

    Raises:
        ValueError: No such fault.
    """
    fault = find(name)
    return "\n".join(
        [
            f"{fault.name} ({fault.family})",
            fault.summary,
            f"damages:    {fault.damages}",
            f"caught by:  {fault.check}",
            f"which says: {' … '.join(fault.says)}",
            f"silent:     {'yes: Transformers raises nothing' if fault.silent else 'no'}",
            f"from:       {fault.source or 'no thread'}",
        ]
    )
