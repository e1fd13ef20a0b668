"""Every check passes on a healthy model as a trainer prepares it: k-bit preparation, Accelerate, autocast around."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest

from pytest_qvl.checks import layer_arithmetic
from pytest_qvl.evidence import CheckFailed
from pytest_qvl.faults.case import healthy_case, lora_config
from pytest_qvl.faults.matrix.panel import PASS, UNDECIDED, all_checks, judge
from pytest_qvl.faults.subject import Subject
from pytest_qvl.models.anatomy import anatomy

MODELS = ("embedded", "embedded:qwen3-vl", "embedded:qwen3.5")
PREPARATIONS = (
    "Accelerate in bfloat16",
    "k-bit, Accelerate in bfloat16",
    "k-bit, Accelerate in float16",
    "k-bit, bfloat16 autocast around",
)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    import torch

    asked: str = request.param
    if asked == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA: no CUDA device is visible")
    return asked


def _prepared(case: Any, preparation: str, dtype: str) -> Any:
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from peft import get_peft_model, prepare_model_for_kbit_training

    model = case.model
    if "k-bit" in preparation:
        base = prepare_model_for_kbit_training(case.load(lora=None), use_gradient_checkpointing=False)
        with torch.random.fork_rng(devices=case.subject.random_devices()):
            torch.manual_seed(0)
            model = get_peft_model(base, lora_config()).eval()
    if "Accelerate" not in preparation:
        return model
    AcceleratorState._reset_state(reset_partial_state=True)
    precision = {"bfloat16": "bf16", "float16": "fp16"}[dtype]
    return Accelerator(mixed_precision=precision, cpu=case.subject.device == "cpu").prepare(model)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("preparation", PREPARATIONS)
@pytest.mark.parametrize("model", MODELS)
def test_no_check_raises_an_alarm(model: str, preparation: str, device: str) -> None:
    import torch

    dtype = "float16" if preparation.endswith(" float16") else "bfloat16"
    case = healthy_case(subject=Subject.of(model, device, dtype))
    case.model = _prepared(case, preparation, dtype)
    around = torch.autocast(device, torch.bfloat16) if "autocast" in preparation else nullcontext()
    with around:
        verdicts = {name: judge(case, name) for name in all_checks(device)}
        long = case.long_batch()  # of more rows than 4-bit kernels are used for on a GPU
        assert layer_arithmetic(case.model, long).figures
    assert {name: v.message for name, v in verdicts.items() if v.outcome not in (PASS, UNDECIDED)} == {}
    assert sum(v.outcome == PASS for v in verdicts.values()) >= len(verdicts) - 1


def test_a_norm_without_its_eps_is_seen_under_autocast() -> None:
    case = healthy_case()
    model = _prepared(case, "k-bit, Accelerate in bfloat16", "bfloat16")
    anatomy(model).blocks[1].norm1.variance_epsilon = 1e-2
    with pytest.raises(CheckFailed, match="eps"):
        layer_arithmetic(model, case.batch())
