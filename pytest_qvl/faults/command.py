"""``pytest-qvl faults``: list the catalogue, explain one fault, run the matrix, or make the pages of its records."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import find
from pytest_qvl.faults.common_mode import unshared
from pytest_qvl.faults.matrix.healthy_command import healthy, split_records
from pytest_qvl.faults.matrix.journal import partial_file, write_record
from pytest_qvl.faults.mutation.command import add_random, randomly
from pytest_qvl.figures import require_matplotlib
from pytest_qvl.outputs import check_file, check_folder

if TYPE_CHECKING:
    from pytest_qvl.faults.matrix.results import Result

MATRIX_ONLY = ("model", "device", "dtype", "jobs", "only", "named_only", "doses_only", "out", "minutes")


def add_faults(subparsers: Any) -> None:
    """Register the subcommand ``faults`` with an ``argparse`` sub-parser collection."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "faults",
        help="list the deliberate faults that the checks are proved on",
        description="List the deliberate faults, explain one, or hold them all against every check.",
    )
    parser.add_argument("name", nargs="?", help="explain this fault")
    _add_matrix(parser)
    _add_records(parser)
    _add_healthy(parser)
    add_random(parser)
    parser.set_defaults(run=run)


def _add_matrix(parser: argparse.ArgumentParser) -> None:
    """Options that say which faults and checks run, on which model."""
    parser.add_argument(
        "--matrix",
        action="store_true",
        help="apply every fault and run every check on it, and once more with a reference recorded after the damage "
        "where that may change the outcome, and graded doses; on the embedded model on the CPU also 200 healthy "
        "variations (more than an hour of one core)",
    )
    parser.add_argument(
        "--model", metavar="MODEL", help="with --matrix or --healthy: as for --qvl-model (default: embedded)"
    )
    parser.add_argument("--device", help="with --matrix: cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", help="with --matrix: bfloat16, float16 or float32 (default: bfloat16)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="with --matrix: these faults only")
    parser.add_argument(
        "--named-only",
        action="store_true",
        help="with --matrix: run on a fault the check that must catch it, and three cheap ones, in place of all",
    )
    parser.add_argument(
        "--doses-only", action="store_true", help="with --matrix: find the smallest doses, in place of all else"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="with --matrix or --random: processes (default: one per core on the CPU, 1 on CUDA); with --healthy: "
        "threads of all processes together",
    )


def _add_records(parser: argparse.ArgumentParser) -> None:
    """Options that say what becomes of a run's record, and what is made of records."""
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="with --matrix, --healthy or --random: write the record here; until it is complete, what is done is kept "
        "in FILE.json.part, and the same command goes on from there",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="with --matrix, --healthy or --random: begin nothing new after so many; --healthy ends within half a "
        "minute then, --random when those that run are judged, and both exit with 3",
    )
    parser.add_argument(
        "--table",
        nargs="+",
        type=Path,
        metavar="FILE.json",
        help="make the pages of --docs from records of --out; without --docs, print the table of one of --healthy",
    )
    parser.add_argument(
        "--docs",
        type=Path,
        metavar="FOLDER",
        help="with --matrix or --table: write faults.md and faults.svg here (the figure needs the extra "
        "plots); with --table also faults-by-model.md, the table of a record of --healthy into checks.md, and the page "
        "of one of --random, mutations.md",
    )


