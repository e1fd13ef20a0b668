"""Write the tables of docs/checks.md: per promise its checks, their arguments, and the first line of each docstring.

Usage: ``python tools/check_tables.py``, after a check was added or its docstring changed.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from pytest_qvl import checks
from pytest_qvl.checks.declared import declared
from pytest_qvl.promises import PROMISES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "checks.md"
HEAD = "| check | what it proves |\n| --- | --- |\n"
TABLE = re.compile(r"(^## (\d+)\. .*\n\n)" + re.escape(HEAD) + r"(?:\|.*\n)*", re.MULTILINE)
SHOWN = 7  # arguments; of more, only those without a default are named


def row(name: str) -> str:
    """One line of a table."""
    check = getattr(checks, name)
    given = list(inspect.signature(check).parameters.values())
    words = [p.name if p.default is p.empty else f"{p.name}=…" for p in given]
    if len(words) > SHOWN:
        words = [word for word in words if "=" not in word] + ["…"]
    return f"| `{name}({', '.join(words)})` | {(inspect.getdoc(check) or '').splitlines()[0]} |\n"


def tables(page: str) -> str:
    """The page with its tables made anew; a promise without a heading ``## number. title`` gets none."""

    def table(found: re.Match[str]) -> str:
        number = int(found[2])
        rows = (row(each.name) for each in declared().values() if each.promise == number)
        title = PROMISES[number - 1].title
        return f"## {number}. {title[0].upper()}{title[1:]}\n\n{HEAD}{''.join(rows)}"

    return TABLE.sub(table, page)


if __name__ == "__main__":
    PAGE.write_text(tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
