"""What a trainer that goes on from a checkpoint has on the device, against Transformers, PEFT and bitsandbytes."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.vram.forecast import Request, phases
from pytest_qvl.vram.forecast.engine import build
from pytest_qvl.vram.forecast.engine.build import asked_lora
from pytest_qvl.vram.forecast.engine.trainers import adapter_in_bfloat16
from pytest_qvl.vram.forecast.run import Forecaster
from pytest_qvl.vram.forecast.source import find_source
from pytest_qvl.vram.forecast.validation.trainers.training import _train, train_with_trainer
from pytest_qvl.vram.units import KiB
from tests.unit.test_forecast_real_trainer import LiveBytes, base

if TYPE_CHECKING:
    from pathlib import Path

USUAL = Request(
    model=str(embedded_model_dir()),
    image=(56, 56),
    tokens=24,
    lora_r=4,
    optimizer="adamw_torch",
    gradient_checkpointing=False,
    checkpoint="synthetic",
)


def trained(request: Request) -> Any:
    return train_with_trainer(base(request), request, find_source(request.model), "cpu", steps=1)


@pytest.mark.parametrize("trainer", ["hf", "trl"])
def test_a_resumed_adapter_is_in_float32_whoever_trains_it(trainer: Any) -> None:
    """SFTTrainer casts it to bfloat16, and PEFT's load_adapter casts it back."""
    if trainer == "trl":
        pytest.importorskip("trl")
        if find_spec("triton") and not torch.cuda.is_available():
            pytest.skip("TRL trains by Triton's kernels where Triton is installed, and they need a GPU")
    begun = replace(USUAL, trainer=trainer)
    resumed = replace(begun, resume=True)
    assert trained(begun).adapter_dtypes == {"torch.bfloat16" if trainer == "trl" else "torch.float32"}
    assert trained(resumed).adapter_dtypes == {"torch.float32"}


def most_bytes(request: Request, *, saves: bool) -> int:
    model = base(request)
    with LiveBytes(model) as live, tempfile.TemporaryDirectory() as folder:
        _train(model, request, find_source(request.model), "cpu", 3, folder=folder, saves=saves)
    return live.peak


def test_saving_a_checkpoint_after_every_step_never_holds_more_than_a_step() -> None:
    assert abs(most_bytes(USUAL, saves=True) - most_bytes(USUAL, saves=False)) <= 8 * KiB


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["PagedAdamW8bit", "PagedAdamW32bit", "AdamW8bit"])
def test_states_that_bitsandbytes_loads_are_on_the_device_and_not_paged(name: str) -> None:
    """The real load_state_dict, of states on the host into an optimizer of parameters on another device."""
    import bitsandbytes as bnb

    saved = getattr(bnb.optim, name)([torch.nn.Parameter(torch.ones(400, 400))])
    saved.param_groups[0]["params"][0].grad = torch.ones(400, 400)
    saved.step()
    states = saved.state_dict()
    assert all(value.is_cpu for value in of_one(states["state"]).values() if isinstance(value, torch.Tensor))
    parameter = torch.nn.Parameter(torch.ones(400, 400, device="meta"))
    resumed = getattr(bnb.optim, name)([parameter])
    resumed.load_state_dict(states)
    loaded = {key: value for key, value in resumed.state[parameter].items() if isinstance(value, torch.Tensor)}
    assert {"state1", "state2"} <= loaded.keys()
    for value in loaded.values():
        assert value.is_meta
        assert not getattr(value, "is_paged", False)


def of_one(states: dict[int, Any]) -> dict[str, Any]:
    """What one parameter has, out of the wrapping that bitsandbytes saves it in."""
    found: dict[str, Any] = {}
    for name, value in states[0].items():
        found |= value if isinstance(value, dict) else {name: value}
    return found


def made(**changes: Any) -> Any:
    request = replace(USUAL, **{"checkpoint": "nf4", "lora_r": 64, "capability": (8, 0), **changes})
    return Forecaster(request).forecast(request, inference=False)


def bytes_at(found: Any, phase: str, kind: str) -> int:
    return next(one.by_kind.get(kind, 0) for one in found.phases if one.name == phase)


