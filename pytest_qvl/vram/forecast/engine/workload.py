"""The run that is forecast and measured: an inference pass, then training steps, on whatever stage.

One workload, two stages. On the stage of :mod:`.dry_run` tensors have no data and memory is noted on a trace; on that
of :mod:`pytest_qvl.vram.forecast.validation.measured` they are real and the meter reads a GPU. What is forecast and
what is measured is the same run because it is the same code.
"""

from __future__ import annotations

import gc
import inspect
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch

from pytest_qvl.models.adapters import adapter_parameters
from pytest_qvl.models.backends.transformers import remove_vision_grad_hooks
from pytest_qvl.models.renamed import enable_checkpointing
from pytest_qvl.vram.forecast import phases

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.vram.forecast.engine.trace import Kind
    from pytest_qvl.vram.forecast.request import Optimizer, Request
    from pytest_qvl.vram.forecast.source import Source


class Stage(Protocol):
    """Where the workload runs.

    Attributes:
        autocast_device: The device type that autocast knows this stage's tensors by.
    """

    autocast_device: str

    def labelled(self, kind: Kind) -> AbstractContextManager[None]:
        """What is allocated inside counts as ``kind``, where kinds are counted."""

    def phase(self, name: str) -> None:
        """Everything from here on belongs to phase ``name``."""

    def empty_cache(self) -> None:
        """Give cached memory back; library workspaces stay, as they do in a real training."""

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """Token ids, a mask or a grid, on the device."""

    def pixels(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Images of that shape on the device."""

    def generation_arguments(self, parts: Parts, source: Source) -> dict[str, Any]:
        """What this stage adds to the arguments of ``generate``."""

    def checkpoint_arguments(self) -> dict[str, Any]:
        """What this stage adds to the arguments of ``torch.utils.checkpoint``."""

    def optimizer(self, name: Optimizer, parameters: list[Any]) -> Any:
        """The optimizer called ``name`` in Transformers' ``TrainingArguments``, over ``parameters``."""

    def first_step(self, step: Callable[[], None], parameters: list[Any], optimizer: Any) -> None:
        """Leave behind what the first training step leaves: optimizer states and library workspaces."""

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the loss scale."""

    def update(self, optimizer: Any) -> None:
        """Take the gradients' scale away and update the parameters."""


def prepare_training(parts: Parts, request: Request, stage: Stage) -> None:
    """Set up checkpointing and the hooks that make inputs require gradients, as ``request`` wants them."""
    if request.gradient_checkpointing:
        enable_checkpointing(parts.base, {"use_reentrant": False, **stage.checkpoint_arguments()})
    if request.gradient_checkpointing or request.keeps_vision_hook:
        parts.base.enable_input_require_grads()
    if not request.keeps_vision_hook:
        remove_vision_grad_hooks(parts.patch_embed)


def infer(parts: Parts, request: Request, source: Source, stage: Stage) -> None:
    """Prefill, and decode if new tokens are asked for."""
    model: Any = parts.wrapped
    model.eval()
    stage.empty_cache()
    stage.phase(phases.VISION)
    batch = model_inputs(parts, request, source, stage)

    def leave_vision(*_: Any) -> None:
        stage.phase(phases.PREFILL)

    def enter_forward(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[1] == 1:
            stage.phase(phases.DECODE)

    hooks = [
        parts.vision_tower.register_forward_hook(leave_vision),
        parts.base.register_forward_pre_hook(enter_forward, with_kwargs=True),
    ]
    own = stage.generation_arguments(parts, source)
    try:
        with torch.no_grad(), autocast(request, stage):
            if request.generate:
                model.generate(
                    **batch,
                    **own,
                    max_new_tokens=request.generate,
                    min_new_tokens=request.generate,
                    do_sample=False,
                )
            else:
                keep = {} if request.all_logits else {"logits_to_keep": 1}
                model(**batch, **own, **keep)
    finally:
        for hook in hooks:
            hook.remove()
    parts.core.rope_deltas = None


def train(parts: Parts, request: Request, source: Source, stage: Stage) -> None:
    """A first training step for what it leaves behind, and the one that repeats, phase by phase."""
    parts.wrapped.train()
    adapters = list(adapter_parameters(parts).values())
    batch = model_inputs(parts, request, source, stage)
    batch["labels"] = batch["input_ids"].clone()
    with stage.labelled("optimizer"):
        optimizer = stage.optimizer(request.optimizer, adapters)

    def step(enter: Callable[[str], None]) -> None:
        with autocast(request, stage):
            loss = parts.wrapped(**batch).loss
        enter(phases.BACKWARD)
        stage.scaled(loss).backward()  # type: ignore[no-untyped-call]
        del loss
        enter(phases.OPTIMIZER)
        with stage.labelled("optimizer"):
            stage.update(optimizer)
        optimizer.zero_grad(set_to_none=True)

    stage.phase(phases.STATES)
    stage.first_step(lambda: step(lambda _: None), adapters, optimizer)
    # As a measurement begins: without garbage, from an empty cache.
    gc.collect()
    stage.empty_cache()
    with _forward_phases(parts, stage):
        step(stage.phase)


@contextmanager
def _forward_phases(parts: Parts, stage: Stage) -> Iterator[None]:
    def enters(name: str) -> Any:
        return lambda *_: stage.phase(name)

    hooks = [
        parts.vision_tower.register_forward_hook(enters(phases.FORWARD)),
        parts.lm_head.register_forward_pre_hook(enters(phases.LOSS)),
    ]
    stage.phase(phases.TRAIN_VISION)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def autocast(request: Request, stage: Stage) -> Any:
    """The autocast that ``request`` trains under, if any."""
    if request.autocast_dtype is None:
        return nullcontext()
    return torch.autocast(stage.autocast_device, dtype=getattr(torch, request.autocast_dtype))


def model_inputs(parts: Parts, request: Request, source: Source, stage: Stage) -> dict[str, Any]:
    """Model inputs of ``request``: token ids, masks and grids, and images.

    ``input_ids``, ``attention_mask``, ``mm_token_type_ids``: (batch, sequence) int64; ``pixel_values``:
    (patches of all images, values per patch); ``image_grid_thw``: (images, 3) int64. Without what this Transformers
    does not know (4.x has no ``mm_token_type_ids``).
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
    images = request.images * request.batch
    values = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
    with stage.labelled("inputs"):
        input_ids = stage.place(torch.tensor([ids] * request.batch))
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "mm_token_type_ids": (input_ids == parts.image_token_id).long(),
            "pixel_values": stage.pixels((images * patches, values), getattr(torch, request.pixel_dtype)),
            "image_grid_thw": stage.place(torch.tensor([grid] * images)),
        }
    known = inspect.signature(type(parts.base).forward).parameters
    return {name: tensor for name, tensor in inputs.items() if name in known}
