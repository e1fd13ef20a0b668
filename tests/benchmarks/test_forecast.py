"""What one forecast takes: seconds and memory of the command, as people start it."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

FORECAST_S = 10
SEARCH_S = 20
MEMORY_BYTES = 1 << 30


@pytest.mark.parametrize(
    ("options", "budget"), [((), FORECAST_S), (("--card", "l4"), SEARCH_S)], ids=["forecast", "card and search"]
)
def test_one_forecast(benchmark, options, budget):
    """Wall seconds on two cores, processor seconds and peak memory of ``pytest-qvl forecast`` for a 7B model."""
    command = [sys.executable, "-m", "pytest_qvl.cli", "forecast", "--model", "qwen2.5-vl-7b", *options]
    measured = []

    def forecast():
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        error = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stderr.close()
        assert process.returncode == 0, error.decode()
        wall = time.perf_counter() - started
        measured.append((wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024))

    benchmark.pedantic(forecast, rounds=2, warmup_rounds=1)
    wall, processor, memory = map(min, zip(*measured[1:], strict=True))
    benchmark.extra_info.update(seconds=wall, processor_seconds=processor, peak_bytes=memory)
    assert memory <= MEMORY_BYTES
    assert wall <= budget
