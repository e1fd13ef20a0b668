"""The run that is forecast and measured: an inference pass, then training steps, on whatever stage.

One workload, two stages. On the stage of :mod:`.dry_run` tensors have no data and memory is noted on a trace; on that
of :mod:`pytest_qvl.vram.forecast.validation.measured` they are real and the meter reads a GPU. What is forecast and
what is measured is the same run because it is the same code.
"""

from __future__ import annotations

import gc
import inspect
import warnings
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import torch
import transformers

from pytest_qvl.models.backends.transformers import remove_vision_grad_hooks
from pytest_qvl.models.renamed import enable_checkpointing
from pytest_qvl.samples.batch import IGNORED
from pytest_qvl.vram.forecast import phases
from pytest_qvl.vram.forecast.engine import ddp
from pytest_qvl.vram.forecast.engine.evaluation import Evaluation
from pytest_qvl.vram.forecast.engine.resuming import load_best
from pytest_qvl.vram.forecast.engine.trainers import TRAINERS, Loop, Steps, autocast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.vram.forecast.engine.trace import Kind
    from pytest_qvl.vram.forecast.request import Optimizer, Request
    from pytest_qvl.vram.forecast.source import Source


# What a video's tokens are in ``mm_token_type_ids``.
_VIDEO = 2


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

    def recomputed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What a checkpoint is to run in place of ``function``."""

    def optimizer(self, name: Optimizer, parameters: list[Any]) -> Any:
        """The optimizer called ``name`` in Transformers' ``TrainingArguments``, over ``parameters``."""

    def resume(self, optimizer: Any, parameters: list[Any], *, ddp: bool) -> None:
        """Load the states of a checkpoint into an optimizer that has none."""

    def first_step(self, step: Callable[[], None], parameters: list[Any], optimizer: Any) -> None:
        """Leave behind what the first training step leaves: optimizer states and library workspaces."""

    def first_of_two(self, step: Callable[[], None]) -> None:
        """A trainer's first step, which leaves optimizer states and library workspaces."""

    def second_of_two(self, step: Callable[[], None]) -> None:
        """The step that repeats."""

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the loss scale."""

    def unscale(self, optimizer: Any) -> None:
        """Take the scale away from the gradients, where there is one."""

    def update(self, optimizer: Any) -> None:
        """Take the gradients' scale away, unless that was done, and update the parameters."""


def prepare_training(parts: Parts, request: Request, stage: Stage) -> None:
    """Set up checkpointing and the hooks that make inputs require gradients, as ``request`` wants them."""
    if request.gradient_checkpointing:
        enable_checkpointing(parts.base, {"use_reentrant": is_reentrant(request)})
        _recompute(parts.base, stage)
    if request.gradient_checkpointing or request.keeps_vision_hook:
        parts.base.enable_input_require_grads()
    if not request.keeps_vision_hook:
        remove_vision_grad_hooks(parts.patch_embed)


def is_reentrant(request: Request) -> bool:
    """Whether checkpointing is reentrant.

    Where nobody says, ``PreTrainedModel.gradient_checkpointing_enable`` of Transformers 4 asks for it.
    """
    if request.reentrant is None:
        return request.trainer == "unsloth" or (request.trainer == "hf" and transformers.__version__.startswith("4."))
    return request.reentrant


def _recompute(base: Any, stage: Stage) -> None:
    """Let the stage run what is checkpointed: a reentrant checkpoint takes no ``context_fn``."""
    for module in base.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is not None:
            module._gradient_checkpointing_func = partial(_checkpoint, checkpoint, stage)


def _checkpoint(checkpoint: Any, stage: Stage, function: Any, *args: Any) -> Any:
    with warnings.catch_warnings():
        # Of a reentrant one. True of a vision tower that is not back-propagated through, and so meant.
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        return checkpoint(stage.recomputed(function), *args)


