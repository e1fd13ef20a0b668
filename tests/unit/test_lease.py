"""The GPU lease, between real processes that are really killed, on a machine with made-up GPUs."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

import pytest_qvl
from pytest_qvl.gpu.errors import LeaseError, LeaseTimeout, NoGpu
from pytest_qvl.gpu.lease import acquire, join_session
from pytest_qvl.gpu.nvml import Gpu
from pytest_qvl.gpu.visible import Visible

ROOT = str(Path(pytest_qvl.__file__).parents[1])
A, B = Gpu("GPU-aaaa", 0, "NVIDIA T4"), Gpu("GPU-bbbb", 1, "NVIDIA T4")
ONE, TWO = Visible((A,)), Visible((A, B))
# A process here starts in well under a second; one that hangs is killed, and its test fails.
DEADLINE_S = 30

PRELUDE = """
import os, signal, subprocess, sys, time
from pathlib import Path
from pytest_qvl.gpu.lease import acquire
from pytest_qvl.gpu.nvml import Gpu
from pytest_qvl.gpu.visible import Visible
A, B = Gpu("GPU-aaaa", 0, "NVIDIA T4"), Gpu("GPU-bbbb", 1, "NVIDIA T4")
ONE, TWO = Visible((A,)), Visible((A, B))
def say(*words): print(*words, flush=True)
"""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "leases"


@pytest.fixture
def start(folder, monkeypatch):
    """Start a process of another run (or of this one, given its environment); all are killed at the end."""
    running = []

    def end(process):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def start_process(code, **environ):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("QVL_", "CUDA_"))}
        process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
            env={**clean, "PYTHONPATH": ROOT, "QVL_GPU_LEASES": str(folder), **environ},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        watchdog = threading.Timer(DEADLINE_S, end, (process,))
        watchdog.start()
        running.append((process, watchdog))
        return process

    yield start_process
    for process, watchdog in running:
        watchdog.cancel()
        end(process)
        process.wait(DEADLINE_S)
        process.stdout.close()


HOLD = "lease = acquire(ONE); say('held', lease.gpu.uuid); time.sleep(600)"


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait(DEADLINE_S)


def take(folder, visible=ONE, environ=None, **more):
    return acquire(visible, directory=folder, environ={} if environ is None else environ, **more)


class Clock:
    """Time that passes only by sleeping; can do something at a given moment."""

    def __init__(self):
        self.now = 0.0
        self.sleeps, self.then = [], {}

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.sleeps.append(seconds)
        self.now += seconds
        for moment in [m for m in self.then if m <= self.now]:
            self.then.pop(moment)()


# -- between processes ---------------------------------------------------------------------------------------


def test_each_process_gets_a_gpu_of_its_own_and_the_third_waits_for_a_crash(start, folder):
    hold = "lease = acquire(TWO, say=say); say('held', os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(600)"
    first, second = start(hold), start(hold)
    held = {first: first.stdout.readline().split()[-1], second: second.stdout.readline().split()[-1]}
    assert sorted(held.values()) == ["GPU-aaaa", "GPU-bbbb"]
    third = start(hold)
    waiting = third.stdout.readline()
    assert waiting.startswith(
        "waiting for a GPU (at most 1800 s; 0 s so far): NVIDIA T4 (GPU-aaaa) is held by process "
    )
    assert f"process {first.pid} (python" in waiting
    assert f"process {second.pid} (python" in waiting
    kill(second)
    assert third.stdout.readline().startswith(f"got NVIDIA T4 ({held[second]}) after ")
    assert third.stdout.readline() == f"held {held[second]}\n"


def test_a_killed_holder_leaves_nothing_to_clean_up(start, folder):
    holder = start(HOLD)
    holder.stdout.readline()
    kill(holder)
    with take(folder, patience=0) as lease:
        assert lease.gpu == A


def test_a_forked_child_that_outlives_its_killed_parent_does_not_hold(start, folder):
    parent = start(
        """
        lease = acquire(ONE)
        child = os.fork()
        if not child:
            lease.release()          # nor may a child release what its parent holds
            say("forked", os.environ["CUDA_VISIBLE_DEVICES"])
            time.sleep(600)
        time.sleep(600)
        """
    )
    assert parent.stdout.readline() == "forked GPU-aaaa\n"
    with pytest.raises(LeaseTimeout):
        take(folder, patience=0)
    kill(parent)
    take(folder, patience=0).release()


def test_a_program_started_by_a_killed_holder_does_not_hold(start, folder):
    parent = start(
        """
        lease = acquire(ONE)
        child = subprocess.Popen(["sleep", "600"])
        say("started")
        time.sleep(600)
        """
    )
    parent.stdout.readline()
    kill(parent)
    take(folder, patience=0).release()


def test_a_descendant_uses_its_ancestors_gpu_and_takes_over_after_its_death(start, folder):
    descendant = PRELUDE + textwrap.dedent(
        """
        lease = acquire(TWO, patience=0)
        say("descendant", lease.gpu.uuid, lease.inherited)
        lease.release()
        os.kill(os.getppid(), signal.SIGKILL)
        while os.getppid() == int(sys.argv[1]): time.sleep(0.01)
        lease = acquire(TWO, patience=5)
        say("alone", lease.gpu.uuid, lease.inherited)
        time.sleep(600)
        """
    )
    ancestor = start(
        f"""
        lease = acquire(TWO, patience=0)
        subprocess.run([sys.executable, "-c", {descendant!r}, str(os.getpid())])
        """
    )
    assert ancestor.stdout.readline() == "descendant GPU-aaaa True\n"
    assert ancestor.stdout.readline() == "alone GPU-aaaa False\n"
    with pytest.raises(LeaseTimeout):
        take(folder, patience=0)


def test_a_finished_descendant_leaves_its_ancestor_in_possession(folder):
    environ = {}
    with take(folder, environ=environ) as lease:
        with take(folder, environ=environ, patience=0) as nested:
            assert nested.gpu == A
            assert nested.inherited
        assert not lease.inherited
        assert environ["CUDA_VISIBLE_DEVICES"] == "GPU-aaaa"
        with pytest.raises(LeaseTimeout):
            take(folder, patience=0)
    take(folder, patience=0).release()


def test_never_two_at_once(start, folder, tmp_path):
    crowd = [
        start(
            """
            for turn in range(15):
                with acquire(TWO, patience=60) as lease:
                    mark = Path(os.environ["MARKS"], lease.gpu.uuid)
                    mark.touch(exist_ok=False)
                    time.sleep(0.001)
                    mark.unlink()
            say("done")
            """,
            MARKS=str(tmp_path),
        )
        for _ in range(5)
    ]
    assert [process.communicate(timeout=DEADLINE_S)[0] for process in crowd] == ["done\n"] * 5


def test_workers_of_one_run_get_different_gpus(pytester, monkeypatch, folder):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", ROOT)
    monkeypatch.setenv("QVL_GPU_LEASES", str(folder))
    for name in ("QVL_GPU_LEASE", "QVL_GPU_SESSION", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    pytester.makeconftest(
        """
        import os, pytest
        from pytest_qvl.gpu.lease import acquire, join_session
        from pytest_qvl.gpu.nvml import Gpu
        from pytest_qvl.gpu.visible import Visible, auto_workers
        from pytest_qvl.gpu.nvml import Inventory
        GPUS = tuple(Gpu(f"GPU-{i}", i) for i in range(2))

        @pytest.hookimpl(tryfirst=True, optionalhook=True)
        def pytest_xdist_auto_num_workers(config):
            return auto_workers(asked=True, inventory=Inventory(GPUS))

        def pytest_configure(config):
            join_session()
            if hasattr(config, "workerinput"):
                config.lease = acquire(Visible(GPUS), patience=0)
        """
    )
    pytester.makepyfile(
        """
        import os, pathlib, pytest, time
        @pytest.mark.parametrize("n", range(8))
        def test_device(n, worker_id):
            time.sleep(0.05)
            pathlib.Path("seen.txt").open("a").write(f"{worker_id} {os.environ['CUDA_VISIBLE_DEVICES']}\\n")
        """
    )
    result = pytester.runpytest_subprocess("-p", "xdist", "-n", "auto", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=8)
    seen = set((pytester.path / "seen.txt").read_text().splitlines())
    assert len({line.split()[1] for line in seen}) == 2
    assert len(seen) == 2


# -- waiting -------------------------------------------------------------------------------------------------


def test_waiting_is_visible_and_bounded(folder):
    clock, words = Clock(), []
    with take(folder), pytest.raises(LeaseTimeout) as caught:
        take(folder, patience=100, say=words.append, clock=clock, sleep=clock.sleep)
    assert clock.now == pytest.approx(100)
    assert [w.split(";")[1].split(")")[0] for w in words] == [
        " 0 s so far",
        " 30 s so far",
        " 60 s so far",
        " 90 s so far",
    ]
    assert str(caught.value).startswith("no GPU became free within 100 s: NVIDIA T4 (GPU-aaaa) is held by process ")
    # The pauses double from 0.02 s to 1 s, which takes six; from then on it is asked once a second.
    assert max(clock.sleeps) <= 1.0
    assert len(clock.sleeps) <= 100 + 6


def test_time_behind_this_very_run_is_not_counted(folder):
    run = {"QVL_GPU_SESSION": "ours"}
    clock, words = Clock(), []
    worker = take(folder, environ=dict(run))
    stranger = []

    def hand_over():
        worker.release()
        stranger.append(take(folder))

    clock.then[500] = hand_over
    with pytest.raises(LeaseTimeout):
        take(folder, environ=dict(run), patience=100, say=words.append, clock=clock, sleep=clock.sleep)
    stranger[0].release()
    assert clock.now == pytest.approx(600, abs=2)
    assert "a process of this run, waited for as long as it runs" in words[0]
    assert "at most 100 s" in words[-1]


def test_one_gpu_held_by_this_run_is_enough_to_keep_waiting(folder):
    run = {"QVL_GPU_SESSION": "ours"}
    clock = Clock()
    worker, other = take(folder, TWO, environ=dict(run)), take(folder, TWO)
    assert (worker.gpu, other.gpu) == (A, B)
    clock.then[500] = worker.release
    lease = take(folder, TWO, environ=dict(run), patience=100, clock=clock, sleep=clock.sleep)
    assert lease.gpu == A
    assert lease.waited == pytest.approx(500, abs=1)
    for held in (lease, other):
        held.release()


def test_no_word_when_there_is_no_wait(folder):
    words = []
    take(folder, say=words.append).release()
    assert words == []


def test_a_holder_that_has_not_signed_counts_as_somebody_else(folder):
    with take(folder):
        (folder / "GPU-aaaa.lock").write_text("")
        with pytest.raises(LeaseTimeout, match="a process that has not said who it is"):
            take(folder, patience=0)


def test_one_of_this_run_that_is_about_to_sign_is_waited_for(folder):
    run, clock = {"QVL_GPU_SESSION": "ours"}, Clock()
    worker = take(folder, environ=dict(run))
    file = folder / "GPU-aaaa.lock"
    signature = file.read_text()
    file.write_text("")
    clock.then |= {0.5: lambda: file.write_text(signature), 20: worker.release}
    take(folder, environ=dict(run), patience=0, clock=clock, sleep=clock.sleep).release()


@pytest.mark.slow
def test_what_strangers_write_is_shown_harmlessly(folder):
    with take(folder):
        note = {"pid": 1, "command": "x\x1b[31m\n", "since": 0, "session": "", "token": ""}
        (folder / "GPU-aaaa.lock").write_text(json.dumps(note))
        with pytest.raises(LeaseTimeout, match=r"process 1 \(x\?\[31m\?\) since"):
            take(folder, patience=0)
        for nonsense in (
            "[]",
            '{"pid": "x"}',
            '{"pid": 1, "command": 1, "since": 1e400, "session": 1, "token": 1}',
        ):
            (folder / "GPU-aaaa.lock").write_text(nonsense)
            with pytest.raises(LeaseTimeout, match="has not said"):
                take(folder, patience=0)


def test_the_signature_says_who(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pytest", "-m", "gpu", "-k", "a b"])
    before = time.time()
    with take(folder, environ={"QVL_GPU_SESSION": "run"}):
        note = json.loads((folder / "GPU-aaaa.lock").read_text())
    assert (note["pid"], note["command"], note["session"]) == (os.getpid(), "pytest -m gpu -k 'a b'", "run")
    assert before <= note["since"] <= time.time()
    assert (folder / "GPU-aaaa.lock").read_text() == ""


# -- choice and environment ----------------------------------------------------------------------------------


def test_a_busy_card_is_the_last_choice(folder):
    total = 16 << 30
    busy, noisy, idle = (
        Gpu("GPU-1", 0, "T4", total, 9 << 30),
        Gpu("GPU-2", 1, "T4", total, 500 << 20),
        Gpu("GPU-3", 2),
    )
    leases = [take(folder, Visible((busy, noisy, idle))) for _ in range(3)]
    assert [lease.gpu.uuid for lease in leases] == ["GPU-2", "GPU-3", "GPU-1"]
    for lease in leases:
        lease.release()


def test_the_environment_is_put_back(folder):
    environ = {"CUDA_VISIBLE_DEVICES": "0,1"}
    lease = take(folder, TWO, environ=environ)
    assert environ["CUDA_VISIBLE_DEVICES"] == "GPU-aaaa"
    assert set(environ) == {"CUDA_VISIBLE_DEVICES", "QVL_GPU_LEASE", "QVL_GPU_SESSION"}
    lease.release()
    lease.release()
    assert environ.pop("QVL_GPU_SESSION")
    assert environ == {"CUDA_VISIBLE_DEVICES": "0,1"}


@pytest.fixture
def cuda_runs_on(monkeypatch, folder):
    """CUDA runs in this process already; the environment is this process's own."""
    monkeypatch.setenv("QVL_GPU_SESSION", "ours")
    for name in ("QVL_GPU_LEASE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)

    def start(**properties):
        cuda = SimpleNamespace(
            is_initialized=lambda: True, get_device_properties=lambda _: SimpleNamespace(**properties)
        )
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))

    return start


