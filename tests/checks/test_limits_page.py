"""docs/limits.md derives every limit that a docstring points at, with the numbers that the code has."""

from __future__ import annotations

import importlib
import math
import re
from functools import reduce
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
ANCHOR = re.compile(r"limits\.md#([\w-]+)")
ROWS = re.findall(r"^\| `([\w.]+)` \| (\S+) \| \[[^]]+\]\(#([\w-]+)\) \|$", PAGE, re.MULTILINE)


# How prose says numbers, beside their digits.
WORDS = {1e-4: "10,000", 0.25: "quarter", 0.5: "half", 1: "one", 2: "two", 3: "three", 4: "four", 10: "ten"}
MIB = 2**20
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def sections() -> dict[str, str]:
    """Text by the anchor of its heading, as GitHub makes them."""
    parts = [part.partition("\n") for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]]
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-"): text for title, _, text in parts}


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
    assert inside <= sections().keys()


def test_every_section_is_named_by_a_docstring() -> None:
    checks = {anchor for anchor, files in named().items() if any(file.endswith(".py") for file in files)}
    assert sections().keys() - checks == set()


def test_the_table_is_read() -> None:
    assert len(ROWS) == len(re.findall(r"^\| `", PAGE, re.MULTILINE)) >= 15


@pytest.mark.parametrize(("name", "value", "section"), ROWS, ids=[name for name, *_ in ROWS])
def test_a_number_of_the_table_is_that_of_the_code(name: str, value: str, section: str) -> None:
    parts = name.split(".")
    depth = 2 if parts[0] in ("support", "batches", "oracles") else 1
    package = "pytest_qvl" if parts[0] == "oracles" else "pytest_qvl.checks"
    module = importlib.import_module(f"{package}.{'.'.join(parts[:depth])}")
    assert reduce(getattr, parts[depth:], module) == float(value)
    assert section in sections()


@pytest.mark.parametrize(("name", "value", "section"), ROWS, ids=[name for name, *_ in ROWS])
def test_the_section_of_a_number_has_it_in_its_text(name: str, value: str, section: str) -> None:
    """Else the table was kept up to date, and the derivation below it was not."""
    number = float(value)
    forms = {value, f"{100 * number:g} %", WORDS.get(number, value), f"{number / MIB:g} MiB"}
    if math.log2(number).is_integer():
        power = str(int(math.log2(number)))
        forms |= {f"2^{power}", f"2{power.translate(RAISED)}"}
    text = sections()[section].casefold()
    said = [form for form in forms if re.search(rf"(?<![\w.,]){re.escape(form.casefold())}(?!\w|[.,]\d)", text)]
    assert said, f"none of {', '.join(sorted(forms))} in section {section}, which derives {name}"
