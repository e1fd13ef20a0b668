"""The committed record of what ``pytest-qvl compare`` says of faults: each by its own check, and no check missing."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from pytest_qvl.faults.catalogue import find

ROOT = Path(__file__).parents[2]
TOLD = json.loads((ROOT / "docs" / "records" / "compare-embedded-cpu.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(ROOT / "tools" / "compare_runs.py"))


def test_every_fault_is_one_of_the_catalogue_and_has_its_check(tool):
    assert {name: find(name).check for name in tool["FAULTS"]} == tool["FAULTS"]


def test_each_fault_was_named_by_its_check_and_by_all_that_the_matrix_has():
    faults = TOLD["faults"]
    assert len(faults) >= 16
    for name, told in faults.items():
        assert told["check"] in told["regressions"], name
        assert told["missing"] == [], name
        assert told["first"] or set(told["regressions"]) == set(told["matrix"]), name


def test_nothing_changed_where_nothing_had():
    if "seeds" not in TOLD:
        pytest.skip("no run is recorded against itself yet: python tools/compare_runs.py seeds")
    for seed, settings in TOLD["seeds"].items():
        assert [told["changes"] for told in settings.values() if told["changes"]] == [], seed
