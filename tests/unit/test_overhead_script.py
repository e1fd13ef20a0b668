"""The arithmetic of ``tests/gpu/overhead.py``: what is set against what, with and without the reference pass."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[1] / "gpu" / "overhead.py"


@pytest.fixture(scope="module")
def overhead():
    spec = importlib.util.spec_from_file_location("overhead", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def whole():
    def usage(allocated, reason=""):
        return {"allocated": allocated, "reserved": allocated + 10, "reason": reason}

    tests = [{"target": "m", "test": "short", "setup": 1.0}, {"target": "m", "test": "long", "setup": 9.0, "call": 5.0}]
    return {
        "seconds": 30.0,
        "cpu_seconds": 40.0,
        "imports": 6.0,
        "reference": 10.0,
        "vram": {"all": usage(300), "after_reference": usage(110)},
        "record": {"seconds_by_test": tests, "environment": {}, "tests": {"passed": 2}},
    }


def script():
    stages = {"imports": 6.0, "reference": 8.0, "load": 2.0, "with adapter": 4.0}
    peaks = {name: {"allocated": size, "reserved": size} for name, size in (("reference", 200), ("with adapter", 100))}
    return {"seconds": 20.0, "cpu_seconds": 20.0, "stages": stages, "peaks": peaks}


def test_ratios_with_and_without_the_reference(overhead):
    result = overhead.compared(whole(), script())
    assert result["ratio_with_reference"] == 30 / 20
    assert result["ratio_without_reference"] == (30 - 10) / (20 - 8)
    assert {name: values["ratio"] for name, values in result["vram"].items()} == {
        "with_reference_allocated": 300 / 200,
        "with_reference_reserved": 310 / 200,
        "without_reference_allocated": 110 / 100,
        "without_reference_reserved": 120 / 100,
    }
    assert [test["test"] for test in result["seconds_by_test"]] == ["long", "short"]
    assert result["outside_tests"] == 30 - 15
    assert "ratio 1.50 with the reference, 1.67 without" in overhead.told(result)


def test_without_cuda_no_ratio_of_memory_is_made_up(overhead):
    cpu = whole()
    cpu["vram"] = {"all": {"allocated": 0, "reserved": 0, "reason": "no CUDA"}}
    assert overhead.compared(cpu, {**script(), "peaks": {}})["vram"] == {}


def test_newer_tests_are_told_apart(overhead):
    suite = whole()
    suite["record"]["seconds_by_test"][1]["test"] = "long[m-cuda]"
    bare = {**script(), "seconds_by_test": {"short": 1.0, "long": 4.0}}
    result = overhead.compared(suite, bare, {"seconds_by_test": [{"test": "short[m-cuda]"}]})
    assert result["newer_tests"] == {"names": ["long"], "suite": 14.0, "script": 4.0}
    assert result["ratio_of_earlier_tests"] == (30 - 14) / (20 - 4)
    assert "1 newer tests 14.0 s, their calls alone 4.0 s; ratio of the others 1.00" in overhead.told(result)


def test_seconds_of_calls_go_to_the_test_that_made_them(overhead, monkeypatch):
    clock = iter([1.0, 3.0, 3.0, 7.0, 7.0, 8.0, 8.0])
    monkeypatch.setattr(overhead, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    spent = {}
    for test in ("one", "one", "other", "one", ""):
        overhead.switched(spent, test)
    assert spent == {"one": 2.0 + 1.0, "other": 4.0}
