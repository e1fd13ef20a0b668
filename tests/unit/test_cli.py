"""``pytest-qvl`` and what its output goes to: a reader that leaves is no error, a disk that is full is one sentence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

COMMAND = [sys.executable, "-m", "pytest_qvl.cli"]


def run(stdout, *arguments):
    done = subprocess.run([*COMMAND, *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stderr


def unread():
    """The writing end of a pipe whose reader has gone."""
    reads, writes = os.pipe()
    os.close(reads)
    return writes


def test_a_reader_that_leaves_is_no_error():
    assert run(unread(), "explain", "alignment") == (128 + signal.SIGPIPE, "")


def test_an_error_is_said_although_nobody_reads_the_rest():
    status, said = run(unread(), "explain", "feature_scater")
    assert (status, said.count("\n")) == (2, 1)
    assert "'feature_scatter'" in said


def test_a_pipe_of_its_own_that_breaks_is_an_error():
    code = (
        "import sys; from pytest_qvl import cli; from pytest_qvl.records import explain\n"
        "def broken(name): raise BrokenPipeError(32, 'Broken pipe')\n"
        "explain.explain = broken; sys.exit(cli.main(['explain', 'alignment']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "pytest-qvl explain: error: [Errno 32] Broken pipe\n")


def test_output_for_a_full_disk_is_one_sentence():
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        status, said = run(full, "explain", "alignment")
    assert (status, said) == (2, "pytest-qvl explain: error: [Errno 28] No space left on device\n")
