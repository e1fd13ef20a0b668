"""One case run by the real ``transformers.Trainer`` or TRL's ``SFTTrainer``, its peaks read from torch's allocator."""

from __future__ import annotations

import inspect
import os
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from pytest_qvl.models.adapters import LANGUAGE_ONLY
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.backends.transformers import remove_vision_grad_hooks
from pytest_qvl.models.layers import language_layers
from pytest_qvl.vram.forecast import phases
from pytest_qvl.vram.forecast.engine.build import asked_lora
from pytest_qvl.vram.forecast.engine.linear_attention import installed
from pytest_qvl.vram.forecast.engine.workload import is_reentrant, model_inputs, with_labels
from pytest_qvl.vram.forecast.validation.measured import FIRST_STEPS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.vram.forecast.request import Request
    from pytest_qvl.vram.forecast.source import Source


class Peaks:
    """Peak allocated and reserved bytes, phase by phase; nothing without CUDA.

    Attributes:
        by_phase: ``(allocated, reserved)`` of each phase: the most of all steps.
    """

    def __init__(self) -> None:
        self.by_phase: dict[str, tuple[int, int]] = {}
        self._open: str | None = None

    def enter(self, name: str | None) -> None:
        """End the open phase and begin another, or none."""
        if not torch.cuda.is_available():
            return
        if self._open is not None:
            found = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            before = self.by_phase.get(self._open, (0, 0))
            self.by_phase[self._open] = max(found[0], before[0]), max(found[1], before[1])
        torch.cuda.reset_peak_memory_stats()
        self._open = name


@dataclass
class Trained:
    """What a run showed.

    Attributes:
        peaks: By phase.
        updates: Optimizer steps after which the optimizer had states.
        losses: As the trainer logged them.
        vision_backward: Whether the vision tower's output required gradients.
        adapter_dtypes: Of what was trained.
        ddp: By what the processes of ``DistributedDataParallel`` spoke, and how many there were; empty without it.
    """

    peaks: Peaks = field(default_factory=Peaks)
    updates: int = 0
    losses: list[float] = field(default_factory=list)
    vision_backward: bool = False
    ddp: str = ""
    adapter_dtypes: set[str] = field(default_factory=set)


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Reads the peaks at the borders that a trainer calls back at, and ends the training after enough updates."""

    def __init__(self, request: Request, parts: Parts, steps: int, trained: Trained) -> None:
        self._request, self._parts, self._steps, self._trained = request, parts, steps, trained

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if self._request.vision_hook is False:
            remove_vision_grad_hooks(self._parts.patch_embed)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._trained.peaks.enter(phases.OPTIMIZER)

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._trained.peaks.enter(phases.TRAIN_VISION)

    def on_step_end(self, _: Any, __: Any, control: Any, optimizer: Any = None, **___: Any) -> None:
        self._trained.updates += bool(optimizer.state)
        control.should_training_stop = self._trained.updates >= self._steps

    def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
        self._trained.losses += [logs["loss"]] if logs and "loss" in logs else []


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """As many rows as a training needs; what stands in them the collator knows."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"images": index}


class OnHost:
    """Where a collator makes its tensors (see :func:`~pytest_qvl.vram.forecast.engine.workload.model_inputs`)."""

    @contextmanager
    def labelled(self, kind: str) -> Iterator[None]:  # noqa: ARG002 - a host knows no kinds
        """No label."""
        yield

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as it is."""
        return tensor

    def pixels(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Zeros: what an image shows does not change its memory."""
        return torch.zeros(shape, dtype=dtype)


