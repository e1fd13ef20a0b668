"""The committed matrix belongs to the faults, checks, probes and variations of this checkout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pytest_qvl.faults import catalogue
from pytest_qvl.faults.matrix.by_model import NAME, by_model, ordered, read_record
from pytest_qvl.faults.matrix.freshness import definitions_digest
from pytest_qvl.faults.matrix.page import page, picture
from pytest_qvl.faults.matrix.results import Result, Row

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RECORDS = sorted((DOCS / "records").glob("faults-*.json"))


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def faults_of(text: str) -> list[str]:
    """The faults that a page has a row for."""
    return re.findall(r"^\| `([\w-]+)` \|", text, flags=re.MULTILINE)


def made(text: str) -> list[str]:
    """Those of them that were made, so that checks judged them."""
    return re.findall(r"^\| `([\w-]+)` \|(?!.*\| not made here: )", text, flags=re.MULTILINE)


def drawn(text: str) -> list[str]:
    """The faults that the picture has a row of squares for."""
    return [name for name in re.findall(r'text-anchor="end">([^<]*)</text>', text) if name in catalogue()]


def test_the_committed_page_is_fresh() -> None:
    text = read("faults.md")
    assert f"definitions {definitions_digest()} " in text, "run pytest-qvl faults --matrix --docs docs"
    assert "**missed**" not in text
    assert "0 false alarms over 200 healthy variations" in text
    assert "checks without a fault that only they catch: none\n" in text


def test_the_committed_page_has_every_fault_and_no_other() -> None:
    """So none is lost without a word, and none added without being judged."""
    assert faults_of(read("faults.md")) == list(catalogue())


def test_the_picture_has_every_fault_that_was_made() -> None:
    assert drawn(read("faults.svg")) == made(read("faults.md"))


def test_a_fault_missing_from_page_or_picture_would_be_seen() -> None:
    names = list(catalogue())[:3]
    row = Row(check="feature_scatter", outcomes={"feature_scatter": "caught"}, named=True, smoke="pass")
    rows = {names[0]: row, names[1]: Row(missing="CPU only"), names[2]: row}
    result = Result("d", {}, rows=rows)
    assert faults_of(page(result)) == names
    assert made(page(result)) == [names[0], names[2]]
    assert drawn(picture(result)) == [names[0], names[2]]


def test_the_readme_counts_them() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"**And it can fail.** {len(catalogue())} deliberate faults" in readme
    assert "Every check has a fault that only it catches" in " ".join(readme.split())
    for figures in re.findall(r"^- (\d+) of (\d+) faults (?:raise|caught)", read("faults.md"), flags=re.MULTILINE):
        assert all(figure in readme for figure in figures)


@pytest.mark.skipif(not RECORDS, reason="no record of faults is committed")
def test_the_page_by_model_is_that_of_the_records() -> None:
    assert read(NAME) == by_model(ordered(map(read_record, RECORDS)))
