"""docs/limits.md derives every limit that a docstring points at, with the numbers that the code has."""

from __future__ import annotations

import importlib
import re
from functools import reduce
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
ANCHOR = re.compile(r"limits\.md#([\w-]+)")
ROWS = re.findall(r"^\| `([\w.]+)` \| (\S+) \| \[[^]]+\]\(#([\w-]+)\) \|$", PAGE, re.MULTILINE)


def sections() -> set[str]:
    """The anchors of the page's headings, as GitHub makes them."""
    titles = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def named() -> dict[str, list[str]]:
    """The anchors that code and pages name, each with the files that do."""
    found: dict[str, list[str]] = {}
    files = [*(ROOT / "pytest_qvl").rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    for file in files:
        for anchor in ANCHOR.findall(file.read_text(encoding="utf-8")):
            found.setdefault(anchor, []).append(file.name)
    return found


def test_every_anchor_that_is_named_exists() -> None:
    assert {anchor: files for anchor, files in named().items() if anchor not in sections()} == {}
    inside = set(re.findall(r"\]\(#([\w-]+)\)", PAGE))
    assert inside <= sections()


def test_every_section_is_named_by_a_docstring() -> None:
    checks = {anchor for anchor, files in named().items() if any(file.endswith(".py") for file in files)}
    assert sections() - checks == set()


def test_the_table_is_read() -> None:
    assert len(ROWS) == len(re.findall(r"^\| `", PAGE, re.MULTILINE)) >= 15


@pytest.mark.parametrize(("name", "value", "section"), ROWS, ids=[name for name, *_ in ROWS])
def test_a_number_of_the_table_is_that_of_the_code(name: str, value: str, section: str) -> None:
    parts = name.split(".")
    depth = 2 if parts[0] in ("support", "oracles") else 1
    package = "pytest_qvl" if parts[0] == "oracles" else "pytest_qvl.checks"
    module = importlib.import_module(f"{package}.{'.'.join(parts[:depth])}")
    assert reduce(getattr, parts[depth:], module) == float(value)
    assert section in sections()