def infer(parts: Parts, request: Request, source: Source, stage: Stage) -> None:
    """Prefill, and decode if new tokens are asked for."""
    model: Any = parts.wrapped
    model.eval()
    stage.empty_cache()
    stage.phase(phases.VISION)
    batch = model_inputs(parts, request, source, stage, pad_left=True)

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
        with torch.no_grad(), autocast(request.inference_dtype, stage):
            if request.generate:
                _generate(model, {**batch, **own}, request.generate)
            else:
                keep = {} if request.all_logits else {"logits_to_keep": 1}
                model(**batch, **own, **keep)
    finally:
        for hook in hooks:
            hook.remove()
    parts.core.rope_deltas = None


def _generate(model: Any, inputs: dict[str, Any], tokens: int) -> None:
    model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def train(parts: Parts, request: Request, source: Source, stage: Stage) -> None:
    """A first training step for what it leaves behind, and the one that repeats, phase by phase."""
    trainer = TRAINERS[request.trainer](parts, request, stage)
    parts.wrapped.train()

    def draw() -> dict[str, Any]:
        return with_labels(model_inputs(parts, request, source, stage), request)

    step = Steps(trainer, draw)
    trained = [p for p in parts.wrapped.parameters() if p.requires_grad]
    with stage.labelled("optimizer"):
        step.optimizer = optimizer = stage.optimizer(request.optimizer, trained)
    reduced: list[torch.Tensor] = []
    if request.ddp:
        ddp.synchronized(parts.wrapped)
        with stage.labelled("gradients"):
            reduced = ddp.buckets(trained, request.ddp_bucket_cap_mb)
    if request.resume:
        stage.phase(phases.RESUME)
        with stage.labelled("optimizer"):
            stage.resume(optimizer, trained, ddp=request.ddp)
    with trainer.prepared():
        if trainer.fetches_ahead:
            _two_steps(step, parts, stage)
        else:
            stage.phase(phases.STATES)
            stage.first_step(lambda: step.update(lambda _: None), trained, optimizer)
            # As a measurement begins: without garbage, from an empty cache.
            gc.collect()
            stage.empty_cache()
            with _forward_phases(parts, stage):
                step.update(stage.phase)
        parts.wrapped.eval()
        if request.evaluation:
            stage.phase(phases.EVALUATION)
            _evaluate(trainer, request.of_batch(request.evaluation), source)
    if request.generate_in_training:
        stage.phase(phases.GENERATION)
        prompt = model_inputs(parts, request.of_batch(request.evaluation or 1), source, stage, pad_left=True)
        with torch.no_grad():
            own = stage.generation_arguments(parts, source)
            _generate(parts.wrapped, {**prompt, **own}, request.generate_in_training)
        parts.core.rope_deltas = None
    if request.load_best:
        stage.phase(phases.LOAD_BEST)
        with stage.labelled("adapters"):
            load_best(parts.wrapped)
    del reduced  # until here, as under DDP


def with_labels(batch: dict[str, Any], request: Request) -> dict[str, Any]:
    """A batch whose every token is to be learnt, but padding."""
    batch["labels"] = labels = batch["input_ids"].clone()
    if not request.packed and (request.samples or request.pad_to_multiple_of > 1):
        labels[batch["attention_mask"] == 0] = IGNORED
    return batch


def _evaluate(trainer: Loop, request: Request, source: Source) -> None:
    """What ``Trainer.evaluate`` does, on batches of ``request``."""

    def draw() -> dict[str, Any]:
        return with_labels(model_inputs(trainer.parts, request, source, trainer.stage), request)

    trainer.enter = lambda _: None
    Evaluation(trainer, request, draw).run()


def _two_steps(step: Steps, parts: Parts, stage: Stage) -> None:
    """A trainer's first two steps: its cache is not emptied, and the first one's blocks are what the second finds."""

    def update() -> None:
        with _forward_phases(parts, stage):
            step.update(stage.phase)

    stage.phase(phases.FIRST)
    step.fetch()
    stage.first_of_two(update)
    stage.phase(phases.TRAIN_VISION)
    step.fetch()
    stage.second_of_two(update)


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


