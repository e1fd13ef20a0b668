"""The example scripts: healthy ones finish, and each planted mistake stops by its name."""

from __future__ import annotations

import importlib.util
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

from pytest_qvl.training import GuardError

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKS = {
    "visual-skip-list": "quantization_census",
    "leaky-targets": "adapter_census",
    "early-optimizer": "adapter_census",
    "prompt-in-loss": "batch",
    "types-dropped": "batch",
}
SINCE_5 = {"visual-skip-list", "types-dropped"}
WITHOUT_TRL = pytest.mark.skipif(not (find_spec("trl") and find_spec("datasets")), reason="trl is not installed")
SCRIPTS = ["trainer", pytest.param("sft_trainer", marks=WITHOUT_TRL)]


@pytest.fixture(scope="module")
def example():
    def load(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_healthy_example_finishes(example, script, tmp_path):
    module = example(script)
    arguments = ["--output", str(tmp_path), "--steps", "2"]
    if script == "sft_trainer" and (reason := module.loss_cannot_run()):
        with pytest.raises(SystemExit, match="computes the loss by a Triton kernel"):
            module.main(arguments)
        pytest.skip(reason)
    module.main(arguments)
    record = json.loads((tmp_path / "qvl_guard.json").read_text())
    assert record["state"] == "finished"
    assert record["judged"].keys() >= {"batch", "adapter_roundtrip", "adapter_moved", "base_unchanged"}
    assert not record["not_judged"]


@pytest.mark.parametrize("mistake", CHECKS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistake_stops_an_example(example, script, mistake, tmp_path):
    if mistake in SINCE_5 and Version(transformers.__version__).major < 5:
        pytest.skip("no mistake before Transformers 5")
    module = example(script)
    assert list(module.MISTAKES) == list(CHECKS)
    with pytest.raises(GuardError) as stopped:
        module.main(["--output", str(tmp_path), "--mistake", mistake])
    print(stopped.value)
    assert (stopped.value.check, stopped.value.step) == (CHECKS[mistake], 0)