def train_with_trainer(
    base: Any, request: Request, source: Source, device: str, steps: int = 3, *, ddp_backend: str | None = None
) -> Trained:
    """Attach the adapter, train for ``steps`` updates, and take everything off again.

    Args:
        base: The quantized model without adapter; it is left as it was, but by Unsloth.
        request: What to run; ``trainer`` is ``"hf"``, ``"trl"`` or ``"unsloth"``.
        source: The model's configuration.
        device: ``"cuda"`` or ``"cpu"``; peaks are read on CUDA only.
        steps: Updates with optimizer states; a float16 loss scale that is too large leaves out earlier ones.
        ddp_backend: By what the processes of DDP speak; ``None`` for what the trainers take (NCCL on CUDA).

    Raises:
        RuntimeError: The request is for DDP and the trainer trained without, or linear attention is computed by
            something else than it says.
        torch.OutOfMemoryError: It does not fit.
        ImportError: TRL or datasets are not installed and the request wants them.
    """
    _check_kernels(base, request)
    with tempfile.TemporaryDirectory(prefix="qvl-trainer-") as folder:
        checkpoint = None
        if request.resume:
            first = replace(request, resume=False, load_best=False)
            _train(base, first, source, device, 1, folder=folder, saves=True, ddp_backend=ddp_backend)
            checkpoint = get_last_checkpoint(folder)
        if request.linear_attention != "torch":
            # Triton tries its kernels out when they are first called, with memory that is not forecast.
            _train(base, request, source, device, 1, folder=folder)
        return _train(
            base, request, source, device, steps, folder=folder, checkpoint=checkpoint, ddp_backend=ddp_backend
        )


def _check_kernels(base: Any, request: Request) -> None:
    parts = anatomy(base)
    if any(not layer.attends for layer in language_layers(parts)) and installed(parts) != request.linear_attention:
        raise RuntimeError(
            f"linear attention is computed by {installed(parts)!r} here, and predicted was {request.linear_attention!r}"
        )


def _train(
    base: Any,
    request: Request,
    source: Source,
    device: str,
    steps: int,
    *,
    folder: str,
    saves: bool = False,
    checkpoint: str | None = None,
    ddp_backend: str | None = None,
) -> Trained:
    """One training, saved after every update or going on from a checkpoint that another has saved in ``folder``."""
    from peft import get_peft_model

    trained = Trained()
    with _as_it_was(base):
        config = asked_lora(anatomy(base), request)
        by_unsloth = request.trainer == "unsloth"
        model = _unsloth_peft_model(base, config, request) if by_unsloth else get_peft_model(base, config)
        parts = anatomy(model)
        if request.gradient_checkpointing and is_reentrant(request) and not by_unsloth:
            parts.base.enable_input_require_grads()  # Transformers 5 does it by itself, 4 trains nothing without
        hooks = _follow(parts, trained)
        watch = _Watch(request, parts, steps, trained)
        arguments = _arguments(request, folder, device, steps, saves=saves) | _several_processes(request, ddp_backend)
        trainer = None
        try:
            make = _hf_trainer if request.trainer == "hf" else _sft_trainer
            trainer = make(model, request, source, arguments, watch)
            trainer.remove_callback(PrinterCallback)
            trained.peaks.enter(phases.TRAIN_VISION)
            trainer.train(resume_from_checkpoint=checkpoint)
            trained.peaks.enter(None)
            trained.adapter_dtypes = {str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}
            if request.ddp:
                trained.ddp = _said_by_ddp(trainer.model_wrapped)
        finally:
            for hook in hooks:
                hook.remove()
            if trainer is not None:
                _forget(trainer)
            if not by_unsloth:
                model.unload()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return trained


def _several_processes(request: Request, backend: str | None) -> dict[str, Any]:
    """What a trainer is told where it is one of several."""
    # Seconds: a process that has failed must not keep the others waiting for half an hour.
    return {"ddp_backend": backend, "ddp_timeout": 300} if request.ddp else {}


def _said_by_ddp(wrapped: Any) -> str:
    """How many processes trained together, and by what they spoke."""
    if not isinstance(wrapped, torch.nn.parallel.DistributedDataParallel):
        # As accelerate's `multi_device`, which is false of one process of one.
        raise RuntimeError(f"the trainer trained a {type(wrapped).__name__}, not in DistributedDataParallel")
    return f"{torch.distributed.get_backend()}, {torch.distributed.get_world_size()} processes"


def unsloth_base(request: Request, device: str) -> Any:
    """The model as ``FastVisionModel.from_pretrained`` loads it from a folder in NF4 with random weights.

    Unsloth has been imported before everything that it patches.

    Raises:
        ModelLoadError: It could not be loaded.
        RuntimeError: The model is not of Unsloth's class.
    """
    from pytest_qvl.models.backends import LoadRequest
    from pytest_qvl.models.quantized import usual_quantization
    from pytest_qvl.models.sources.model_source import parse_model

    quantization = usual_quantization(getattr(torch, request.compute_dtype))
    source = parse_model(f"synthetic:{request.model}")
    model = _unsloth(request).load(LoadRequest(source, quantization, device, request.compute_dtype))
    check_rewritten(type(model))
    return model


