"""The subcommand ``pytest-qvl data``: its options, and what is printed."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, TypeAlias

from pytest_qvl.checks.support.wording import some
from pytest_qvl.evidence import printable

if TYPE_CHECKING:
    from pytest_qvl.data.judged import Judged

    Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

ROWS, PER_BATCH = 16, 4


def add_data(commands: Commands) -> None:
    """Register ``pytest-qvl data``."""
    parser = commands.add_parser(
        "data",
        help="judge what a collator makes of a data set's rows: placeholders, pixels, masks, positions, labels",
        description="Collate rows of a data set and judge each batch, without a forward pass or weights. Exit code 0: "
        "nothing was found; 1: something was; 2: invalid input.",
    )
    parser.add_argument(
        "--dataset",
        metavar="MODULE:NAME",
        help="rows with len() and indices, or a function that returns them; MODULE is a module or a script. Rows with "
        "messages and images are compared with the batch. Default: samples of the suite",
    )
    parser.add_argument(
        "--collator",
        metavar="MODULE:NAME",
        help="a function from a list of rows to a batch; one with an argument called processor makes such a function. "
        "Default: that of the suite, which takes its samples only",
    )
    parser.add_argument("--model", default="embedded", help="as for --qvl-model: its configuration and its processor")
    parser.add_argument("--rows", type=int, default=ROWS, metavar="N", help=f"how many rows at most (default {ROWS})")
    parser.add_argument(
        "--batch-size", type=int, default=PER_BATCH, metavar="N", help=f"rows of a batch (default {PER_BATCH})"
    )
    parser.add_argument("--inference", action="store_true", help="leave labels unjudged")
    parser.add_argument("--json", action="store_true", help="print findings, figures and notes as JSON")
    parser.set_defaults(run=run_data)


def run_data(options: argparse.Namespace) -> int:
    """Judge and print; 1 if anything was found, else 0.

    Raises:
        ValueError: An option cannot be used; says why.
    """
    for option in ("rows", "batch_size"):
        if getattr(options, option) < 1:
            flag = option.replace("_", "-")
            raise ValueError(f"--{flag} must be at least 1, got {getattr(options, option)}")
    from pytest_qvl.data.judged import Source, judge

    source = Source(options.model, options.dataset, options.collator)
    judged = judge(source, rows=options.rows, per_batch=options.batch_size, training=not options.inference)
    if options.json:
        print(json.dumps({"model": options.model, "batches": [_plain(each) for each in judged]}, indent=1))
    else:
        print(printable("\n".join(_lines(options.model, judged))))
    return int(any(each.findings for each in judged))


def _plain(judged: Judged) -> dict[str, object]:
    """One batch as plain data."""
    return {
        "rows": list(judged.rows),
        "findings": [asdict(finding) for finding in judged.findings],
        "figures": {figure.name: figure.value for figure in judged.evidence.figures if not figure.relation},
        "notes": list(judged.evidence.notes),
    }


def _lines(model: str, judged: list[Judged]) -> list[str]:
    lines = [f"model    {model}"]
    for number, each in enumerate(judged):
        count = len(each.findings)
        said = f"{count} finding{'' if count == 1 else 's'}" if count else "nothing found"
        lines += ["", f"batch {number} (rows {', '.join(map(str, each.rows))}): {said}"]
        for kind, group in groupby(each.findings, key=attrgetter("kind")):
            first, *others = group
            also = f" (also {some([finding.place for finding in others], '; ')})" if others else ""
            lines += [
                f"  {kind}: {first.place}{also}",
                f"    found:    {first.found}",
                f"    expected: {first.expected}",
                f"    cause:    {first.cause}",
            ]
        lines += [f"  note: {note}" for note in each.evidence.notes]
    total = sum(len(each.findings) for each in judged)
    return [*lines, "", f"{total} findings in {len(judged)} batches of {sum(len(each.rows) for each in judged)} rows"]
