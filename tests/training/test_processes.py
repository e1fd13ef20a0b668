"""Two processes: each judges what it sees, both stop together, one writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_qvl.evidence import Evidence
from pytest_qvl.training.findings import Finding
from pytest_qvl.training.ranks import many_processes, of_all_processes

SCRIPT = Path(__file__).with_name("two_processes.py")


def test_findings_survive_the_way_through_the_other_processes():
    found = Finding(Evidence("loss", "every loss is a number", problems=("a loss is nan",)), 3, "at step 3", rank=1)
    assert Finding.from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_one_process_alone_asks_nobody(tmp_path):
    from torch import distributed

    found = Finding(Evidence("loss", "every loss is a number", problems=("a loss is nan",)), 3, "at step 3")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        assert of_all_processes([found], "cpu") == [found]
        assert not many_processes()
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(SCRIPT),
        str(tmp_path),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    healthy = json.loads((tmp_path / "healthy" / "qvl_guard.json").read_text())
    assert (healthy["state"], healthy["steps"], healthy["findings"]) == ("finished", 2, [])
    assert healthy["run"]["processes"] == 2
    assert healthy["judged"].keys() >= {"batch", "gradients", "adapter_moved", "base_unchanged", "adapter_roundtrip"}
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found == {"check": "batch", "rank": 1, "steps": 0}
    broken = json.loads((tmp_path / "broken" / "qvl_guard.json").read_text())
    assert broken["state"] == "stopped"
    assert [finding["rank"] for finding in broken["findings"]] == [1]