def test_a_resumed_training_has_the_adapter_twice_and_then_its_states() -> None:
    found = made(resume=True, optimizer="sgd")
    once = bytes_at(made(optimizer="sgd"), phases.FIRST, "adapters")
    assert bytes_at(found, phases.RESUME, "adapters") == 2 * once
    assert bytes_at(found, phases.FIRST, "adapters") == once
    assert bytes_at(made(resume=True, optimizer="adamw_torch"), phases.FIRST, "optimizer") >= 2 * once


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch", "paged_adamw_32bit"])
@pytest.mark.parametrize("trainer", ["hf", "trl"])
def test_what_one_card_loads_is_less_than_a_step_takes(trainer: Any, optimizer: Any) -> None:
    """Whatever the adapter's size: here it is most of what a step has beside the model."""
    found = made(resume=True, trainer=trainer, optimizer=optimizer, lora_r=512)
    loading = found.phase(phases.RESUME)
    step = found.phase(phases.OPTIMIZER)
    assert loading.by_kind["adapters"] > loading.by_kind["weights"]
    assert loading.peak_allocated < step.peak_allocated


def test_paged_states_are_on_the_card_once_they_were_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "PAGED_ELEMENTS", 1)
    paged, plain = (
        {
            resume: bytes_at(made(resume=resume, optimizer=name), phases.OPTIMIZER, "optimizer")
            for resume in (False, True)
        }
        for name in ("paged_adamw_8bit", "adamw_8bit")
    )
    assert paged[False] < plain[False]
    assert paged[True] == plain[True] >= plain[False]


def test_a_resumed_adapter_of_trl_is_twice_as_large() -> None:
    begun, resumed = (made(trainer="trl", resume=resume, optimizer="adamw_torch") for resume in (False, True))
    for kind in ("adapters", "gradients", "optimizer"):
        before, after = (bytes_at(found, phases.OPTIMIZER, kind) for found in (begun, resumed))
        assert after == pytest.approx(2 * before, rel=0.05), kind


def test_one_of_several_cards_reads_the_states_to_the_card_and_bitsandbytes_copies_them() -> None:
    alone, several = (made(resume=True, optimizer="adamw_8bit", ddp=ddp) for ddp in (False, True))
    states = bytes_at(alone, phases.FIRST, "optimizer")
    assert bytes_at(several, phases.RESUME, "optimizer") > 1.5 * states


@pytest.mark.parametrize("changes", [{}, {"trainer": "trl", "resume": True}, {"trainer": "trl"}], ids=str)
def test_the_best_adapter_is_beside_the_one_that_was_trained(changes: dict[str, Any]) -> None:
    found = made(load_best=True, evaluation=1, **changes)
    before = bytes_at(found, phases.EVALUATION, "adapters")
    wider = changes == {"trainer": "trl"}  # the file in 16 bits, and what stands in place of the model's in 32
    assert bytes_at(found, phases.LOAD_BEST, "adapters") == (4 if wider else 2) * before


def test_an_adapter_that_is_loaded_beside_an_optimizer_leaves_it_the_one_in_16_bits(tmp_path: Path) -> None:
    """What ``load_best_model_at_end`` does under TRL, by the real PEFT."""
    from peft import get_peft_model

    model = base(USUAL)
    model = get_peft_model(model, asked_lora(anatomy(model), USUAL))
    adapter_in_bfloat16(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    model.save_pretrained(str(tmp_path))
    model.load_adapter(str(tmp_path), "default")
    loaded = [p for name, p in model.named_parameters() if "lora_" in name]
    assert {p.dtype for p in loaded} == {torch.float32}
    assert not held & {id(p) for p in loaded}
    assert {p.dtype for group in optimizer.param_groups for p in group["params"]} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"trainer": "loop"}, "trainer is 'loop', which has no checkpoints"),
        ({"trainer": "unsloth"}, "resume is True and trainer is 'unsloth', whose own code"),
        ({"lora_targets": ("q_proj", "lm_head")}, "lora_targets has 'lm_head', with which PEFT saves whole embeddings"),
    ],
    ids=["loop", "unsloth", "embeddings"],
)
def test_what_no_trainer_resumes_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(USUAL, resume=True, **changes)
