"""Ctrl-C and SIGTERM, in real processes: exit status 2, a summary, fixtures torn down, whoever swallows the interrupt."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pytest_qvl

ROOT = Path(pytest_qvl.__file__).parents[1]
TESTS = """
    import os, signal, time, pytest
    @pytest.fixture
    def tidy():
        yield
        print("TIDIED")
    def swallow(number):
        try: signal.raise_signal(number)
        except BaseException: pass
    def test_first(qvl_backend): pass
    {body}
    def test_last(qvl_backend): pass
"""
SWALLOWS = """
import signal, time
try:
    signal.raise_signal(signal.SIGINT)
    time.sleep(0.5)
    print("IMPORTED")
except BaseException:
    raise ImportError("partially initialized module")
"""
IMPORTS = """
    @pytest.fixture
    def loads():
        import swallows
    def test_it(qvl_backend, loads, tidy): time.sleep(30)
"""
SETUP = """
    @pytest.fixture
    def loads(): swallow(signal.SIGINT)
    def test_it(qvl_backend, loads): pass
"""
FAILS = "def test_it(qvl_backend, tidy):\n        swallow(signal.SIGINT)\n        assert False"
TERMINATED = "def test_it(qvl_backend, tidy): signal.raise_signal(signal.SIGTERM)"
EXPECTS = """
    def test_it(qvl_backend):
        with pytest.raises(KeyboardInterrupt): signal.raise_signal(signal.SIGINT)
"""
FORKS = """
    def test_it(qvl_backend):
        child = os.fork()
        if not child:
            time.sleep(30)
            os._exit(0)
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
"""
ENDING = """
    @pytest.fixture(scope="session")
    def long_lived():
        yield
        signal.raise_signal(signal.SIGINT)
        print("TIDIED")
    def test_it(qvl_backend, long_lived): pass
"""
FINISHED = """
    @pytest.fixture(scope="session", autouse=True)
    def at_the_end(request):
        def finish(): signal.raise_signal(signal.SIGINT)
        request.config.pluginmanager.register(type("P", (), {"pytest_sessionfinish": lambda self: finish()})())
    def test_it(qvl_backend): pass
"""
# While pytest reports the first, which takes a second where the frames are those of a model that loads.
AGAIN = """
    @pytest.fixture(scope="session")
    def long_lived(request):
        def again(self):
            for _ in range({times}): signal.raise_signal(signal.SIGINT)
        hook = pytest.hookimpl(tryfirst=True)(again)
        request.config.pluginmanager.register(type("P", (), {{"pytest_keyboard_interrupt": hook}})())
        yield
        print("TIDIED")
    def test_it(qvl_backend, long_lived): signal.raise_signal(signal.SIGINT)
"""
UNRELATED = """
    def test_it():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
"""


def heed_ctrl_c():  # a shell's background jobs, and all they start, ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (IMPORTS, 2, ["IMPORTED", "KeyboardInterrupt: SIGINT", "1 passed"]),
        (SETUP, 2, ["KeyboardInterrupt: SIGINT", "1 passed"]),
        (FAILS, 2, ["TIDIED", "KeyboardInterrupt: SIGINT", "1 passed"]),
        (TERMINATED, 2, ["TIDIED", "KeyboardInterrupt: SIGTERM", "1 passed"]),
        (ENDING, 2, ["TIDIED", "qvl: SIGINT: the run stops when fixtures are torn down", "3 passed"]),
        (FINISHED, 2, ["qvl: SIGINT: the run stops when fixtures are torn down", "3 passed"]),
        (AGAIN.format(times=1), 2, ["TIDIED", "qvl: SIGINT: the run stops when fixtures are torn down", "1 passed"]),
        (AGAIN.format(times=2), -signal.SIGINT, ["qvl: SIGINT: the run stops when fixtures are torn down; once more"]),
        (EXPECTS, 0, ["3 passed"]),
        (FORKS, 0, ["3 passed"]),
    ],
    ids=["import", "setup", "body", "SIGTERM", "teardown", "ending", "again", "at once", "expected", "forked"],
)
def test_a_signal_ends_the_run_with_a_summary(pytester, monkeypatch, body, status, says):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile(test_it=TESTS.format(body=body), swallows=SWALLOWS)
    command = [sys.executable, "-m", "pytest", "-p", "qvl", "-p", "no:cacheprovider", "--qvl-device", "cpu", "-s"]
    done = subprocess.run(
        command, cwd=pytester.path, capture_output=True, text=True, timeout=60, preexec_fn=heed_ctrl_c, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    for text in says:
        assert text in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert " error" not in done.stdout


def test_runs_that_do_not_use_the_package_keep_their_signals(pytester):
    pytester.makepyfile(TESTS.format(body=UNRELATED).replace("(qvl_backend)", "()"))
    pytester.runpytest_inprocess().assert_outcomes(passed=3)
