"""Diagram and table of docs/fixtures.md are those of the declared fixtures."""

from __future__ import annotations

import inspect
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from pytest_qvl import fixtures

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "fixtures.md").read_text(encoding="utf-8")
SOURCE = (ROOT / "pytest_qvl" / "fixtures.py").read_text(encoding="utf-8")
ANOTHER = """
@pytest.fixture
def qvl_first(): "First."

@pytest.fixture(scope="session")
def _qvl_private(qvl_first): ...

@pytest.fixture(scope="session")
def qvl_second(_qvl_private, request): "Second."

@pytest.fixture(scope="session")
def qvl_third(qvl_first, qvl_second): "Third."

def qvl_helper(qvl_first): "None."
"""


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools" / "fixture_tables.py"))


def test_the_page_is_that_of_the_fixtures(tool: dict[str, Any]) -> None:
    assert tool["written"](PAGE, SOURCE) == PAGE, "run: python tools/fixture_tables.py"


def test_every_public_fixture_has_a_row() -> None:
    public = {name for name in vars(fixtures) if name.startswith("qvl_")}
    assert set(re.findall(r"^\| `(qvl_\w+)`", PAGE, re.MULTILINE)) == public
    assert {"qvl_target", "qvl_compute_dtype", "qvl_vram_limit"} <= public


def test_what_a_fixture_takes_is_what_python_says(tool: dict[str, Any]) -> None:
    for name, found in tool["declared"](SOURCE).items():
        taken = [each for each in inspect.signature(getattr(fixtures, name)).parameters if "qvl_" in each]
        assert list(found.takes) == taken, name


def test_private_fixtures_are_passed_through_and_the_longer_way_drawn(tool: dict[str, Any]) -> None:
    edges = tool["public_edges"](tool["declared"](ANOTHER))
    assert edges == {"qvl_first": [], "qvl_second": ["qvl_first"], "qvl_third": ["qvl_first", "qvl_second"]}
    assert tool["reduced"](edges)["qvl_third"] == ["qvl_second"]
    assert "`qvl_first`: made for each test" in tool["block"](ANOTHER)


def test_a_page_without_a_place_is_refused(tool: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the page has no place for the fixtures: write <!-- fixtures"):
        tool["written"]("# Fixtures", SOURCE)