def check_rewritten(model_class: type[torch.nn.Module]) -> None:
    """See that a model's class is the one that Unsloth has written, with its loss.

    Raises:
        RuntimeError: It is Transformers' own.
    """
    file = inspect.getsourcefile(inspect.unwrap(model_class.forward))
    if not Path(str(file)).name.startswith("unsloth_compiled_module_"):
        raise RuntimeError(
            f"Unsloth would train Transformers' own {model_class.__name__}, which has all logits: an AutoModel looked "
            "that class up before Unsloth had rewritten it"
        )


def _unsloth(request: Request) -> Any:
    from pytest_qvl.models.backends.unsloth import UnslothBackend

    backend = UnslothBackend()
    backend.checkpointing = "unsloth" if request.gradient_checkpointing else False
    return backend


def _unsloth_peft_model(base: Any, config: Any, request: Request) -> Any:
    """The adapter by ``FastVisionModel.get_peft_model``, whose hooks stay, as in a user's script."""
    fast: Any = import_module("unsloth").FastVisionModel
    return fast.get_peft_model(base, **unsloth_flags(config, request))


def unsloth_flags(config: Any, request: Request) -> dict[str, Any]:
    """Arguments of ``get_peft_model`` for an adapter.

    Of a list it compares the last part of each module's name alone, so that whole names choose nothing: every language
    linear is what its own flags choose.
    """
    if request.lora_targets == "language":
        config = replace(config, target_modules=LANGUAGE_ONLY)
    flags: dict[str, Any] = _unsloth(request).flags(config)
    return flags


def _follow(parts: Parts, trained: Trained) -> list[Any]:
    """Hooks that begin the phases of a step."""

    def leave_vision(_: Any, __: Any, output: Any) -> None:
        found = output if isinstance(output, torch.Tensor) else next(iter(_tensors(output)), None)
        trained.vision_backward |= found is not None and found.requires_grad
        trained.peaks.enter(phases.FORWARD)

    return [
        parts.wrapped.register_forward_pre_hook(lambda *_: trained.peaks.enter(phases.TRAIN_VISION)),
        parts.vision_tower.register_forward_hook(leave_vision),
        parts.lm_head.register_forward_pre_hook(lambda *_: trained.peaks.enter(phases.LOSS)),
        parts.wrapped.register_forward_hook(lambda *_: trained.peaks.enter(phases.BACKWARD)),
    ]


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    values = output.values() if hasattr(output, "values") else output
    return (value for value in values if isinstance(value, torch.Tensor))


def checkpointing_argument() -> str:
    """What ``TrainingArguments`` calls gradient checkpointing: since Transformers 5.23 ``activation_checkpointing``."""
    known = {field.name for field in fields(TrainingArguments)}
    return next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in known)


def _arguments(request: Request, folder: str, device: str, steps: int, *, saves: bool) -> dict[str, Any]:
    """Arguments as people write them."""
    dtype = request.autocast_dtype
    steps += FIRST_STEPS if request.resume else 0  # those of the training before count too
    checkpointing = checkpointing_argument()
    evaluates: dict[str, Any] = {}
    if request.evaluation:
        evaluates = {
            "eval_strategy": "steps",
            "eval_steps": 1,
            "per_device_eval_batch_size": request.evaluation,
            "eval_accumulation_steps": request.eval_accumulation_steps or None,
            "eval_do_concat_batches": request.eval_do_concat_batches,
            "batch_eval_metrics": request.batch_eval_metrics,
            "prediction_loss_only": request.prediction_loss_only,
        }
    return {
        "output_dir": folder,
        "per_device_train_batch_size": len(request.batch_of_samples),
        "gradient_accumulation_steps": request.accumulation,
        "max_steps": steps if dtype != "float16" else steps + FIRST_STEPS,
        "learning_rate": 1e-4,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "optim": request.optimizer,
        "use_liger_kernel": request.liger,
        checkpointing: request.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": is_reentrant(request)},
        "logging_steps": 1,
        **({"save_strategy": "steps", "save_steps": 1} if saves or request.load_best else {"save_strategy": "no"}),
        "load_best_model_at_end": request.load_best,
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cpu": device == "cpu",
        **evaluates,
    }


