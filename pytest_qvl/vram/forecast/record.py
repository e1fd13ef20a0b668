"""The run whose memory is forecast: load, an inference pass, a training step, on tensors without data."""

from __future__ import annotations

import gc
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from pytest_qvl.models.adapters import adapter_parameters
from pytest_qvl.models.anatomy import Parts, anatomy
from pytest_qvl.models.backends.transformers import remove_vision_grad_hooks
from pytest_qvl.vram.forecast import phases
from pytest_qvl.vram.forecast.kernels import Device
from pytest_qvl.vram.forecast.planned import attach_lora, build_base, follow_gradients, make_optimizer
from pytest_qvl.vram.forecast.recorder import Recorder
from pytest_qvl.vram.forecast.tape import Tape

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_qvl.vram.forecast.request import Request
    from pytest_qvl.vram.forecast.source import Source

# ``torch.amp.GradScaler``'s initial scale; any other gives the same memory.
LOSS_SCALE = 65536.0


class Rehearsal:
    """One model on a pretended device, run as often as asked with other pictures, batches or lengths.

    Building the model is recorded once and is the common beginning of every tape.

    Args:
        request: What to build; later requests may differ in picture size, pictures, batch, tokens and new
            tokens.
        source: The model's configuration.
    """

    def __init__(self, request: Request, source: Source) -> None:
        self.source = source
        tape = Tape()
        device = Device(request.capability)
        self._recorder = Recorder(tape, device, source.config.get_text_config().vocab_size)
        tape.phase(phases.LOAD)
        model = build_base(source.config, getattr(torch, request.compute_dtype), request.checkpoint, self._recorder)
        if request.kbit_upcast:
            from peft import prepare_model_for_kbit_training

            tape.phase(phases.PREPARE)
            with self._recorder, self._recorder.labelled("weights"):
                prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
            tape.empty_cache()
        if request.lora_r:
            tape.phase(phases.ATTACH)
            model = attach_lora(model, request.lora_r, self._recorder)
        self._parts = anatomy(model)
        if request.lora_r:
            prepare_training(self._parts, request, self._recorder)
            follow_gradients(self._parts, self._recorder)
        self._beginning = tape

    def run(self, request: Request, *, inference: bool = True) -> Tape:
        """Run the real model code without data and return what it did to device memory, loading included.

        Args:
            request: What to run.
            inference: Whether to make the inference pass before the training step.
        """
        tape = self._beginning.fork()
        self._recorder.continue_on(tape, self._beginning.allocations)
        if inference:
            with self._recorder, _autocast(request):
                _infer(self._parts, request, self.source, self._recorder)
        if request.lora_r:
            _train(self._parts, request, self.source, self._recorder)
        tape.close()
        return tape


def _autocast(request: Request) -> Any:
    if not request.trains_under_autocast:
        return nullcontext()
    return torch.autocast("cpu", dtype=getattr(torch, request.compute_dtype))


