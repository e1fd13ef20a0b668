"""The guard on CUDA: mixed precision, the loss scaler, memory; and that training is bitwise what it is without it."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from pathlib import Path

import pytest

from pytest_qvl.training import Guard, GuardError

pytestmark = pytest.mark.gpu
WORKBENCH = Path(__file__).parents[1] / "training" / "workbench.py"


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def bench(torch):
    spec = importlib.util.spec_from_file_location("qvl_workbench", WORKBENCH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["qvl_workbench"] = module
    spec.loader.exec_module(module)
    return module.Workbench.with_scenes(8)


def train(bench, folder, *callbacks, dtype="bfloat16", **changes):
    with bench.model(dtype, device="cuda:0", lora_dropout=0.1) as model:
        settings = {"use_cpu": False, "max_steps": 12, "per_device_train_batch_size": 2, **changes}
        bench.trainer(model, folder, *callbacks, **settings).train()
        return bench.adapter_bits(model)


def record_of(folder):
    return json.loads((folder / "qvl_guard.json").read_text())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_healthy_training_is_judged_and_bitwise_the_same(bench, torch, tmp_path, precision):
    dtype = {"bf16": "bfloat16", "fp16": "float16"}[precision]
    without = train(bench, tmp_path / "without", dtype=dtype, **{precision: True})
    again = train(bench, tmp_path / "again", dtype=dtype, **{precision: True})
    guarded = train(bench, tmp_path / "with", Guard(every=5), dtype=dtype, **{precision: True})
    record = record_of(tmp_path / "with")
    assert record["state"] == "finished"
    assert not record["findings"]
    assert record["judged"].keys() >= {"batch", "quantization_census", "gradients", "adapter_moved", "base_unchanged"}
    if without == again:  # kernels that do not repeat themselves prove nothing either way
        assert guarded == without


def test_memory_above_its_limit_stops(bench, torch, tmp_path):
    with pytest.raises(GuardError, match="are allowed") as stopped:
        train(bench, tmp_path, Guard(vram_limit="1 MiB"), bf16=True)
    assert (stopped.value.check, stopped.value.step) == ("peak_vram", 1)


def test_a_scaler_that_skips_every_step_stops(bench, torch, tmp_path):
    from transformers import TrainerCallback

    class Overflows(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            next(p for n, p in model.named_parameters() if "lora_B" in n).register_hook(lambda grad: grad / 0)

    with pytest.raises(GuardError, match="loss scaler has skipped") as stopped:
        train(bench, tmp_path, Overflows(), Guard(), dtype="float16", fp16=True, max_steps=40)
    assert stopped.value.check == "loss_scaler"


def test_a_base_that_moves_on_the_gpu_stops(bench, torch, tmp_path):
    from transformers import TrainerCallback

    from pytest_qvl.models.anatomy import anatomy

    class Writes(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                anatomy(model).lm_head.weight.view(-1)[7] += 1

    with pytest.raises(GuardError, match="after step 1") as stopped:
        train(bench, tmp_path, Guard(), Writes(), bf16=True)
    assert stopped.value.check == "base_unchanged"