def _metrics(request: Request) -> dict[str, Any]:
    """What a user gives for metrics; they get nothing."""
    found: dict[str, Any] = {}
    if request.compute_metrics:
        found["compute_metrics"] = lambda _, compute_result=True: {"none": float(compute_result)}
    if request.preprocess_logits == "argmax":
        found["preprocess_logits_for_metrics"] = lambda logits, _: (
            logits[0] if isinstance(logits, tuple) else logits
        ).argmax(dim=-1)
    return found


def _collator(model: Any, request: Request, source: Source) -> Any:
    parts = anatomy(model)

    def collate(rows: Any) -> dict[str, Any]:
        return with_labels(model_inputs(parts, request.of_batch(len(rows)), source, OnHost()), request)  # type: ignore[arg-type]

    return collate


def _rows(arguments: dict[str, Any]) -> int:
    per_update = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
    return int(per_update * arguments["max_steps"]) * int(os.environ.get("WORLD_SIZE", "1"))


def _hf_trainer(model: Any, request: Request, source: Source, arguments: dict[str, Any], watch: Any) -> Any:
    from transformers import Trainer

    return Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=Rows(_rows(arguments)),
        eval_dataset=Rows(request.evaluation * request.evaluation_batches) if request.evaluation else None,
        **_metrics(request),
        data_collator=_collator(model, request, source),
        callbacks=[watch],
    )


def _sft_trainer(model: Any, request: Request, source: Source, arguments: dict[str, Any], watch: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    def rows(count: int) -> Any:
        return Dataset.from_dict({"images": list(range(count))})

    return SFTTrainer(
        model=model,
        args=SFTConfig(**arguments, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=rows(_rows(arguments)),
        eval_dataset=rows(request.evaluation * request.evaluation_batches) if request.evaluation else None,
        **_metrics(request),
        data_collator=_collator(model, request, source),
        processing_class=_processor(request.model),
        callbacks=[watch],
    )


def _processor(model: str) -> Any:
    """The processor that TRL wants to have; the collator needs none."""
    from pytest_qvl.models.sources.processors import load_processor
    from pytest_qvl.models.sources.released import released_names
    from pytest_qvl.models.sources.synthetic_processor import synthetic_processor

    return synthetic_processor(model) if model in released_names() else load_processor(model)


def _forget(trainer: Any) -> None:
    """Let go of what a trainer, its accelerator and its optimizer's library hold."""
    from bitsandbytes.optim import GlobalOptimManager

    trainer.accelerator.free_memory()
    vars(trainer).clear()
    # Where the optimizer has 8 bits, ``Trainer.create_optimizer`` gives it every embedding, and it keeps them.
    GlobalOptimManager.get_instance().initialize()


# Of a module: what it is made of. PEFT may change it for good (OLoRA), and what was there before must not be held.
_MADE_OF = {"_modules", "_parameters", "_buffers", "quant_state"}


def _of_trainers(module: torch.nn.Module) -> dict[str, Any]:
    """What a trainer may patch of a module."""
    return {name: value for name, value in vars(module).items() if name not in _MADE_OF}


@contextmanager
def _as_it_was(base: Any) -> Iterator[None]:
    """Take off afterwards what trainers leave on the model: patched forwards, hooks, checkpointing, training mode."""
    patched = {id(module): _of_trainers(module) for module in base.modules()}
    hooks = {id(module): set(module._forward_hooks) for module in base.modules()}
    try:
        yield
    finally:
        for module in base.modules():
            if id(module) not in patched:
                continue
            before = patched[id(module)]
            for name in _of_trainers(module).keys() - before.keys():
                delattr(module, name)
            for name, value in before.items():
                if vars(module).get(name) is not value:
                    vars(module)[name] = value
            for key in set(module._forward_hooks) - hooks[id(module)]:
                del module._forward_hooks[key]
        for parameter in base.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        base.eval()
