"""The command ``pytest-qvl``: what can be asked without a test run.

Each subcommand is added by one function and sets ``run`` to one that takes the parsed options and returns the
exit code. Invalid input (a ``ValueError``) and a file that cannot be read or written (an ``OSError``) become one line
on stderr and exit code 2, as for a mistyped option. Where nobody reads stdout any more, as behind ``| head``, a command
ends without a word, and with the exit code of one that SIGPIPE ended.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
from typing import TYPE_CHECKING, TypeAlias

from pytest_qvl import __version__
from pytest_qvl.data.command import add_data
from pytest_qvl.faults.command import add_faults
from pytest_qvl.models.sources.command import add_synthesize
from pytest_qvl.preflight.command import add_preflight
from pytest_qvl.records.commands import add_compare, add_explain, add_report
from pytest_qvl.vram.forecast.command import add_forecast

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
SUBCOMMANDS: tuple[Callable[[Commands], None], ...] = (
    add_preflight,
    add_forecast,
    add_data,
    add_compare,
    add_report,
    add_explain,
    add_faults,
    add_synthesize,
)


def parser() -> argparse.ArgumentParser:
    """The command line with all subcommands."""
    top = argparse.ArgumentParser(prog="pytest-qvl", description="What needs no test run.")
    top.add_argument("--version", action="version", version=f"pytest-qvl {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in SUBCOMMANDS:
        add(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (2 for invalid input).

    Args:
        arguments: By default those of the process, which then does nothing else.
    """
    options = parser().parse_args(arguments)
    options.own_process = arguments is None
    try:
        code: int = options.run(options)
        print(end="", flush=True)  # here, where what cannot be written is one line
    except (ValueError, OSError) as error:  # a disk that fills up while the work is done
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own last flush
            return 128 + signal.SIGPIPE
        from pytest_qvl.records.compare_output import one_line

        print(one_line(f"pytest-qvl {options.command}: error: {error}"), file=sys.stderr)
        return 2
    return code


def _nobody_reads() -> bool:
    """Whether stdout is a pipe that nobody reads any more, and not one to a process of our own that broke."""
    stdout = select.poll()
    stdout.register(sys.stdout, 0)
    return bool(stdout.poll(0))


if __name__ == "__main__":
    sys.exit(main())
