"""What having the plugin installed adds to the start of every pytest run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

BUDGET_S = 0.010
CONFIGURE_BUDGET_S = 0.150


def test_importing_the_plugin(benchmark, tmp_path):
    """CPU seconds on top of pytest's own import, in one fresh process; from the second round on nothing is compiled."""
    code = (
        "import time; t = time.process_time; a = t(); import pytest; b = t(); import pytest_qvl.plugin; "
        "print(b - a, t() - b)"
    )
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    measured = []

    def start():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        measured.append(tuple(map(float, done.stdout.split())))

    benchmark.pedantic(start, rounds=5, warmup_rounds=1)
    alone, plugin = (min(seconds) for seconds in zip(*measured[1:], strict=True))
    benchmark.extra_info.update(pytest_seconds=alone, plugin_seconds=plugin, ratio=plugin / alone)
    assert plugin <= BUDGET_S


def test_configuring_a_run_without_a_model(benchmark, tmp_path):
    """CPU seconds that the plugin adds to a whole run of one test that uses nothing of it, side by side with pytest."""
    (tmp_path / "test_unrelated.py").write_text("def test_it(): pass")
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path / "cache"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    code = (
        "import os, sys, time, pytest; a = time.process_time(); pytest.main(['-q', *sys.argv[1:]]); "
        "print(time.process_time() - a, file=sys.stderr)"
    )
    measured = []

    def run(*arguments):
        command = [sys.executable, "-c", code, "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env=environment)
        return float(done.stderr.split()[-1])

    def both():
        measured.append((run(), run("-p", "pytest_qvl.plugin")))

    benchmark.pedantic(both, rounds=10, warmup_rounds=1)
    alone, plugin = (min(seconds) for seconds in zip(*measured[1:], strict=True))
    benchmark.extra_info.update(pytest_seconds=alone, plugin_seconds=plugin - alone)
    assert plugin - alone <= CONFIGURE_BUDGET_S


@pytest.mark.parametrize("arguments", [(), ("-p", "pytest_qvl.plugin")], ids=["pytest alone", "with the plugin"])
def test_a_run_without_a_model(benchmark, tmp_path, arguments):
    """Wall seconds of a whole run of one test that uses nothing of the package."""
    (tmp_path / "test_unrelated.py").write_text("def test_it(): pass")
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path / "cache"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-m", "pytest", "-q", *arguments]

    def start():
        subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, env=environment)

    benchmark.pedantic(start, rounds=5, warmup_rounds=1)
