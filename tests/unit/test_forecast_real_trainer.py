"""The steps that are forecast against those of the real ``transformers.Trainer``, byte by byte, on real tensors."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.families import FAMILIES
from pytest_qvl.models.quantized import base_tensors, keep_quantized_weights_in_place, usual_quantization
from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.models.sources.synthetic import build_synthetic
from pytest_qvl.vram.forecast import Request, Sample, phases
from pytest_qvl.vram.forecast.engine import kernels
from pytest_qvl.vram.forecast.engine.build import asked_lora
from pytest_qvl.vram.forecast.engine.dry_run import DryRun
from pytest_qvl.vram.forecast.engine.trace import _PHASE, ALLOC, FREE, AllocationTrace
from pytest_qvl.vram.forecast.engine.workload import model_inputs, prepare_training, train
from pytest_qvl.vram.forecast.source import find_source
from pytest_qvl.vram.forecast.validation.measured import MeterStage
from pytest_qvl.vram.forecast.validation.trainers.training import train_with_trainer
from pytest_qvl.vram.meter import Meter
from pytest_qvl.vram.units import KiB

USUAL = Request(
    model=str(embedded_model_dir()),
    image=(112, 112),
    tokens=120,
    lora_r=4,
    optimizer="adamw_torch",
    gradient_checkpointing=False,
    checkpoint="synthetic",
)
# An image with a video, and two videos; one has an odd number of frames.
VIDEOS = (Sample(((112, 112),), 30, ((5, 56, 84),)), Sample((), 50, ((4, 84, 56), (2, 56, 56))))
# Linear attention, in Transformers' PyTorch code where its kernels are not installed.
QWEN3_5 = str(embedded_model_dir("qwen3.5"))
WITH_QWEN3_5 = pytest.mark.skipif(not FAMILIES["qwen3_5"].installed, reason="this Transformers has no Qwen3.5")
PADDED = (Sample(((112, 112),), 60), Sample(((56, 56), (56, 84)), 30))


class LiveBytes(TorchDispatchMode):
    """Most bytes alive at once, of storages that operations created, without the model's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known = {tensor.untyped_storage()._cdata for _, tensor in base_tensors(anatomy(model))}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: Any) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def base(request: Request) -> Any:
    """A quantized model on the CPU, as its real loader leaves it."""
    torch.manual_seed(0)
    config = find_source(request.model).config
    model = build_synthetic(config, usual_quantization(torch.bfloat16), "cpu", torch.bfloat16)
    keep_quantized_weights_in_place(model)
    model.requires_grad_(False)
    return model


def most_bytes_of_the_real_trainer(request: Request) -> int:
    """Beyond the model, and without the batch that Accelerate's data loader has fetched ahead.

    That batch counts on the CPU, and is in host memory on CUDA. The peak is in the second of three steps, where there
    is one.
    """
    source, model = find_source(request.model), base(request)
    with LiveBytes(model) as real:
        train_with_trainer(model, request, source, "cpu", steps=3)
    stage = MeterStage(Meter(), "cpu", scaled=False)
    batch = model_inputs(anatomy(model), request, source, stage).values()
    return real.peak - sum(part.nbytes for part in batch if isinstance(part, torch.Tensor))


def most_live_bytes(trace: AllocationTrace) -> int:
    """Of a trace that begins with loading a model saved in NF4, beyond that model."""
    live: dict[int, int] = {}
    now = most = loaded = 0
    for code, number, size, _ in trace.events:
        if code == ALLOC:
            live[number] = size
            now += size
        elif code == FREE:
            now -= live.pop(number)
        elif code == _PHASE and trace.phases[number] == phases.ATTACH:
            loaded = now
        most = max(most, now)
    return most - loaded


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"accumulation": 2}, marks=pytest.mark.slow),
        {"gradient_checkpointing": True, "samples": PADDED},
        pytest.param(
            {"samples": VIDEOS},
            marks=pytest.mark.slow,
            id="videos",
        ),
        pytest.param({"reentrant": True, "gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"precision": "bf16-pure"}, marks=pytest.mark.slow),
        pytest.param({"packed": True, "samples": PADDED}, marks=pytest.mark.slow),
        pytest.param({"evaluation": 4, "evaluation_batches": 6, "compute_metrics": True}, marks=pytest.mark.slow),
        pytest.param({"use_dora": True, "lora_dropout": 0.1}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_step_takes_the_bytes_of_the_real_trainers(changes: dict[str, Any]) -> None:
    """The same kernels on both sides, so that only what the trainer does can differ.

    What is left are scalars of the loss and of logging.
    """
    request = replace(USUAL, **changes)
    source = find_source(request.model)
    theirs = most_bytes_of_the_real_trainer(request)
    from peft import get_peft_model

    model = base(request)
    stage = MeterStage(Meter(), "cpu", scaled=False)
    with LiveBytes(model) as ours:
        parts = anatomy(get_peft_model(model, asked_lora(anatomy(model), request)))
        prepare_training(parts, request, stage)
        train(parts, request, source, stage)
    assert abs(theirs - ours.peak) <= 8 * KiB


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_dora": True},
        {"reentrant": True, "gradient_checkpointing": True},
        {"samples": VIDEOS},
        {"packed": True, "samples": PADDED, "gradient_checkpointing": True},
        pytest.param({"model": QWEN3_5}, marks=WITH_QWEN3_5),
        pytest.param({"model": QWEN3_5, "gradient_checkpointing": True, "samples": PADDED}, marks=WITH_QWEN3_5),
    ],
    ids=lambda changes: "-".join(changes) or "usual",
)
def test_a_forecast_takes_the_bytes_of_the_real_trainer(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without data under the CPU's rules against real ones on it.

    Without autocast: of it PEFT's layers ask whether it is CUDA's, and the forecast says yes.
    """
    request = replace(USUAL, precision="bf16-pure", **changes)
    monkeypatch.setattr(kernels, "scratch", lambda *_: [])
    monkeypatch.setattr(kernels, "WORKSPACES_OF", {})
    monkeypatch.setattr(kernels, "dropout", torch.nn.functional.dropout)
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(kernels, "attention", lambda _, *args, **kwargs: attention(*args, **kwargs))
    run = DryRun(replace(request, checkpoint="nf4"), find_source(request.model))
    ours = most_live_bytes(run.run(request, inference=False))
    assert abs(most_bytes_of_the_real_trainer(request) - ours) <= 8 * KiB