def test_once_cuda_runs_only_its_own_gpu_can_be_leased(folder, cuda_runs_on):
    cuda_runs_on(uuid="bbbb")
    with take(folder, TWO, environ=os.environ, patience=0) as lease:
        assert lease.gpu == B
        lease.verify()
        with pytest.raises(LeaseTimeout, match="GPU-bbbb"):
            take(folder, Visible((B,)), patience=0)
    with pytest.raises(
        LeaseError, match=r"CUDA already runs in this process, on GPU-bbbb, .* among NVIDIA T4 \(GPU-aaaa"
    ):
        take(folder, ONE, environ=os.environ)


def test_where_torch_does_not_name_its_gpu_only_one_can_be_meant(folder, cuda_runs_on):
    cuda_runs_on()
    take(folder, ONE, environ=os.environ).release()
    take(folder, Visible((Gpu("MIG-1"),)), environ=os.environ).release()
    with pytest.raises(LeaseError, match="on a GPU that it does not name"):
        take(folder, TWO, environ=os.environ)


def test_no_patience_still_waits_for_this_very_run(folder):
    run, clock = {"QVL_GPU_SESSION": "ours"}, Clock()
    worker = take(folder, environ=dict(run))
    clock.then[50] = worker.release
    take(folder, environ=dict(run), patience=0, clock=clock, sleep=clock.sleep).release()


