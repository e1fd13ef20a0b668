"""The page of collators is what its records give, and every finding has its row there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pytest_qvl.checks.batches.findings import KINDS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
RECORDS = sorted((DOCS / "records").glob("collators-*.json"))
# Findings that only rows of their own can have: cut, packed, video.
OF_CASES = {"image-truncated", "packed-not-separated", "packed-apart"}


@pytest.fixture(autouse=True)
def _tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in RECORDS]


def test_the_page_is_what_the_records_give(records: list[dict[str, Any]]) -> None:
    from collating.frameworks import FRAMEWORKS
    from collating.page import page

    ordered = sorted(records, key=lambda record: list(FRAMEWORKS).index(record["framework"]))
    assert (DOCS / "collators.md").read_text(encoding="utf-8") == page(ordered), "run: python tools/collators.py --page"


def test_five_frameworks_are_asked_for_twelve_properties_in_three_families(records: list[dict[str, Any]]) -> None:
    assert len(records) >= 5
    for record in records:
        asked = {(cell["family"], cell["set_up"], cell["property"]) for cell in record["cells"]}
        assert len(asked) == len(record["cells"])
        assert len({name for _, _, name in asked}) >= 12
        assert len({family for family, _, _ in asked}) == 3


def test_every_cell_that_is_not_green_says_why_and_every_red_one_is_shown(records: list[dict[str, Any]]) -> None:
    for record in records:
        shown = {(c["set_up"], c["property"]) for c in record["cells"] if "reproducer" in c}
        for cell in record["cells"]:
            if cell["verdict"] == "not judged":
                assert cell["why"]
            if cell["verdict"] == "red":
                assert cell["why"] or cell["findings"]
                assert (cell["set_up"], cell["property"]) in shown
            if "reproducer" in cell:
                assert len([line for line in cell["reproducer"].splitlines() if line.strip()]) <= 20
                assert_shows(cell)


def assert_shows(cell: dict[str, Any]) -> None:
    """What its lines raised is what the cell is red for."""
    for finding in cell["findings"]:
        assert finding["kind"] in cell["raised"]
    if not cell["findings"]:
        assert cell["raised"].partition(":")[0] in cell["why"]


def test_no_record_names_a_folder_of_the_machine_it_was_made_on() -> None:
    for path in RECORDS:
        assert not re.search(r"/(tmp|home|root|work|Users)/", path.read_text(encoding="utf-8"))


def test_every_kind_of_finding_breaks_a_property() -> None:
    from collating.properties import PROPERTIES

    assert {kind for each in PROPERTIES for kind in each.kinds} | OF_CASES == set(KINDS)


def test_what_is_known_of_a_red_cell_is_about_one_that_is_red(records: list[dict[str, Any]]) -> None:
    from collating import known

    red = {(r["framework"], c["set_up"], c["property"]) for r in records for c in r["cells"] if c["verdict"] == "red"}
    assert not known._KNOWN.keys() - red


def test_what_a_property_needs_is_said_by_the_check_in_these_words() -> None:
    """Else a property that was not judged would be green."""
    from collating.properties import PROPERTIES

    sources = (ROOT / "pytest_qvl" / "checks" / "batches").glob("*.py")
    said = [name for path in sources for name in re.findall(r'unjudged\[f?"([^"{]+)', path.read_text(encoding="utf-8"))]
    needed = {name for each in PROPERTIES for name in each.needs}
    assert needed
    assert {name for name in needed if not any(each.startswith(name) for each in said)} == set()


def test_a_finding_counts_once_for_rows_of_their_own() -> None:
    from collating.properties import is_new

    plain = [{"kind": "whole-row-learned"}]
    assert not is_new({"kind": "prompt-learned"}, plain)
    assert is_new({"kind": "image-truncated"}, plain)


def test_placeholders_are_learned_where_the_whole_row_is() -> None:
    from collating.properties import PROPERTIES

    asked = next(each for each in PROPERTIES if "images-learned" in each.kinds)
    assert asked.broken_by({"kind": "whole-row-learned", "found": "every token, image placeholders included"})
    assert not asked.broken_by({"kind": "whole-row-learned", "found": "every token, image placeholders left out"})
