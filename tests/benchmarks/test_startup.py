"""What having the plugin installed adds to the start of every pytest run."""

from __future__ import annotations

import subprocess
import sys


def test_importing_the_plugin(benchmark):
    """Seconds on top of pytest's own import, and their ratio, in one fresh process."""
    code = (
        "import time; a = time.perf_counter(); import pytest; b = time.perf_counter(); import pytest_qvl.plugin; "
        "print(b - a, time.perf_counter() - b)"
    )

    def start():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return tuple(map(float, done.stdout.split()))

    pytest_alone, plugin = benchmark.pedantic(start, rounds=3)
    benchmark.extra_info.update(pytest_seconds=pytest_alone, plugin_seconds=plugin, ratio=plugin / pytest_alone)
