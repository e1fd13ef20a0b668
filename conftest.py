"""The plugin comes in by its entry point; here are the slow tests' option, and what lets tests drive pytest itself."""

import gc
import os
import sys
from pathlib import Path

import pytest

# Before torch is imported: workers that each start a thread per core spend their time waiting for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests start some 150 processes. Where the environment forbids to keep compiled code, as many images do, each would
# compile this package again, which is a third of its time, and what `pip install --no-compile` left.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

pytest_plugins = ["pytester"]
SLOW_TESTS = Path(__file__).parent / "tests" / "slow_tests.txt"
LEFT_OUT = pytest.mark.skip(reason="slow: --slow runs it")


def pytest_addoption(parser):
    """``--slow``, of this repository only."""
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well (tests/README.md)")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config, items):
    """Without ``--slow`` slow tests are skipped, not deselected: workers of pytest-xdist report skips only.

    They are those marked ``slow``, which are the rest of a matrix, and those that ``tests/slow_tests.txt`` lists.
    """
    listed = frozenset(SLOW_TESTS.read_text(encoding="utf-8").splitlines())
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slow") and not config.getoption("slow"):
            item.add_marker(LEFT_OUT)


@pytest.fixture
def transformers_takes_peft():
    """Skip where ``model.add_adapter`` of Transformers refuses the installed PEFT (5.24.0 wants 0.22)."""
    from importlib.metadata import version

    from packaging.version import Version
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(version("peft")) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"this Transformers' add_adapter wants PEFT {MIN_PEFT_VERSION} or newer")


def pytest_sessionstart():
    """This run has been told where its summary goes; those that tests start write none there."""
    os.environ.pop("GITHUB_STEP_SUMMARY", None)


def pytest_collection_finish():
    """Models, meters and inner runs look for garbage hundreds of times: not in all of torch and pytest each time."""
    gc.collect()
    gc.freeze()
