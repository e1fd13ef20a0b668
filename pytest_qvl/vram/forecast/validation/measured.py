"""The same run as the forecast's, on a real device under the meter."""

from __future__ import annotations

import gc
import traceback
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.quantized import keep_quantized_weights_in_place, usual_quantization
from pytest_qvl.models.sources.synthetic import build_synthetic
from pytest_qvl.vram.forecast import phases
from pytest_qvl.vram.forecast.engine.build import asked_lora
from pytest_qvl.vram.forecast.engine.int8 import THRESHOLD
from pytest_qvl.vram.forecast.engine.trainers import adapter_in_bfloat16
from pytest_qvl.vram.forecast.engine.workload import infer, prepare_training, train
from pytest_qvl.vram.forecast.source import find_source

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.vram.forecast.engine.trace import Kind
    from pytest_qvl.vram.forecast.request import Optimizer, Request
    from pytest_qvl.vram.forecast.source import Source
    from pytest_qvl.vram.meter import Meter, Phase
    from pytest_qvl.vram.usage import Usage

# A loss scale that is too large leaves out the update, and with it the optimizer's states; it is halved each time.
FIRST_STEPS = 12


@dataclass(frozen=True)
class Measurement:
    """What one run used.

    Attributes:
        phases: What each phase used, in the order they ran; with accumulation some come back.
    """

    phases: tuple[Usage, ...]

    @property
    def baseline(self) -> int:
        """Bytes that were allocated before anything was loaded."""
        return self.phases[0].alive_allocated

    @property
    def resident(self) -> int:
        """Bytes allocated once the model is ready, before the adapter; without what was there before."""
        building = (phases.LOAD, phases.PREPARE)
        return next(u.alive_allocated for u in self.phases if u.name not in building) - self.baseline

    def peak(self, phase: str) -> int:
        """Peak allocated of a phase, however often it came back, without what was there before loading."""
        return max(u.allocated for u in self.phases if u.name == phase) - self.baseline


def measure(request: Request, meter: Meter, device: str = "cuda", *, inference: bool = True) -> Measurement:
    """Build a synthetic model as ``request`` says, run what is forecast, and measure each phase.

    Nothing of it is left in memory afterwards, also if it runs out of memory.

    Args:
        request: With ``checkpoint="synthetic"``, and an optimizer that is not paged.
        meter: Measures.
        device: Where to run.
        inference: Whether to make the inference pass before the training steps.

    Raises:
        ValueError: Something else than a synthetic model is asked for.
        torch.OutOfMemoryError: It does not fit; the phase's name is on it as ``qvl_phase``.
    """
    if request.checkpoint != "synthetic":
        raise ValueError(f"checkpoint is {request.checkpoint!r}: what is measured here is built with random weights")
    stage = MeterStage(meter, device, scaled=request.scales_loss)
    try:
        _run(request, stage, inference=inference)
    except BaseException as error:
        stage.end(error)
        traceback.clear_frames(error.__traceback__)  # they hold the model
        raise
    finally:
        stage.end(None)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return Measurement(tuple(stage.usages))


def frozen_base(request: Request, source: Source, device: str) -> Any:
    """The quantized base model that ``request`` names, with random weights, none of them trainable."""
    dtype = getattr(torch, request.compute_dtype)
    quantization = usual_quantization(dtype) if request.base_bits == 4 else None
    model = build_synthetic(source.config, quantization, device, dtype)
    if request.base_bits == 8:
        _to_8_bits(model)
    keep_quantized_weights_in_place(model)
    model.requires_grad_(False)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = request.base_bits == 4, request.base_bits == 8  # PEFT, TRL ask
    return model


def _to_8_bits(model: Any) -> None:
    """Every language linear as ``BitsAndBytesConfig(load_in_8bit=True)`` makes it.

    The weights in 16 bits go when the last has been packed: none leaves a hole that depends on the order.
    """
    import bitsandbytes as bnb

    parts = anatomy(model)
    linears = list(parts.named_linears())
    for name, linear in linears:
        if parts.group_of(name) != "language":
            continue
        values, scales, _ = bnb.functional.int8_vectorwise_quant(linear.weight.data.to(torch.float16))
        layer = bnb.nn.Linear8bitLt(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            has_fp16_weights=False,
            threshold=THRESHOLD,
            device="meta",
        )
        layer.weight = bnb.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales)
        layer.bias = linear.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


