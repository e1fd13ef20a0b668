"""The arithmetic of ``tests/gpu/guard_overhead.py``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "gpu" / "guard_overhead.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("guard_overhead", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def runs(**peaks):
    shared = {"guard_seconds_before_first_step": 0.5, **peaks}
    without = {"guard": False, "tens": [10.0, 12.0], **shared}
    guarded = {"guard": True, "tens": [10.1, 12.1], "guard_seconds_in_tens": [0.05, 0.061], **shared}
    return [without, guarded]


def test_medians_of_tens_and_the_guards_own_clock(script):
    result = script.compared(runs(peak_allocated=2**30))
    assert result["step_seconds"] == {"with": pytest.approx(1.11), "without": pytest.approx(1.1)}
    assert result["step_seconds_ratio"] == pytest.approx(1.11 / 1.1)
    assert result["guard_share_by_its_own_clock"] == pytest.approx(0.111 / 22.2)
    assert result["peak_allocated"]["ratio"] == 1.0
    assert "+0.91%; by the guard's own clock 0.50%" in script.told(result)
    assert "1,024.0 MiB with: +0.000%" in script.told(result)


def test_without_cuda_no_ratio_of_memory_is_made_up(script):
    assert "peak_allocated" not in script.compared(runs())
