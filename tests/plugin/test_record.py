"""The record: its exit status is the process's, and a file that cannot be written is no green run."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pytest_qvl.outputs import write_json

PLAIN = "def test_plain(): pass"

OLD = '{"schema":"pytest-qvl/record/1"}'


def record(pytester):
    return json.loads((pytester.path / "record.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("arguments", "source", "more"),
    [
        ([], PLAIN, ""),
        (["--qvl-require-gpu"], PLAIN, ""),  # which turns the session red
        ([], "def test_red(): assert False", ""),
        (["-k", "nothing"], PLAIN, ""),
        ([], PLAIN, "def pytest_sessionfinish(session): session.exitstatus = 77"),
        ([], "import pytest\ndef test_it(): pytest.exit('enough', returncode=9)", ""),
    ],
    ids=["green", "no GPU", "red", "nothing ran", "another plugin", "exit"],
)
def test_the_exit_status_is_that_of_the_process(pytester, run_light, arguments, source, more):
    pytester.makepyfile(source)
    pytester.makeconftest(more)
    result = run_light("--qvl-record", "record.json", *arguments)
    assert record(pytester)["exit_status"] == result.ret


def test_a_red_run_says_why_as_the_terminal_does(pytester, run_light, with_torch):
    pytester.makeconftest(
        """
    import pytest
    @pytest.fixture(scope="session")
    def qvl_quantized_model(): raise ValueError("no model")
    """
    )
    pytester.makepyfile(PLAIN + "\ndef test_red(): assert 1 == 2")
    chosen = ("--pyargs", "pytest_qvl.suite", ".", "-k", "test_quantization_census or test_plain or test_red")
    result = run_light("--qvl-record", "record.json", "--qvl-require-gpu", *chosen)
    written = record(pytester)
    census, red = written["errors"]
    assert (census["target"], census["when"], census["check"]) == ("embedded on cpu", "setup", "quantization_census")
    assert red == {"target": None, "test": "test_red", "when": "call", "check": None, "text": "assert 1 == 2"}
    lines = result.outlines
    assert f"       error: {census['check']}: {census['text']}" in lines
    assert [f"qvl: {problem}" for problem in written["problems"]] == [line for line in lines if "no GPU test" in line]
    assert len(written["problems"]) == 1


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import nothing_of_the_kind", "ModuleNotFoundError: No module named 'nothing_of_the_kind'"),
        ("1 /", "SyntaxError"),
    ],
)
def test_a_file_that_cannot_be_collected_is_named(pytester, run_light, source, says):
    test = pytester.makepyfile(source)
    run_light("--qvl-record", "record.json")
    (error,) = record(pytester)["errors"]
    assert (error["test"], error["when"]) == (test.name, "collect")
    assert error["text"].startswith(says)


@pytest.mark.parametrize("reason", ["", "a known defect"])
def test_an_expected_failure_is_counted_by_its_reason_not_by_its_traceback(pytester, run_light, reason):
    pytester.makepyfile(
        f"""
    import pytest
    @pytest.mark.xfail(reason={reason!r})
    @pytest.mark.parametrize("n", range(2))
    def test_it(n): raise ValueError(n)
    """
    )
    run_light("--qvl-record", "record.json")
    assert record(pytester)["skipped"] == {f"expected to fail: {reason}".removesuffix(": "): 2}


def test_a_record_has_the_permissions_that_the_umask_leaves(pytester, run_light):
    pytester.makepyfile(PLAIN)
    before = os.umask(0o027)
    try:
        run_light("--qvl-record", "deep/er/record.json")
    finally:
        os.umask(before)
    assert stat.S_IMODE((pytester.path / "deep" / "er" / "record.json").stat().st_mode) == 0o640


def test_a_record_that_cannot_be_written_is_no_green_run(pytester, monkeypatch):
    """A limit on the size of files stands in for a full disk: the old record stays, and nothing beside it."""
    pytester.makepyfile(
        """
    import resource
    def test_it(): resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    """
    )
    (pytester.path / "record.json").write_text(OLD)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # half a cached module would break every later import of it
    command = [sys.executable, "-m", "pytest", "-p", "qvl", "-p", "no:cacheprovider", "--qvl-record", "record.json"]
    # Into pipes, which the limit does not concern.
    done = subprocess.run(command, cwd=pytester.path, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    line = f"qvl_record: {pytester.path}/record.json could not be written: File too large"
    assert line in done.stdout.splitlines()
    assert (pytester.path / "record.json").read_text() == OLD
    assert [path.name for path in pytester.path.iterdir() if "record.json" in path.name] == ["record.json"]


def test_a_file_that_is_no_record_is_not_replaced(pytester, run_light):
    """The value was forgotten, so that the test file stands where the record's name should."""
    test = pytester.makepyfile(PLAIN)
    result = run_light("--qvl-record", str(test))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--qvl-record*is there and is no record of a run: name another file*"])
    assert test.read_text(encoding="utf-8").strip() == PLAIN.strip()


