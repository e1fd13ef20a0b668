"""The report in Chromium, held to axe-core; the quicker sibling, without a browser, is test_page.py.

Runs where Chromium is installed and ``QVL_AXE`` names axe-core's ``axe.min.js``, which ``npm pack axe-core`` brings.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

from pytest_qvl.records.stored import read_record

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tool():
    found = importlib.util.spec_from_file_location("check_page", ROOT / "tools" / "check_page.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def axe(tool):
    if not any(map(shutil.which, tool.BROWSERS)):
        pytest.skip("Chromium is not installed")
    if not os.environ.get("QVL_AXE"):
        pytest.skip("QVL_AXE does not name axe-core's axe.min.js (npm pack axe-core)")
    return Path(os.environ["QVL_AXE"]).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pages(tool):
    return tool.pages(read_record(ROOT / "docs" / "records" / "h200-embedded.json"))


@pytest.mark.parametrize("width", [1100, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_is_found(tool, axe, pages, width, scheme):
    found = tool.judged(pages["broken"], axe, width=width, scheme=tool.SCHEMES[scheme])
    assert (found["width"], found["dark"]) == (width, scheme == "dark")
    assert found["passes"] > 30
    assert tool.wrong(found) == []


def test_a_page_that_shuts_people_out_is_found(tool, axe, pages):
    worse = pages["as it is"].replace("</main>", '<img src="data:,"><p style="color:#bbb;width:99em">faint</p></main>')
    assert worse != pages["as it is"]
    told = " ".join(tool.wrong(tool.judged(worse, axe, width=390, scheme=tool.SCHEMES["light"])))
    assert "image-alt" in told and "color-contrast" in told and "pixels wide" in told
