"""VRAM numbers of limits and phases in JUnit and in pytest-benchmark's JSON, in runs whose GPU is a script."""

from __future__ import annotations

import json
from xml.etree import ElementTree as ET

import pytest

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

CONFTEST = """
import pytest
from pytest_qvl.session.limit_vram import LIMIT_VRAM_HELP, VramLimits
from pytest_qvl.session.vram_properties import PhaseNumbers
from pytest_qvl.vram.meter import Meter
from pytest_qvl.vram.scripted import ScriptedAllocator

CARD = ScriptedAllocator(started={started})
METER = Meter(CARD, context=600 << 20)

def pytest_configure(config):
    config.addinivalue_line("markers", LIMIT_VRAM_HELP)
    config.pluginmanager.register(VramLimits(config, METER, default=None, required=False))
    config.pluginmanager.register(PhaseNumbers(METER))

@pytest.fixture
def take():
    def take(mib):
        with CARD.taken(mib << 20):
            pass
    return take

@pytest.fixture(scope="session")
def qvl_vram():
    return METER
"""

TESTS = """
import pytest

def test_before(take): take(900)

@pytest.mark.limit_vram("2 GiB")
def test_limited(benchmark, take): benchmark.pedantic(take, (100,))

@pytest.mark.limit_vram("2 GiB", of="reserved", scope="test")
def test_limited_with_set_up(benchmark, take): benchmark.pedantic(take, (100,))

def test_measured(benchmark, take, qvl_vram):
    def work():
        with qvl_vram.phase("Train step (8-bit)"):
            take(next(sizes))
    sizes = iter((50, 200, 70))
    benchmark.pedantic(work, rounds=3)
    with qvl_vram.phase("save"): take(10)

def test_measured_without_benchmark(qvl_vram, take):
    with qvl_vram.phase("save"): take(20)
    raise ValueError
"""

SAVED = {"qvl_vram_save_allocated": 20, "qvl_vram_save_reserved": 20, "qvl_vram_save_fit": 620}
EXPECTED = {
    "test_limited": {"qvl_vram_call_allocated": 100, "qvl_vram_call_reserved": 100, "qvl_vram_call_fit": 700},
    "test_limited_with_set_up": {
        "qvl_vram_test_allocated": 100,
        "qvl_vram_test_reserved": 100,
        "qvl_vram_test_fit": 700,
    },
    "test_measured": {
        "qvl_vram_train_step_8_bit_allocated": 200,
        "qvl_vram_train_step_8_bit_reserved": 200,
        "qvl_vram_train_step_8_bit_fit": 800,
        "qvl_vram_save_allocated": 10,
        "qvl_vram_save_reserved": 10,
        "qvl_vram_save_fit": 610,
    },
}


def properties(pytester):
    cases = ET.parse(pytester.path / "out.xml").iter("testcase")
    return {c.get("name"): {p.get("name"): int(p.get("value")) for p in c.iter("property")} for c in cases}


def test_numbers_go_to_junit_and_to_benchmarks(pytester, monkeypatch):
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):  # benchmarks write nothing in a worker
        monkeypatch.delenv(name, raising=False)
    pytester.makeconftest(CONFTEST.format(started=True))
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_inprocess("-p", "no:qvl", "--junitxml=out.xml", "--benchmark-json=out.json")
    result.assert_outcomes(passed=4, failed=1)
    in_bytes = {test: {name: mib << 20 for name, mib in numbers.items()} for test, numbers in EXPECTED.items()}
    benchmarks = json.loads((pytester.path / "out.json").read_text())["benchmarks"]
    assert {benchmark["name"]: benchmark["extra_info"] for benchmark in benchmarks} == in_bytes
    saved = {name: mib << 20 for name, mib in SAVED.items()}
    assert properties(pytester) == in_bytes | {"test_before": {}, "test_measured_without_benchmark": saved}


def test_what_is_not_measured_is_no_number(pytester):
    pytester.makeconftest(CONFTEST.format(started=False).replace("CARD.taken(mib << 20)", "METER.phase('nothing')"))
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_inprocess("-p", "no:qvl", "--junitxml=out.xml")
    result.assert_outcomes(passed=4, failed=1)
    assert set(map(len, properties(pytester).values())) == {0}