def _add_healthy(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how many healthy variations run, under which settings."""
    parser.add_argument(
        "--healthy",
        type=int,
        metavar="N",
        help="run the checks on N healthy variations in place of the faults; any alarm is a false one",
    )
    parser.add_argument(
        "--isa",
        choices=("native", "all"),
        help="with --healthy: on the machine as it is (default), or spread over every instruction set that this CPU "
        "offers (ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY), with one and two threads, each in processes of its own",
    )


def run(options: argparse.Namespace) -> int:
    """Do what the command line asks; returns the exit code: 1 if the matrix has a missed fault or a false alarm.

    Raises:
        ValueError: No such fault, or options that do not go together.
    """
    if options.matrix and options.table:
        raise ValueError("--table makes pages of records that --matrix wrote: give one of them")
    if options.docs is not None and not (options.matrix or options.table):
        raise ValueError("--docs says where to write the pages of --matrix or --table: give one of them")
    if options.docs is not None:
        check_folder("--docs", options.docs)
    if options.out is not None:
        check_file("--out", options.out)
    if options.healthy is not None:
        return healthy(options, _jobs(options.jobs, "cpu"))
    if options.random is not None:
        return randomly(options, _jobs(options.jobs, "cpu"))
    if options.seed is not None:
        raise ValueError("--seed says which mutations --random draws: give both")
    if options.isa is not None:
        raise ValueError("--isa says where the variations of --healthy run: give both")
    if options.matrix:
        return matrix(options)
    given = [f"--{name.replace('_', '-')}" for name in MATRIX_ONLY if getattr(options, name) not in (None, False)]
    if given:
        raise ValueError(f"{', '.join(given)}: about the run of --matrix; give both")
    if options.table:
        return table(options.table, options.docs)
    sys.stdout.write((explain(options.name) if options.name else listed()) + "\n")
    return 0


def matrix(options: argparse.Namespace) -> int:
    """Run the matrix, print its figures, and write its record and pages if asked.

    Raises:
        ValueError: Options that do not go together, or a model or GPU that cannot be had.
    """
    from pytest_qvl.evidence import CannotJudge
    from pytest_qvl.faults.matrix import runner as running
    from pytest_qvl.faults.matrix.results import summary
    from pytest_qvl.faults.matrix.work import Plan
    from pytest_qvl.faults.subject import Subject
    from pytest_qvl.models.backends import ModelLoadError

    if options.name:
        raise ValueError(f"--matrix takes every fault: drop {options.name!r}, or write --only {options.name}")
    subject = Subject.of(options.model or "embedded", options.device or "cpu", options.dtype or "bfloat16")
    plan = Plan(subject, tuple(find(name).name for name in options.only or ()), options.named_only)
    if options.doses_only and (plan.only or plan.named_only):
        given = "--only" if plan.only else "--named-only"
        raise ValueError(f"{given} says which faults and checks run, and --doses-only that none do: give one of them")
    if options.docs is not None and (options.doses_only or not plan.whole):
        raise ValueError("--docs is about the whole matrix of the embedded model on the CPU: write other runs to --out")
    if options.docs is not None:
        require_matplotlib("--docs")
    partial = partial_file(options.out)
    jobs = _jobs(options.jobs, subject.device)
    try:
        result = running.run(plan, jobs, partial=partial, minutes=options.minutes, doses_only=options.doses_only)
    except (ModelLoadError, CannotJudge, running.MatrixStopped) as error:
        raise ValueError(str(error)) from None
    sys.stdout.write(summary(result) + "\n")
    if not running.complete(plan, result, doses_only=options.doses_only):
        return 1
    if partial is not None:
        write_record(options.out, result.as_dict())
        partial.unlink()
    if options.docs is not None:
        _write_pages(result, options.docs)
    return 0 if result.good else 1


def _jobs(given: int | None, device: str) -> int:
    if given is None:
        return (os.cpu_count() or 1) if device == "cpu" else 1
    if given < 1:
        raise ValueError(f"--jobs is a number of processes from 1, not {given}")
    return given


def table(files: list[Path], docs: Path | None) -> int:
    """Make the pages of records: one column per record of faults, the page of the whole matrix if it is among them.

    The table of a record of healthy variations goes into the page that has a place for it, or to stdout; one of
    mutations has a page of its own.

    Raises:
        ValueError: A file is no record, or no folder to write to was given.
    """
    from pytest_qvl.faults.matrix.by_model import NAME, by_model, ordered, read_record
    from pytest_qvl.faults.matrix.healthy_record import SCHEMA, markdown, write_block
    from pytest_qvl.faults.mutation import record as mutations

    variations, others = split_records(files, SCHEMA)
    mutated, faults = split_records(others, mutations.SCHEMA)
    if docs is None and (others or len(variations) != 1):
        raise ValueError("--table makes pages: say where with --docs FOLDER")
    if docs is None:
        sys.stdout.write(markdown(variations[0]) + "\n")
        return 0
    for data in variations:
        write_block(data, docs)
    results = ordered(map(read_record, faults))
    if any(result.variations for result in results):
        require_matplotlib("--docs")
    docs.mkdir(parents=True, exist_ok=True)
    for data in mutated:
        (docs / mutations.NAME).write_text(mutations.page(data), encoding="utf-8")
    if results:
        (docs / NAME).write_text(by_model(results), encoding="utf-8")
    for result in results:
        if result.variations:
            _write_pages(result, docs)
    return 0


def _write_pages(result: Result, docs: Path) -> None:
    from pytest_qvl.faults.matrix.figure import draw_matrix
    from pytest_qvl.faults.matrix.page import page

    docs.mkdir(parents=True, exist_ok=True)
    (docs / "faults.md").write_text(page(result), encoding="utf-8")
    draw_matrix(result, docs / "faults.svg")


def listed() -> str:
    """One line per fault, family by family."""
    from pytest_qvl.faults.matrix.results import faults_in_order

    faults, family = faults_in_order(), ""
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
    why = unshared(fault)
    return "\n".join(
        [
            f"{fault.name} ({fault.family})",
            fault.summary,
            f"damages:    {fault.target}",
            f"caught by:  {fault.check}",
            f"which says: {' … '.join(fault.words())}",
            *([f"needs:      {', '.join(fault.requires)}"] if fault.requires else []),
            f"reference:  {f'never has it: {why}' if why else 'has it too where it is recorded after the damage'}",
            f"silent:     {'yes: Transformers raises nothing' if fault.silent else 'no'}",
            f"from:       {fault.source or 'no thread'}",
        ]
    )
