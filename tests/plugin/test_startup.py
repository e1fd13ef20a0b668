"""What starting pytest with the plugin costs: no heavy import, no subprocess."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "PIL", "numpy", "safetensors")
# Of the standard library: dear, and not among what pytest itself imports in every release.
DEAR = (
    "asyncio",
    "email",
    "importlib.metadata",
    "inspect",
    "multiprocessing",
    "pickle",
    "secrets",
    "socket",
    "subprocess",
    "urllib",
)

SPY = """
import json, sys

started = []
STARTS = ("subprocess.Popen", "os.posix_spawn", "os.fork", "os.exec", "os.system", "os.spawn", "pty.spawn")
sys.addaudithook(lambda event, args: started.append(str((event, args[:2]))) if event in STARTS else None)

def pytest_unconfigure(config):
    heavy = [name for name in {heavy!r} if name in sys.modules]
    plugin = "pytest_qvl.plugin" in sys.modules
    print("SPY", json.dumps({{"heavy": heavy, "started": started, "plugin": plugin}}))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["-p", "qvl", "test_unrelated.py"], id="by its entry point"),
        pytest.param(["-p", "pytest_qvl.plugin", "test_unrelated.py"], id="by its module"),
        pytest.param(["-p", "qvl", "--collect-only", "--pyargs", "pytest_qvl.suite"], id="collecting the suite"),
        pytest.param(["-p", "qvl", "--help"], id="help"),
    ],
)
def test_starting_imports_nothing_heavy_and_starts_no_process(pytester, monkeypatch, arguments):
    pytester.makepyfile(spy=SPY.format(heavy=HEAVY), test_unrelated="def test_it(tmp_path): pass")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(pytester.path), prepend=os.pathsep)
    result = pytester.runpytest_subprocess("-p", "spy", "-s", *arguments)
    assert result.ret == 0
    (line,) = [line for line in result.outlines if line.startswith("SPY ")]
    assert json.loads(line.removeprefix("SPY ")) == {"heavy": [], "started": [], "plugin": True}


MODULES = """
import sys

def pytest_unconfigure(config):
    print("SPY", *(name for name in {dear!r} if name in sys.modules))
"""


def test_a_run_without_a_model_imports_of_the_standard_library_what_pytest_does(pytester, monkeypatch):
    pytester.makepyfile(spy=MODULES.format(dear=DEAR), test_unrelated="def test_it(): pass")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(pytester.path), prepend=os.pathsep)

    def imported(*arguments):
        lines = pytester.runpytest_subprocess("-p", "spy", "-s", *arguments, "test_unrelated.py").outlines
        return [line for line in lines if line.startswith("SPY")]

    assert imported("-p", "qvl") == imported()


# Of this package: what a session needs once a test uses a GPU, a model or a check.
LATER = ("gpu.lease", "gpu.nvml", "gpu.visible", "checks", "promises", "report.states", "models.adapters")


def test_a_run_without_a_model_imports_of_this_package_what_every_run_needs(pytester, monkeypatch):
    later = [f"pytest_qvl.{name}" for name in LATER]
    pytester.makepyfile(spy=MODULES.format(dear=later), test_unrelated="def test_it(): pass")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(pytester.path), prepend=os.pathsep)
    result = pytester.runpytest_subprocess("-p", "spy", "-s", "-p", "qvl", "test_unrelated.py")
    result.assert_outcomes(passed=1)
    assert [line for line in result.outlines if line.startswith("SPY")] == ["SPY"]


def test_importing_the_plugin_imports_pytest_only():
    code = (
        "import sys, pytest; before = set(sys.modules); import pytest_qvl.plugin; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["pytest_qvl", "pytest_qvl.plugin"]


def test_importing_the_package_imports_nothing_heavy():
    modules = (
        "pytest_qvl, pytest_qvl.plugin, pytest_qvl.options, pytest_qvl.evidence, pytest_qvl.checks, "
        "pytest_qvl.report.terminal, pytest_qvl.models.sources.model_source"
    )
    code = f"import sys, {modules}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
