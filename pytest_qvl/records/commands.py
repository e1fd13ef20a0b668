"""The subcommands that read records: options, and what is printed. Standard library only until a file is read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_compare(commands: Commands) -> None:
    """Register ``pytest-qvl compare``."""
    parser = commands.add_parser(
        "compare",
        help="compare two records of --qvl-record: what broke, was fixed, got worse or better",
        description="Compare two records. Exit code 0: nothing that --fail-on names; 1: something is; 2: they "
        "cannot be compared, or a file is no record.",
    )
    parser.add_argument(
        "old",
        metavar="OLD.json",
        help="a record; or 'shipped': this package's own of the embedded model, with the versions nearest to NEW's; "
        "shipped:transformers5.17.0 chooses one by a version",
    )
    parser.add_argument("new", metavar="NEW.json", help="the record to judge")
    parser.add_argument(
        "--fail-on",
        choices=("regression", "any"),
        default="regression",
        help="exit code 1 for new failures, lost verdicts and worse figures (default), or for any change",
    )
    parser.add_argument("--format", choices=("text", "md", "json"), default="text", help="text (default), md or json")
    parser.set_defaults(run=run_compare)


def run_compare(options: argparse.Namespace) -> int:
    """Compare and print; 1 if ``--fail-on`` names something that changed, else 0.

    Raises:
        RecordError: A file is no record, or the two cannot be compared.
    """
    from pytest_qvl.records.base import base_record, named_record
    from pytest_qvl.records.compare import compare
    from pytest_qvl.records.compare_output import FORMATS

    new = named_record(options.new)
    found = compare(base_record(options.old, new), new)
    print(FORMATS[options.format](found))
    return int(bool(found.regressions if options.fail_on == "regression" else found.changes))


def add_explain(commands: Commands) -> None:
    """Register ``pytest-qvl explain``."""
    parser = commands.add_parser(
        "explain",
        help="explain a check: its promise, method and limits, what usually breaks it, and what to do",
        description="Explain a check of the suite: promise, method, limits, usual causes, known threads, faults.",
    )
    parser.add_argument("check", metavar="CHECK", help="name of a check, such as feature_scatter")
    parser.set_defaults(run=run_explain)


def run_explain(options: argparse.Namespace) -> int:
    """Print the explanation.

    Raises:
        ValueError: No such check.
    """
    from pytest_qvl.records.explain import explain

    print(explain(options.check))
    return 0


def add_report(commands: Commands) -> None:
    """Register ``pytest-qvl report``."""
    parser = commands.add_parser(
        "report",
        help="make the report of a record: HTML, or Markdown for CI",
        description="Make the report of a record: one HTML file without script, to read in any browser, or a summary "
        "in Markdown for a CI job.",
    )
    parser.add_argument("record", metavar="RECORD.json", type=Path, help="a record that --qvl-record wrote")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--html", metavar="FILE.html", type=Path, help="write the page")
    kind.add_argument("--md", metavar="FILE.md", type=Path, help="write the summary")
    parser.add_argument("--base", metavar="OLD.json", help="compare with this record, or with the 'shipped' reference")
    parser.set_defaults(run=run_report)


def run_report(options: argparse.Namespace) -> int:
    """Write the report.

    Raises:
        ValueError: A file is no record, or the page would replace something else.
        OSError: It cannot be written.
    """
    from pytest_qvl.outputs import check_file, replace_file
    from pytest_qvl.records.base import base_record
    from pytest_qvl.records.compare import compare
    from pytest_qvl.records.markdown import run_markdown
    from pytest_qvl.records.page import as_page, check_page
    from pytest_qvl.records.stored import read_record

    if options.html is not None:
        check_file("--html", options.html)
        check_page(options.html)
    else:
        check_file("--md", options.md)
    file, text = (options.html, as_page) if options.html is not None else (options.md, run_markdown)
    for source in (options.record, Path(options.base or "")):
        if file.exists() and source.is_file() and file.samefile(source):
            raise ValueError(f"{file} is the record itself: name another file for the report")
    record = read_record(options.record)
    comparison = None if options.base is None else compare(base_record(options.base, record), record)
    if problem := replace_file(file, text(record, comparison)):
        raise OSError(problem)
    print(file)
    return 0
