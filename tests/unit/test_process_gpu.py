"""Who else holds a GPU, in words; the lease itself is tested in ``test_lease.py`` and ``plugin/test_gpu_session.py``."""

from __future__ import annotations

import pytest

from pytest_qvl.gpu.nvml import GpuProcess, Holdings
from pytest_qvl.session import process_gpu

GiB, MiB = 1 << 30, 1 << 20
TRAINER = GpuProcess(7, "/home/somebody/bin/trainer", 3 * GiB)


@pytest.fixture
def told(monkeypatch):
    def say(holdings, *, running=False):
        driver = type("Driver", (), {"holdings": lambda self, uuid: holdings})
        monkeypatch.setattr("pytest_qvl.gpu.nvml.driver", driver)
        monkeypatch.setattr("pytest_qvl.gpu.lease.cuda_started", lambda: running)
        return process_gpu.others_on("GPU-aaaa")

    return say


@pytest.mark.parametrize(
    ("holdings", "says"),
    [
        (None, ""),
        (Holdings(3 * MiB, None, (), 3 * MiB), ""),
        (Holdings(3 * GiB, None, (TRAINER,), 0), "3.00 GiB by trainer (pid 7)"),
        (Holdings(GiB, None, (GpuProcess(8, "pid 8", None),), 0), "an unknown amount by pid 8"),
        (Holdings(GiB, None, (), GiB), "1.00 GiB by processes that the driver does not list"),
        (Holdings(GiB, None, (GpuProcess(9, "/x/a\x1b[31m", MiB),), 0), "1 MiB by a?[31m (pid 9)"),
    ],
    ids=["no driver", "idle", "a process", "unnamed", "hidden", "harmless"],
)
def test_others_are_named(told, holdings, says):
    assert told(holdings) == says


def test_many_others_are_counted(told):
    others = tuple(GpuProcess(pid, f"job{pid}", GiB) for pid in range(8))
    assert told(Holdings(8 * GiB, 0, others, 0)).endswith("1.00 GiB by job4 (pid 4), 3 more")


def test_where_this_process_is_hidden_it_is_not_called_another(told):
    hidden = Holdings(5 * GiB, None, (TRAINER,), 2 * GiB)
    assert told(hidden, running=True).endswith(", this process among them, which the driver does not tell apart")
    assert "among them" not in told(Holdings(5 * GiB, GiB, (TRAINER,), GiB), running=True)
