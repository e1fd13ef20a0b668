"""Lines that a narrow terminal does not break in the middle of a word."""

from __future__ import annotations

import textwrap
from typing import Any

from pytest_qvl.promises import PROMISES
from pytest_qvl.report.states import STATES

INDENT = " " * len("   11  ")  # of what is said about a promise
TITLE_WIDTH = max(len(promise.title) for promise in PROMISES)
STATE_WIDTH = max(map(len, STATES))
# Columns below which a promise takes lines of its own, and other lines are folded.
NARROW = len(INDENT) + TITLE_WIDTH + len("  ") + STATE_WIDTH
MORE = "  "  # what continues a line is indented by so much more


def write_folded(terminal: Any, text: str, **markup: bool) -> None:
    """Write one line to pytest's terminal reporter, folded to the terminal's width."""
    for line in folded(text, terminal.config.get_terminal_writer().fullwidth):
        terminal.line(line, **markup)


def folded(text: str, width: int) -> list[str]:
    """A line as it is; on a terminal below :data:`NARROW` columns in as many as it takes, indented below the first.

    Args:
        text: One line; its indentation stays.
        width: Of the terminal, in columns.
    """
    if width >= NARROW:
        return [text]
    indent = text[: len(text) - len(text.lstrip())]
    return textwrap.wrap(text, width, subsequent_indent=indent + MORE, break_on_hyphens=False) or [text]
