"""Commands for the reader to run. Standard library only."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

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
    return " ".join([*words, *map(shlex.quote, more), "-k", shlex.quote(tests)])
