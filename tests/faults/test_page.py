"""The committed matrix belongs to the faults, checks, probes and variations of this checkout."""

from __future__ import annotations

from pathlib import Path

from pytest_qvl.faults import catalogue
from pytest_qvl.faults.freshness import definitions_digest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_the_committed_page_is_fresh() -> None:
    page = (DOCS / "faults.md").read_text(encoding="utf-8")
    assert f"definitions {definitions_digest()} " in page, "run pytest-qvl faults --matrix --docs docs"
    missing = [name for name in catalogue() if f"| `{name}` |" not in page]
    assert missing == []
    assert "**missed**" not in page
    assert "0 false alarms over 200 healthy variations" in page
    assert "checks without a fault that only they catch: none" in page


def test_the_picture_has_every_fault() -> None:
    picture = (DOCS / "faults.svg").read_text(encoding="utf-8")
    page = (DOCS / "faults.md").read_text(encoding="utf-8")
    assert [n for n in catalogue() if f">{n}<" not in picture and f"| `{n}` |" not in page] == []


def test_the_readme_counts_them() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"**And it can fail.** {len(catalogue())} deliberate faults" in readme
