"""The guard under Unsloth's trainer, by the example, each run in a process of its own: Unsloth patches its whole process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
EXAMPLE = Path(__file__).parents[2] / "examples" / "unsloth_trainer.py"
CHECKS = {"vision-layers": "adapter_census", "prompt-in-loss": "batch", "types-dropped": "batch"}


@pytest.fixture
def example(torch, tmp_path):
    if find_spec("unsloth") is None:
        pytest.skip("unsloth is not installed")

    def run(*arguments):
        environment = {
            **os.environ,
            "UNSLOTH_COMPILE_LOCATION": str(tmp_path / "compiled"),
            "UNSLOTH_COMPILE_DISABLE": "1",
            "UNSLOTH_DISABLE_STATISTICS": "1",
            "CI": "",  # torch makes errors of warnings where it is set
        }
        command = [sys.executable, str(EXAMPLE), "--output", str(tmp_path / "out"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)

    return run


def test_a_healthy_training_of_unsloth_finishes(example, tmp_path):
    done = example()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    record = json.loads((tmp_path / "out" / "qvl_guard.json").read_text())
    assert record["state"] == "finished"
    assert not record["findings"]
    assert record["judged"].keys() >= {"batch", "quantization_census", "gradients", "adapter_moved", "base_unchanged"}


@pytest.mark.parametrize("mistake", CHECKS)
def test_a_mistake_stops_unsloths_trainer(example, tmp_path, mistake):
    done = example("--mistake", mistake)
    assert done.returncode != 0
    assert f"training stopped by {CHECKS[mistake]}" in done.stderr, done.stderr[-4000:]
