"""Commands for the reader to run, and red findings, each of which ends with one. Standard library only."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from pytest_qvl.preflight.findings import Finding

if TYPE_CHECKING:
    from pytest_qvl.preflight.subject import Subject

SUITE = "pytest --pyargs pytest_qvl.suite"


def pytest_line(subject: Subject, tests: str = "preflight", *more: str) -> str:
    """The command that asks the same of the same model in every run.

    Args:
        subject: The model and the adapter.
        tests: What to select (``-k``); ``preflight`` needs neither weights nor a GPU.
        more: Other options.
    """
    base = subject.base
    model = (
        f"synthetic:{base.released}" if base.released and base.released == subject.asked.base else subject.asked.base
    )
    words = [SUITE, "--qvl-model", shlex.quote(model)]
    if subject.asked.adapter is not None:
        words += ["--qvl-adapter", shlex.quote(str(subject.asked.adapter))]
    layers = "" if subject.asked.layers is None else str(subject.asked.layers)
    if layers not in ("", "language"):
        words += ["--qvl-quantized-layers", shlex.quote(layers)]
    return " ".join([*words, *map(shlex.quote, more), "-k", shlex.quote(tests)])


def red(
    number: int, subject: Subject, name: str, line: str, *, cause: str, fix: str, notes: tuple[str, ...] = ()
) -> Finding:
    """A red finding of one question about a subject; fields as of :class:`Finding`."""
    return Finding(number, name, "red", line, cause, fix, pytest_line(subject), notes)