@pytest.mark.parametrize("flag", ["--qvl-adapter", "--qvl-images"])
def test_an_empty_value_is_no_folder(pytester, run_light, flag):
    pytester.makepyfile(PLAIN)
    result = run_light(flag, "")
    result.stderr.fnmatch_lines([f"*{flag}*no folder was named*"])


def test_a_folder_that_takes_no_files_is_told_in_a_line_of_its_own(pytester, run_light):
    pytester.makepyfile(PLAIN)
    result = run_light("--qvl-record", "/proc/nowhere/record.json")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        ["qvl_record: /proc/nowhere/record.json could not be written: No such file or directory"]
    )


def test_a_pipe_is_not_replaced(pytester, run_light):
    pytester.makepyfile(PLAIN)
    os.mkfifo("pipe")
    result = run_light("--qvl-record", "pipe")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*is a device or a pipe, not a regular file, and is not replaced by one"])
    assert stat.S_ISFIFO(Path("pipe").stat().st_mode)


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 2), ("SIGTERM", 2), ("SIGKILL", -9)])
def test_a_signal_leaves_a_whole_record(pytester, run_apart, number, status):
    """Of a run that is stopped, a record with its exit status; of one that is killed, the old one."""
    # A shell's background job ignores SIGINT.
    pytester.makeconftest("import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)")
    pytester.makepyfile(f"import os, signal\ndef test_it(qvl_backend): os.kill(os.getpid(), signal.{number})")
    (pytester.path / "record.json").write_text(OLD)
    assert run_apart("--qvl-record", "record.json", "--qvl-device", "cpu").ret == status
    found = record(pytester)
    assert found == json.loads(OLD) if status < 0 else found["exit_status"] == status
    assert [path.name for path in pytester.path.iterdir() if "record.json" in path.name] == ["record.json"]


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_that_comes_while_the_record_is_written_does_not_lose_it(pytester, run_apart, number):
    pytester.makeconftest(
        f"""
    import os, signal
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
    real = os.fsync
    def fsync(file):
        os.fsync = real
        signal.raise_signal(signal.{number})
        real(file)
    os.fsync = fsync
    """
    )
    pytester.makepyfile("def test_it(qvl_backend): pass")
    result = run_apart("--qvl-record", "record.json", "--qvl-device", "cpu")
    result.stdout.fnmatch_lines(
        [f"qvl: {number}: the run stops when its reports are written; once more to stop at once"]
    )
    assert (result.ret, record(pytester)["exit_status"]) == (0, 0)


def test_runs_that_write_one_record_at_a_time_leave_one_of_theirs(tmp_path):
    data = [{"run": number, "more": list(range(2000))} for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda one: write_json(tmp_path / "r.json", one), data)) == {""}
    assert json.loads((tmp_path / "r.json").read_text()) in data
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
