"""The arithmetic of ``tests/gpu/overhead.py``: what is set against what, with and without the reference pass."""

from __future__ import annotations

import importlib.util
from pathlib import Path

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
