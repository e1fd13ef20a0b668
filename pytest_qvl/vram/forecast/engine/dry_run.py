"""The run whose memory is forecast: load, an inference pass, training steps, on tensors without data."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.renamed import kv_cache_name
from pytest_qvl.vram.forecast import phases
from pytest_qvl.vram.forecast.engine import liger, resuming
from pytest_qvl.vram.forecast.engine.build import Recipe, attach_lora, build_base, follow_gradients, make_optimizer
from pytest_qvl.vram.forecast.engine.kernels import Device
from pytest_qvl.vram.forecast.engine.linear_attention import installed, linear_attention_by
from pytest_qvl.vram.forecast.engine.recorder import Recorder
from pytest_qvl.vram.forecast.engine.repeats import NotRepeatingError, Repeats
from pytest_qvl.vram.forecast.engine.towers import towers
from pytest_qvl.vram.forecast.engine.trace import AllocationTrace
from pytest_qvl.vram.forecast.engine.trainers import adapter_in_bfloat16
from pytest_qvl.vram.forecast.engine.workload import infer, prepare_training, train

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.vram.forecast.engine.towers import Tower
    from pytest_qvl.vram.forecast.engine.trace import Kind, Step
    from pytest_qvl.vram.forecast.request import Optimizer, Request
    from pytest_qvl.vram.forecast.source import Source

# ``torch.amp.GradScaler``'s initial scale; any other gives the same memory.
LOSS_SCALE = 65536.0


class DryRun:
    """One model on a pretended device, run as often as asked with other images, batches or lengths.

    Building the model is recorded once and is the common beginning of every trace.

    Args:
        request: What to build; later requests may differ in image size, images, batch, tokens and new
            tokens.
        source: The model's configuration.
        recipe: How it is quantized and adapted; by default every language linear, by ``request.lora_r``.
    """

    def __init__(self, request: Request, source: Source, recipe: Recipe | None = None) -> None:
        if request.liger:
            liger.check_followed(source.config.model_type)
        recipe = recipe or (
            Recipe(quantized=frozenset()) if request.base_bits == 16 else Recipe(bits=request.base_bits)
        )
        if request.packed and source.linear_attention:
            raise ValueError("packed is True: how linear attention tells packed samples apart is not followed")
        self.source = source
        # ``unsloth_zoo/__init__.py`` sets it before torch begins.
        trace = AllocationTrace(expandable=request.trainer == "unsloth")
        device = Device(request.capability)
        self._recorder = Recorder(trace, device, source.config.get_text_config().vocab_size)
        self._stage = DryRunStage(self._recorder, scaled=request.scales_loss)
        trace.phase(phases.LOAD)
        dtype = getattr(torch, request.compute_dtype)
        model = build_base(source.config, dtype, request.checkpoint, self._recorder, recipe)
        if request.kbit_upcast:
            from peft import prepare_model_for_kbit_training

            trace.phase(phases.PREPARE)
            with self._recorder, self._recorder.labelled("weights"):
                prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
            trace.empty_cache()
        if request.lora_r:
            trace.phase(phases.ATTACH)
            model = attach_lora(model, request, self._recorder, recipe)
            if request.adapter_in_bfloat16:
                with self._recorder, self._recorder.labelled("adapters"):
                    adapter_in_bfloat16(model)
            if request.resume:
                trace.phase(phases.RESUME)
                with self._recorder, self._recorder.labelled("adapters"):
                    resuming.load_adapter(model)
        self._parts = anatomy(model)
        self._capability = request.capability
        if request.lora_r:
            prepare_training(self._parts, request, self._stage)
            follow_gradients(self._parts, self._recorder)
        self._beginning = trace
        self._shortens = True

    def run(self, request: Request, *, inference: bool = True) -> AllocationTrace:
        """Run the real model code without data and return what it did to device memory, loading included.

        Args:
            request: What to run.
            inference: Whether to make the inference pass before the training step.
        """
        if self._shortens:
            try:
                return self._run(request, towers(self._parts), inference=inference)
            except NotRepeatingError:
                self._shortens = False
                self._parts.wrapped.zero_grad()
        return self._run(request, [], inference=inference)

    def _run(self, request: Request, shortened: list[Tower], *, inference: bool) -> AllocationTrace:
        trace = self._begin()
        self._stage.repeats = repeats = Repeats(shortened, self._recorder)
        attentions: list[Any] = [block.attn for block in self._parts.blocks] if shortened else []
        mixers = linear_attention_by(self._parts, request.linear_attention, self._capability)
        with _model_set_aside(), mixers, self._recorder, self._recorder.chunks.shortened(attentions):
            if inference:
                with repeats.shortened():
                    infer(self._parts, request, self.source, self._stage)
            if request.lora_r:
                with repeats.shortened():
                    train(self._parts, request, self.source, self._stage)
        trace.close()
        return trace

    def run_work(
        self,
        batches: Sequence[Mapping[str, torch.Tensor]],
        work_of: Callable[..., Mapping[str, Callable[[], object]]],
    ) -> AllocationTrace:
        """Run somebody else's work on batches of the same shapes and return what it did to device memory.

        Linear attention is by what is installed, as that work has it on real tensors.

        Each piece of work is a phase of its own that begins as one of the meter's does: without garbage, library
        workspaces and cached memory.

        Args:
            batches: Real inputs: ids, masks and grids keep their values, images their shape and dtype.
            work_of: Given the model's parts and the batches, pieces of work by name.
        """
        trace = self._begin()
        mixers = linear_attention_by(self._parts, installed(self._parts), self._capability)
        with _model_set_aside(), mixers, self._recorder:
            with self._recorder.labelled("inputs"):
                placed = [{name: self._input(tensor) for name, tensor in batch.items()} for batch in batches]
            for name, work in work_of(self._parts, *placed).items():
                gc.collect()
                self._recorder.drop_workspaces()
                self._stage.empty_cache()
                trace.phase(name)
                work()
        trace.close()
        return trace

    def _begin(self) -> AllocationTrace:
        trace = self._beginning.fork()
        self._recorder.continue_on(trace, self._beginning.allocations)
        return trace

    def _input(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            return self._recorder.dataless(tuple(tensor.shape), tensor.dtype)
        return tensor.to("cpu", copy=True)


@contextmanager
def _model_set_aside() -> Iterator[None]:
    """Garbage is looked for among what is made inside, not in a million objects of models and modules each time.

    What the caller set aside stays so: a freeze cannot be undone in part.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class DryRunStage:
    """A stage on which nothing has data; see :class:`~pytest_qvl.vram.forecast.engine.workload.Stage`.

    Args:
        recorder: Follows what happens.
        scaled: Whether the loss is scaled, as for float16.

    Attributes:
        repeats: Layers that do not run.
    """

    autocast_device = "cpu"  # tensors without data say that they are there

    def __init__(self, recorder: Recorder, *, scaled: bool) -> None:
        self._recorder = recorder
        self._scaled = scaled
        self._step: Step
        self.repeats = Repeats([], recorder)

    def labelled(self, kind: Kind) -> AbstractContextManager[None]:
        """Allocations inside count as ``kind``."""
        return self._recorder.labelled(kind)

    def phase(self, name: str) -> None:
        """Everything from here on belongs to phase ``name``."""
        if name == phases.OPTIMIZER:
            self.repeats.fill_gradients()
        self._recorder.trace.phase(name)

    def empty_cache(self) -> None:
        """Note that the allocator gives its cached segments back to the driver."""
        self._recorder.trace.empty_cache()

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself: the recorder saw it come."""
        return tensor

    def pixels(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Images without data, of that shape."""
        return self._recorder.dataless(shape, dtype)

    def generation_arguments(self, parts: Parts, source: Source) -> dict[str, Any]:
        """A ``DynamicCache`` whose keys and values count as ``"cache"`` from the moment they are in it."""
        from transformers import DynamicCache

        recorder = self._recorder

        class FollowedCache(DynamicCache):  # type: ignore[misc]
            def update(self, *args: Any, **kwargs: Any) -> Any:
                states = super().update(*args, **kwargs)
                for state in states:
                    recorder.relabel(state, "cache")
                return states

        return {kv_cache_name(parts): FollowedCache(config=source.config.get_text_config())}

    def recomputed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same under the recorder's rules."""
        return self._recorder.recomputed(function)

    def optimizer(self, name: Optimizer, parameters: list[Any]) -> Any:
        """The real optimizer over parameters without data."""
        return make_optimizer(name, parameters, self._recorder)

    def resume(self, optimizer: Any, parameters: list[Any], *, ddp: bool) -> None:
        """The states that a checkpoint has, and the copies that loading makes of them."""
        with self._recorder.off_device():  # where the checkpoint is
            for parameter in parameters:
                parameter.grad = self._recorder.dataless(tuple(parameter.shape), parameter.dtype)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        resuming.load_states(optimizer, ddp=ddp)

    def first_step(self, step: Callable[[], None], parameters: list[Any], optimizer: Any) -> None:  # noqa: ARG002
        """An update alone: forward and backward of the step leave library workspaces behind and nothing else."""
        self._recorder.keep_workspaces()
        for parameter in parameters:
            parameter.grad = self._recorder.dataless(tuple(parameter.shape), parameter.dtype)
        with self.labelled("optimizer"):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def first_of_two(self, step: Callable[[], None]) -> None:
        """Run the step; what it does and undoes is what the second will do."""
        trace = self._recorder.trace
        start = len(trace.events)
        step()
        gc.collect()
        self.repeats.complete()
        self._step = trace.take_step(start, phases.OF_THE_FIRST)

    def second_of_two(self, step: Callable[[], None]) -> None:  # noqa: ARG002
        """The first one's allocations and frees once more, without running it."""
        self._recorder.trace.repeat(self._step)

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the scale, for float16."""
        return loss * LOSS_SCALE if self._scaled else loss

    def unscale(self, optimizer: Any) -> None:
        """Nothing: a scale is taken away in place."""

    def update(self, optimizer: Any) -> None:
        """Update the parameters; taking the scale away needs no memory."""
        optimizer.step()