def make_batch(parts: Parts, request: Request, source: Source, recorder: Recorder) -> dict[str, Any]:
    """Model inputs of ``request``: token ids, masks and grids with values, pixels without.

    ``input_ids``, ``attention_mask``, ``mm_token_type_ids``: (batch, sequence) int64; ``pixel_values``:
    (patches of all pictures, values per patch); ``image_grid_thw``: (pictures, 3) int64.
    """
    config, vision = source.config, source.config.vision_config
    grid = source.sizes.grid(*request.image)
    patches = grid[0] * grid[1] * grid[2]
    visual = patches // parts.merge_size**2
    text = request.tokens - 2 * request.images
    ids = [0] * (text - text // 2)
    for _ in range(request.images):
        ids += [config.vision_start_token_id, *[parts.image_token_id] * visual, config.vision_end_token_id]
    ids += [0] * (text // 2)
    pictures = request.images * request.batch
    channels = getattr(vision, "in_channels", 3)
    values = channels * vision.temporal_patch_size * vision.patch_size**2
    with recorder.labelled("inputs"):
        input_ids = torch.tensor([ids] * request.batch)
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "mm_token_type_ids": (input_ids == parts.image_token_id).long(),
            "pixel_values": recorder.ghost((pictures * patches, values), getattr(torch, request.pixel_dtype)),
            "image_grid_thw": torch.tensor([grid] * pictures),
        }


def _infer(parts: Parts, request: Request, source: Source, recorder: Recorder) -> None:
    tape = recorder.tape
    model: Any = parts.wrapped
    model.eval()
    tape.empty_cache()
    tape.phase(phases.VISION)
    batch = _known(parts, make_batch(parts, request, source, recorder))
    cache = _followed_cache(source, recorder)

    def leave_vision(*_: Any) -> None:
        tape.phase(phases.PREFILL)

    def enter_forward(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[1] == 1:
            tape.phase(phases.DECODE)

    hooks = [
        parts.vision_tower.register_forward_hook(leave_vision),
        parts.base.register_forward_pre_hook(enter_forward, with_kwargs=True),
    ]
    try:
        with torch.no_grad():
            if request.generate:
                model.generate(
                    **batch,
                    past_key_values=cache,
                    max_new_tokens=request.generate,
                    min_new_tokens=request.generate,
                    do_sample=False,
                )
            else:
                keep = {} if request.all_logits else {"logits_to_keep": 1}
                model(**batch, past_key_values=cache, **keep)
    finally:
        for hook in hooks:
            hook.remove()
    parts.core.rope_deltas = None


def _followed_cache(source: Source, recorder: Recorder) -> Any:
    """A ``DynamicCache`` whose keys and values count as ``"cache"`` from the moment they are in it."""
    from transformers import DynamicCache

    class FollowedCache(DynamicCache):  # type: ignore[misc]
        def update(self, *args: Any, **kwargs: Any) -> Any:
            states = super().update(*args, **kwargs)
            for state in states:
                recorder.relabel(state, "cache")
            return states

    return FollowedCache(config=source.config.get_text_config())


def _train(parts: Parts, request: Request, source: Source, recorder: Recorder) -> None:
    tape = recorder.tape
    parts.wrapped.train()
    adapters = list(adapter_parameters(parts).values())
    with recorder:
        batch = _known(parts, make_batch(parts, request, source, recorder))
        batch["labels"] = batch["input_ids"].clone()
        with recorder.labelled("optimizer"):
            optimizer = make_optimizer(request.optimizer, adapters, recorder)
        tape.phase(phases.STATES)
        _first_update(adapters, optimizer, recorder)
        # As a measurement begins: without garbage, from an empty cache.
        gc.collect()
        tape.empty_cache()
        with _training_phases(parts, tape):
            with _autocast(request):
                loss = parts.wrapped(**batch).loss
            tape.phase(phases.BACKWARD)
            (loss * LOSS_SCALE if request.compute_dtype == "float16" else loss).backward()
            del loss
            tape.phase(phases.OPTIMIZER)
            with recorder.labelled("optimizer"):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def _first_update(adapters: list[Any], optimizer: Any, recorder: Recorder) -> None:
    """What the first step leaves behind: optimizer states and library workspaces.

    The step that is forecast is the second one, which repeats for the rest of training.
    """
    recorder.keep_workspaces()
    for parameter in adapters:
        parameter.grad = recorder.ghost(tuple(parameter.shape), parameter.dtype)
    with recorder.labelled("optimizer"):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@contextmanager
def _training_phases(parts: Parts, tape: Tape) -> Iterator[None]:
    def enters(name: str) -> Any:
        return lambda *_: tape.phase(name)

    hooks = [
        parts.vision_tower.register_forward_hook(enters(phases.FORWARD)),
        parts.lm_head.register_forward_pre_hook(enters(phases.LOSS)),
    ]
    tape.phase(phases.TRAIN_VISION)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def prepare_training(parts: Parts, request: Request, recorder: Recorder) -> None:
    """Set up checkpointing and the hooks that make inputs require gradients, as ``request`` wants them."""
    if request.gradient_checkpointing:
        # Transformers 5.23 renamed it and warns of the old name.
        enable = getattr(parts.base, "activation_checkpointing_enable", parts.base.gradient_checkpointing_enable)
        enable({"use_reentrant": False, "context_fn": recorder.for_recomputation})
    if request.gradient_checkpointing or request.vision_hook:
        parts.base.enable_input_require_grads()
    if not request.vision_hook:
        remove_vision_grad_hooks(parts.patch_embed)


def _known(parts: Parts, batch: dict[str, Any]) -> dict[str, Any]:
    """``batch`` without what this Transformers does not know (4.x has no ``mm_token_type_ids``)."""
    import inspect

    known = inspect.signature(type(parts.base).forward).parameters
    return {key: value for key, value in batch.items() if key in known}