def test_a_run_has_one_name():
    environ = {}
    assert join_session(environ) == join_session(environ) == environ["QVL_GPU_SESSION"]
    assert join_session({}) != join_session({})


def test_nothing_allowed_is_said(folder):
    with pytest.raises(NoGpu, match="the caller allows no GPU"):
        take(folder, Visible(reason="CUDA_VISIBLE_DEVICES is empty: the caller allows no GPU"))


# -- a folder that everybody may write to --------------------------------------------------------------------


def test_the_folder_is_for_every_user(folder):
    with take(folder):
        assert folder.stat().st_mode & 0o7777 == 0o1777
        assert (folder / "GPU-aaaa.lock").stat().st_mode & 0o777 == 0o666


@pytest.mark.parametrize("trap", ["link", "second name", "pipe", "folder"])
def test_a_lock_file_that_is_something_else_is_refused_untouched(folder, tmp_path, trap):
    folder.mkdir()
    victim, lock = tmp_path / "victim", folder / "GPU-aaaa.lock"
    victim.write_text("precious")
    {
        "link": lambda: lock.symlink_to(victim),
        "second name": lambda: lock.hardlink_to(victim),
        "pipe": lambda: os.mkfifo(lock),
        "folder": lock.mkdir,
    }[trap]()
    with pytest.raises(LeaseError, match=r"cannot be used.*set QVL_GPU_LEASES to another folder"):
        take(folder)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("trap", ["file", "link"])
def test_a_folder_that_is_something_else_is_refused(folder, tmp_path, trap):
    if trap == "file":
        folder.write_text("")
    else:
        folder.symlink_to(tmp_path)
    with pytest.raises(LeaseError, match="it is no directory"):
        take(folder)


def test_a_device_name_cannot_leave_the_folder(folder):
    take(folder, Visible((Gpu("MIG-GPU-1/../../3/0"),))).release()
    assert [f.name for f in folder.iterdir()] == ["MIG-GPU-1_______3_0.lock"]


def test_a_lock_file_tidied_away_while_it_was_being_locked_is_no_lease(folder, monkeypatch):
    lock, flock, tidied = folder / "GPU-aaaa.lock", fcntl.flock, []

    def tidy_then_lock(fd, operation):
        if not tidied:
            tidied.append(lock.unlink())
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", tidy_then_lock)
    with take(folder):
        assert lock.exists()
        with pytest.raises(LeaseTimeout):
            take(folder, patience=0)


def test_a_full_disk_is_said_and_leaves_no_lock(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(LeaseError, match="No space left"):
        take(folder)
    monkeypatch.undo()
    take(folder, patience=0).release()