def model_inputs(
    parts: Parts, request: Request, source: Source, stage: Stage, *, pad_left: bool = False
) -> dict[str, Any]:
    """Model inputs of ``request``: token ids, masks and grids, and images.

    ``input_ids``, ``attention_mask``, ``mm_token_type_ids``: (batch, sequence) int64, shorter samples padded on the
    right or left; ``pixel_values``: (patches of all images, values per patch); ``image_grid_thw``: (images, 3) int64;
    the same of videos, and ``second_per_grid_ts``: (videos,) float32.
    Packed samples are one row without a mask, whose ``position_ids``, (4, 1, sequence) int64, begin anew with each:
    those of text in front, by which Transformers keeps samples apart. What the other three are moves no memory.
    Without what this Transformers does not know (4.x has no ``mm_token_type_ids``).
    """
    vision = source.config.vision_config
    samples = request.batch_of_samples
    grids = [source.grids(sample) for sample in samples]
    pictures = [len(sample.images) for sample in samples]
    texts = [source.lengths(sample, request.max_length)[1] for sample in samples]
    rows = [_token_ids(parts, source, *sample) for sample in zip(texts, grids, pictures, strict=True)]
    packed = [torch.arange(len(row)) for row in rows] if request.packed and not pad_left else []
    if packed:
        rows = [[token for row in rows for token in row]]
    longest = max(map(len, rows))
    if not pad_left:
        longest = -(-longest // request.pad_to_multiple_of) * request.pad_to_multiple_of
    images = [grid for own, count in zip(grids, pictures, strict=True) for grid in own[:count]]
    videos = [grid for own, count in zip(grids, pictures, strict=True) for grid in own[count:]]
    values = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
    with stage.labelled("inputs"):
        paddings = [[0] * (longest - len(row)) for row in rows]
        padded = [pad + row if pad_left else row + pad for row, pad in zip(rows, paddings, strict=True)]
        input_ids = stage.place(torch.tensor(padded))
        mask = torch.ones_like(input_ids)
        for row, own_mask in zip(rows, mask, strict=True):
            own_mask[slice(0, longest - len(row)) if pad_left else slice(len(row), None)] = 0
        inputs = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "mm_token_type_ids": (input_ids == parts.image_token_id).long(),
        }
        if packed:
            del inputs["attention_mask"], mask
            inputs["position_ids"] = stage.place(torch.cat(packed).expand(4, 1, -1).contiguous())
        if videos:
            inputs["mm_token_type_ids"][input_ids == parts.video_token_id] = _VIDEO
        for every, pixels, grid_thw in (
            (images, "pixel_values", "image_grid_thw"),
            (videos, "pixel_values_videos", "video_grid_thw"),
        ):
            if every:
                shape = (sum(prod(grid) for grid in every), values)
                inputs[pixels] = stage.pixels(shape, getattr(torch, request.pixel_dtype))
                inputs[grid_thw] = stage.place(torch.tensor(every))
        if videos:
            inputs["second_per_grid_ts"] = stage.place(torch.ones(len(videos)))
    known = inspect.signature(type(parts.base).forward).parameters
    found: dict[str, Any] = {name: tensor for name, tensor in inputs.items() if name in known}
    # Beside a KV cache, of which Trainer switches off no more than the outer configuration's, nothing is kept apart.
    return found | ({"use_cache": False} if packed else {})


def _token_ids(parts: Parts, source: Source, tokens: int, grids: list[tuple[int, int, int]], images: int) -> list[int]:
    """One sample: half of its text, its images and videos between their markers, and the other half.

    Where each step in time of a video stands behind its time, it has markers of its own between those of the video.
    """
    start, end = source.config.vision_start_token_id, source.config.vision_end_token_id
    times = [source.videos.times(grid[0]) if number >= images else [] for number, grid in enumerate(grids)]
    text = tokens - 2 * len(grids) - sum(map(sum, times))
    ids = [0] * (text - text // 2)
    for number, (grid, own) in enumerate(zip(grids, times, strict=True)):
        placeholder = parts.image_token_id if number < images else parts.video_token_id
        visual = prod(grid) // parts.merge_size**2
        if not own:
            ids += [start, *[placeholder] * visual, end]
            continue
        of_step = [start, *[placeholder] * (visual // len(own)), end]
        # The video's own markers as text: what looks for a video's beginning looks at what follows a marker.
        ids += [0, *(token for before in own for token in [*[0] * (before - 2), *of_step]), 0]
    return ids + [0] * (text // 2)