def _run(request: Request, stage: MeterStage, *, inference: bool) -> None:
    from peft import get_peft_model, prepare_model_for_kbit_training

    source = find_source(request.model)
    stage.begin()
    model = frozen_base(request, source, stage.device)
    if request.kbit_upcast:
        stage.phase(phases.PREPARE)
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        stage.empty_cache()
    if request.lora_r:
        stage.phase(phases.ATTACH)
        model = get_peft_model(model, asked_lora(anatomy(model), request))
        if request.adapter_in_bfloat16:
            adapter_in_bfloat16(model)
    parts = anatomy(model)
    if request.lora_r:
        prepare_training(parts, request, stage)
    if inference:
        infer(parts, request, source, stage)
    if request.lora_r:
        train(parts, request, source, stage)


class MeterStage:
    """A stage on which everything is real; see :class:`~pytest_qvl.vram.forecast.engine.workload.Stage`.

    Args:
        meter: Measures.
        device: ``"cuda"``, or ``"cpu"`` to see that the workload runs.
        scaled: Whether the loss is scaled, as for float16.

    Attributes:
        usages: What each phase used that has ended.
    """

    def __init__(self, meter: Meter, device: str, *, scaled: bool) -> None:
        self.device = self.autocast_device = device
        self._meter = meter
        self._open: Phase | None = None
        self._scaler: Any = torch.amp.GradScaler(device) if scaled else None
        self._names: dict[str, str] = {}
        self.usages: list[Usage] = []

    def begin(self) -> None:
        """The first phase, without garbage, library workspaces and cached memory."""
        self._open = self._meter.begin(phases.LOAD)

    def phase(self, name: str) -> None:
        """End the phase that is open and begin another; nothing happens if it has that name already."""
        name = self._names.get(name, name)
        if self._open is None or self._open.name != name:
            self.end(None)
            self._open = self._meter.begin(name, settle=False)

    def end(self, error: BaseException | None) -> None:
        """End the phase that is open, if any."""
        if self._open is not None:
            ended, self._open = self._open, None
            self.usages.append(self._meter.end(ended, error))

    def labelled(self, kind: Kind) -> AbstractContextManager[None]:  # noqa: ARG002 - a device knows no kinds
        """No label: a device knows no kinds of memory."""
        return nullcontext()

    def empty_cache(self) -> None:
        """Collect garbage and give cached memory back; library workspaces stay."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of the tensor on the device."""
        return tensor.to(self.device)

    def pixels(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Zeros of that shape on the device: what an image shows does not change its memory."""
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def generation_arguments(self, parts: Parts, source: Source) -> dict[str, Any]:  # noqa: ARG002 - the model has its own
        """No arguments: the model makes its own cache."""
        return {}

    def recomputed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function itself: recomputation needs no recorder here."""
        return function

    def optimizer(self, name: Optimizer, parameters: list[Any]) -> Any:
        """The real optimizer.

        Raises:
            ValueError: A paged one, whose states are not in torch's allocator.
        """
        import bitsandbytes as bnb

        if name == "adamw_torch":
            return torch.optim.AdamW(parameters, foreach=True)
        if name == "adamw_8bit":
            return bnb.optim.AdamW8bit(parameters)
        raise ValueError(f"optimizer is {name!r}: paged states cannot be measured by torch's allocator")

    def resume(self, optimizer: Any, parameters: list[Any], *, ddp: bool) -> None:  # noqa: ARG002
        """Nothing: a trainer resumes.

        Raises:
            ValueError: Always.
        """
        raise ValueError("resume is True: a training that goes on from a checkpoint is measured by real trainers")

    def first_step(self, step: Callable[[], None], parameters: list[Any], optimizer: Any) -> None:  # noqa: ARG002
        """Real steps until the optimizer has states.

        Raises:
            RuntimeError: Gradients overflow however small the loss scale.
        """
        for _ in range(FIRST_STEPS):
            step()
            if optimizer.state:
                return
        raise RuntimeError(f"{FIRST_STEPS} training steps overflowed, so the optimizer has no states")

    def first_of_two(self, step: Callable[[], None]) -> None:
        """The real step; its phases are those of a first one."""
        self._names = phases.OF_THE_FIRST
        step()
        self._names = {}

    def second_of_two(self, step: Callable[[], None]) -> None:
        """The real step once more."""
        step()

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the scale, for float16."""
        scaled: torch.Tensor = loss if self._scaler is None else self._scaler.scale(loss)
        return scaled

    def unscale(self, optimizer: Any) -> None:
        """Take the scale away from the gradients, for float16."""
        if self._scaler is not None:
            self._scaler.unscale_(optimizer)

    def update(self, optimizer: Any) -> None:
        """Update the parameters, through the scaler for float16."""
        if self._scaler is None:
            optimizer.step()
        else:
            self._scaler.step(optimizer)
            self._scaler.update()
