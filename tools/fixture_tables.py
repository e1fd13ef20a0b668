"""Write the diagram and the table of docs/fixtures.md from the declarations in ``pytest_qvl/fixtures.py``.

Usage: ``python tools/fixture_tables.py``, after a fixture was added, or takes another fixture than before.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from pytest_qvl.options import SETTINGS
from pytest_qvl.outputs import between_marks

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "pytest_qvl" / "fixtures.py"
PAGE = ROOT / "docs" / "fixtures.md"
BEGIN = "<!-- fixtures: written by `python tools/fixture_tables.py` -->"
END = "<!-- end of fixtures -->"


@dataclass(frozen=True)
class Fixture:
    """One fixture as it is declared.

    Attributes:
        name: Its name; private ones begin with an underscore.
        takes: The fixtures of this package that it takes as arguments.
        scope: How long its value lives.
        gives: First line of its docstring.
    """

    name: str
    takes: tuple[str, ...]
    scope: str
    gives: str


def declared(source: str) -> dict[str, Fixture]:
    """Every fixture of a module, by name and in its order."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and (scope := _scope(node)):
            takes = tuple(arg.arg for arg in node.args.args if "qvl_" in arg.arg)
            found[node.name] = Fixture(node.name, takes, scope, (ast.get_docstring(node) or "").partition("\n")[0])
    return found


def _scope(node: ast.FunctionDef) -> str:
    """The scope of a fixture; empty for any other function."""
    for decorator in map(ast.unparse, node.decorator_list):
        if decorator.startswith("pytest.fixture"):
            named = re.search(r"scope='(\w+)'", decorator)
            return named[1] if named else "function"
    return ""


def public_edges(fixtures: dict[str, Fixture]) -> dict[str, list[str]]:
    """For each public fixture the public ones that it takes, itself or through private ones."""

    def reached(name: str) -> list[str]:
        near = (reached(taken) if taken.startswith("_") else [taken] for taken in fixtures[name].takes)
        return list(dict.fromkeys(chain.from_iterable(near)))

    return {name: reached(name) for name in fixtures if not name.startswith("_")}


def reduced(edges: dict[str, list[str]]) -> dict[str, list[str]]:
    """The same without what a longer way says already."""

    def behind(name: str) -> set[str]:
        return {name}.union(*(behind(taken) for taken in edges[name]))

    return {
        name: [t for t in takes if not any(t in behind(other) for other in takes if other != t)]
        for name, takes in edges.items()
    }


def block(source: str) -> str:
    """The diagram and the table."""
    fixtures = declared(source)
    edges = public_edges(fixtures)
    flags = {f"qvl_{setting.name.removeprefix('qvl_')}": setting.flag for setting in SETTINGS}
    arrows = [f"  {taken} --> {name}" for name, takes in reduced(edges).items() for taken in takes]
    rows = [
        f"| `{name}` | {fixtures[name].gives.replace('``', '`')} | {', '.join(f'`{taken}`' for taken in takes)} | "
        f"{f'`{flags[name]}`' if name in flags else ''} |"
        for name, takes in edges.items()
    ]
    short = [name for name in edges if fixtures[name].scope != "session"]
    lines = [
        "```mermaid",
        "flowchart LR",
        *arrows,
        "```",
        "",
        "| fixture | what it gives | made from | flag |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        f"All have the scope `session`, except {', '.join(f'`{name}`' for name in short)}: made for each test.",
    ]
    return "\n".join(lines)


def written(page: str, source: str) -> str:
    """The page with its block made anew.

    Raises:
        ValueError: The page has no place for it.
    """
    missing = f"the page has no place for the fixtures: write {BEGIN} and {END} there"
    return between_marks(page, BEGIN, END, f"\n\n{block(source)}\n\n", missing=missing)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), SOURCE.read_text(encoding="utf-8")), encoding="utf-8")
