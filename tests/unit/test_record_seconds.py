"""The record says where the time of every test went, and what the process needed at its peak."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from pytest_qvl.report.environment import VARIABLES, environment
from pytest_qvl.report.process_results import ProcessResults
from pytest_qvl.report.record import Record, RunRecord
from pytest_qvl.report.report_data import Finding, add_to_report
from pytest_qvl.report.run_results import ResultsBuilder
from pytest_qvl.vram.usage import Usage

CPU = "embedded on cpu"


def report(test, when, seconds, target=CPU):
    made = pytest.TestReport(f"suite/test_x.py::{test}", ("x", 0, test), {}, "passed", None, when, duration=seconds)
    if target is not None:
        add_to_report(made, finding=Finding(target, target, "transformers", None))
    return made


def test_seconds_by_phase_of_each_test_and_vram_as_told(tmp_path):
    session, load = Usage("session", allocated=7), Usage("load", allocated=5)
    builder = ResultsBuilder()
    builder.add_process(ProcessResults(session, (load,)))
    record = Record(tmp_path / "r.json", RunRecord(builder, []))
    for test in ("test_a", "test_b"):
        for when, seconds in (("setup", 3.0), ("call", 0.25), ("teardown", 0.0004)):
            builder.pytest_runtest_logreport(report(test, when, seconds))
    builder.pytest_runtest_logreport(report("test_a", "setup", 1.0, target="embedded on cuda"))
    builder.pytest_runtest_logreport(report("test_of_something_else", "call", 9.0, target=None))
    config = SimpleNamespace(rootpath=tmp_path, invocation_params=SimpleNamespace(args=[]))
    assert list(record.pytest_sessionfinish(SimpleNamespace(config=config, exitstatus=0))) == [None]
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["seconds_by_test"] == [
        {"target": CPU, "test": "test_a", "setup": 3.0, "call": 0.25, "teardown": 0.0},
        {"target": CPU, "test": "test_b", "setup": 3.0, "call": 0.25, "teardown": 0.0},
        {"target": "embedded on cuda", "test": "test_a", "setup": 1.0},
    ]
    assert written["vram"] == {"session": session.as_dict(), "phases": [load.as_dict()]}


def test_variables_that_change_what_is_computed_are_named_where_they_are_set(tmp_path, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert environment(tmp_path)["variables"] == {}
    monkeypatch.setenv("UNSLOTH_COMPILE_DISABLE", "0")
    monkeypatch.setenv("SECRET", "of the user")
    assert environment(tmp_path)["variables"] == {"UNSLOTH_COMPILE_DISABLE": "0"}
