"""The committed record of what ``pytest-qvl compare`` says of faults: each by its own check, and no check missing."""

from __future__ import annotations

import json
import runpy
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pytest_qvl.faults.catalogue import find
from pytest_qvl.faults.matrix.freshness import definitions_digest
from pytest_qvl.records.stored import read_record

ROOT = Path(__file__).parents[2]
TOLD = json.loads((ROOT / "docs" / "records" / "compare-embedded-cpu.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(ROOT / "tools" / "compare_runs.py"))


def test_every_fault_is_one_of_the_catalogue_and_has_its_check(tool):
    assert {name: find(name).check for name in tool["FAULTS"]} == tool["FAULTS"]


def test_each_fault_was_named_by_its_check_and_by_all_that_the_matrix_has(tool):
    faults = TOLD["faults"]
    assert faults.keys() == tool["FAULTS"].keys()
    for name, told in faults.items():
        assert tool["named_rightly"](name, told), name
        assert told["first"] or set(told["regressions"]) == set(told["matrix"]), name
    assert sum(set(told["regressions"]) == set(told["matrix"]) for told in faults.values()) >= 20


def test_a_fault_that_is_named_by_another_check_alone_or_by_too_few_is_wrong(tool):
    told = {"check": "causality", "regressions": ["causality", "batch"], "missing": []}
    assert tool["named_rightly"]("features-scaled", told)
    assert not tool["named_rightly"]("features-scaled", {**told, "missing": ["mrope_positions"]})
    for name in ("features-scaled", *tool["BY_ORDER"]):
        assert not tool["named_rightly"](name, {**told, "regressions": ["batch"]})


def test_what_is_recorded_of_faults_is_of_todays_checks(tool):
    stale = [name for name, told in TOLD["faults"].items() if told["definitions"] != tool["_definitions"](name)]
    if stale:
        pytest.skip(f"{len(stale)} faults were compared with earlier checks: python tools/compare_runs.py faults")


def test_nothing_changed_where_nothing_had():
    if "seeds" not in TOLD:
        pytest.skip("no run is recorded against itself yet: python tools/compare_runs.py seeds")
    for seed, settings in TOLD["seeds"]["by_seed"].items():
        assert settings.keys() == set(TOLD["seeds"]["settings"]), seed
        for setting, told in settings.items():
            assert (told["changes"], told["red"]) == ([], {}), (seed, setting)
            assert told["verdict"].startswith("nothing changed: "), (seed, setting)


def test_runs_of_seeds_are_of_todays_checks():
    if "seeds" in TOLD and TOLD["seeds"]["definitions"] != definitions_digest():
        pytest.skip("runs were compared with themselves by earlier checks: python tools/compare_runs.py seeds")


def test_no_run_is_started_that_would_not_end_in_time(tool, capsys):
    with ThreadPoolExecutor(2) as pool:
        ended = [
            task for task, _ in tool["_in_time"](pool, 2, 0.5, lambda n: time.sleep(0.3), [(n,) for n in range(9)])
        ]
    assert sorted(ended) == [(0,), (1,)]
    assert capsys.readouterr().out.startswith("7 left for the next call")


def test_what_is_red_in_both_runs_is_said(tool):
    """Two broken runs may be equal."""
    record = read_record(ROOT / "docs" / "records" / "h200-embedded.json")
    assert tool["_unchanged"](record, record)["red"] == {}
    broken = next(one for one in record["checks"] if one["check"] == "causality")
    broken.update(problems=["it broke"], outcome="failed")
    told = tool["_unchanged"](record, record)
    assert (told["changes"], told["red"]) == ([], {"causality": "it broke"})
