"""The record says where the time of every test went, and what the process needed at its peak."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from pytest_qvl.report.record import VARIABLES, Record, environment
from pytest_qvl.session.report_data import Finding, add_to_report

CPU = "embedded on cpu"


def report(test, when, seconds, target=CPU):
    made = pytest.TestReport(f"suite/test_x.py::{test}", ("x", 0, test), {}, "passed", None, when, duration=seconds)
    if target is not None:
        add_to_report(made, finding=Finding(target, target, "transformers", None))
    return made


def test_seconds_by_phase_of_each_test_and_vram_as_told(tmp_path):
    vram = {"session": {"name": "session", "allocated": 7}, "phases": []}
    record = Record(tmp_path / "r.json", [], [lambda: {"vram": vram}])
    for test in ("test_a", "test_b"):
        for when, seconds in (("setup", 3.0), ("call", 0.25), ("teardown", 0.0004)):
            record.pytest_runtest_logreport(report(test, when, seconds))
    record.pytest_runtest_logreport(report("test_a", "setup", 1.0, target="embedded on cuda"))
    record.pytest_runtest_logreport(report("test_of_something_else", "call", 9.0, target=None))
    config = SimpleNamespace(rootpath=tmp_path, invocation_params=SimpleNamespace(args=[]))
    assert list(record.pytest_sessionfinish(SimpleNamespace(config=config, exitstatus=0))) == [None]
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["seconds_by_test"] == [
        {"target": CPU, "test": "test_a", "setup": 3.0, "call": 0.25, "teardown": 0.0},
        {"target": CPU, "test": "test_b", "setup": 3.0, "call": 0.25, "teardown": 0.0},
        {"target": "embedded on cuda", "test": "test_a", "setup": 1.0},
    ]
    assert written["vram"] == vram


def test_variables_that_change_what_is_computed_are_named_where_they_are_set(tmp_path, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert environment(tmp_path)["variables"] == {}
    monkeypatch.setenv("UNSLOTH_COMPILE_DISABLE", "0")
    monkeypatch.setenv("SECRET", "of the user")
    assert environment(tmp_path)["variables"] == {"UNSLOTH_COMPILE_DISABLE": "0"}
