"""Lines that a narrow terminal does not break in the middle of a word."""

from __future__ import annotations

import textwrap

NARROW = 64  # columns below which a promise takes lines of its own
MORE = "  "  # what continues a line is indented by so much more


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
