"""Whatever ends a run or takes its disk: the record is whole, the old one or the new one, and somebody says what is.

Real processes, real signals, and real file systems that are full or read-only, where the machine lets them be mounted.
Their quicker siblings are in test_record.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

OLD = '{"schema":"pytest-qvl/record/1"}'
PLAIN = "def test_plain(): pass"
PYTEST = f"{sys.executable} -m pytest -p qvl -p no:cacheprovider --qvl-device cpu --qvl-record disk/record.json"
# In a mount namespace of the process's own, which takes what it mounted with it when it ends.
MOUNTED = """
    mount -t tmpfs -o size=64k tmpfs disk && printf '{old}' > disk/record.json || exit 99
    {before}
    {pytest}; status=$?
    cat disk/record.json; echo; ls -A disk; exit $status
"""


@pytest.fixture
def on_a_small_disk(pytester, monkeypatch):
    """Run pytest with its record on a disk of 64 KiB; the run, and what the disk holds afterwards."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.mkdir("disk")

    def run(before, source=PLAIN):
        pytester.makepyfile(source)
        script = MOUNTED.format(old=OLD, before=before, pytest=PYTEST)
        command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
        try:
            done = subprocess.run(command, cwd=pytester.path, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("no unshare here: nothing can be mounted for a test alone")
        if done.returncode in (1, 99) and not done.stdout:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
        return done

    return run


@pytest.mark.slow
def test_a_full_disk_keeps_the_old_record(on_a_small_disk):
    done = on_a_small_disk("cat /dev/zero > disk/other 2> /dev/null")
    lines = done.stdout.splitlines()
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    (said,) = [line for line in lines if line.startswith("qvl_record: ")]
    assert said.endswith("/disk/record.json could not be written: No space left on device")
    assert lines[-3:] == [OLD, "other", "record.json"]


@pytest.mark.slow
def test_a_read_only_folder_is_refused_before_the_run(on_a_small_disk):
    done = on_a_small_disk("mount -o remount,ro disk")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "test_plain" not in done.stdout
    (said,) = filter(None, done.stderr.splitlines())
    assert said.startswith("ERROR: --qvl-record: ") and "is read-only for this user; name another one" in said
    assert done.stdout.splitlines() == [OLD, "record.json"]


@pytest.mark.slow
def test_a_folder_that_becomes_read_only_keeps_the_old_record(on_a_small_disk):
    source = "import subprocess\ndef test_it(): subprocess.run(['mount', '-o', 'remount,ro', 'disk'], check=True)"
    done = on_a_small_disk(":", source)
    lines = done.stdout.splitlines()
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    (said,) = [line for line in lines if line.startswith("qvl_record: ")]
    assert said.endswith("/disk/record.json could not be written: Read-only file system")
    assert lines[-2:] == [OLD, "record.json"]


@pytest.mark.slow
def test_a_worker_that_is_killed_leaves_a_whole_record_that_says_so(pytester, run_apart):
    pytester.makepyfile(
        """
    import os, signal, pytest
    @pytest.mark.parametrize("n", range(4))
    def test_it(qvl_backend, n):
        if n == 1: os.kill(os.getpid(), signal.SIGKILL)
    """
    )
    (pytester.path / "record.json").write_text(OLD)
    result = run_apart("-n", "2", "--qvl-record", "record.json", "--qvl-device", "cpu", plugins=["xdist"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    found = json.loads((pytester.path / "record.json").read_text(encoding="utf-8"))
    assert (found["exit_status"], found["tests"]["passed"]) == (1, 3)
    (error,) = found["errors"]
    assert error["test"].startswith("test_it[") and "crashed while running" in error["text"]


def _ended(process: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    return True


@pytest.mark.slow
def test_a_run_that_is_killed_takes_its_workers_along_and_keeps_the_old_record(pytester, monkeypatch):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile(
        """
    import os, pathlib, time, pytest
    @pytest.mark.parametrize("n", range(2))
    def test_it(qvl_backend, n):
        pathlib.Path(f"worker-{os.getpid()}").touch()
        time.sleep(60)
    """
    )
    (pytester.path / "record.json").write_text(OLD)
    named = ("-p", "qvl", "-p", "xdist", "-p", "no:cacheprovider", "-n", "2", "--qvl-device", "cpu")
    run = subprocess.Popen(
        [sys.executable, "-m", "pytest", *named, "--qvl-record", "record.json"],
        cwd=pytester.path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while len(workers := [int(f.name[7:]) for f in pytester.path.glob("worker-*")]) < 2:
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.05)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    assert [f.read_text() for f in pytester.path.glob("*record.json*")] == [OLD]
    while not all(map(_ended, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_writes_leaves_one_record_whole(tmp_path):
    file = tmp_path / "record.json"
    writes = (
        "import sys, pathlib; from pytest_qvl.outputs import write_json\n"
        "for n in range(10**6): write_json(pathlib.Path(sys.argv[1]), {'run': n, 'more': list(range(100_000))})"
    )
    seen = []
    for delay in (0.0, 0.01, 0.02, 0.05, 0.1):
        process = subprocess.Popen([sys.executable, "-c", writes, str(file)])
        before = file.stat().st_mtime_ns if file.exists() else 0
        while not file.exists() or file.stat().st_mtime_ns == before:
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.wait()
        found = json.loads(file.read_text(encoding="utf-8"))
        assert found["more"] == list(range(100_000))
        seen.append(found["run"])
    # What a killed process leaves of a file that it had begun is hidden, and no record's name.
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".record.json.")} == {"record.json"}


@pytest.mark.slow
def test_two_runs_at_a_time_leave_the_record_of_one(pytester, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile(
        """
    import os, pathlib, time
    def test_it(qvl_backend):  # both runs are there before either ends
        pathlib.Path(f"run-{os.getpid()}").touch()
        end = time.monotonic() + 60
        while len(list(pathlib.Path().glob("run-*"))) < 2 and time.monotonic() < end: time.sleep(0.01)
    """
    )
    command = [sys.executable, "-m", "pytest", "-p", "qvl", "-p", "no:cacheprovider", "--qvl-device", "cpu"]
    command += ["--qvl-record", "record.json"]
    runs = [
        subprocess.Popen([*command, "-k", name], cwd=pytester.path, stdout=subprocess.DEVNULL) for name in ("it", "t")
    ]
    assert [run.wait(timeout=60) for run in runs] == [0, 0]
    (file,) = pytester.path.glob("*record.json*")
    found = json.loads(file.read_text(encoding="utf-8"))
    assert (found["command"][-1], found["tests"]) in [("it", {"passed": 1}), ("t", {"passed": 1})]
    assert os.access(file, os.W_OK)
