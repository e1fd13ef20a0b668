"""What every check does with its arguments before it looks at them, and with a model that crashes under it.

Users hand over what they train with: a model inside ``DistributedDataParallel`` or ``torch.compile``, a batch with
strings in it, still on the CPU. And a broken set-up often does not give wrong numbers but an exception from deep
inside, which is a finding like any other.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from pytest_qvl.evidence import CannotJudge, CheckFailed, Judge, ModelCrashed, judging, noted

if TYPE_CHECKING:
    from pytest_qvl.models.anatomy import Parts

P = ParamSpec("P")
R = TypeVar("R")

PACKAGE = Path(__file__).parents[1].resolve()
# The attribute in which each wrapper of torch and DeepSpeed keeps the model that was wrapped.
WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
SHARDED = ("FullyShardedDataParallel", "DeepSpeedEngine")
# The arguments of checks that hold model inputs, one batch or several.
BATCHES = frozenset({"batch", "batches", "training_batch"})
# Verdicts of their own, told by whoever holds the GPU; and what a warning filter made of a warning is no crash.
_NOT_OURS: tuple[type[Exception], ...] = (CheckFailed, CannotJudge, MemoryError, Warning)
_GPU_ERRORS = ("OutOfMemoryError", "AcceleratorError")
_GPU_WORDS = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS")


def check(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function one of the public checks.

    - ``model``: taken out of ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``, which the evidence
      notes.
    - Every batch (a ``BatchFeature``, any other mapping, or a sequence of them) becomes a ``dict`` on the model's
      device, without values that no model takes (strings, images), which the evidence notes.
    - A batch of videos is not judged, since the checks know images only.
    - An exception out of the model, its processor or the optimizer becomes :class:`ModelCrashed`, which names the
      module that raised it. Errors of the check itself (``ValueError`` for its arguments), of GPU memory and of CUDA
      stay as they are.
    """
    first_line = (inspect.getdoc(function) or function.__name__).splitlines()[0]
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        with judging() as judges, noted() as notes:
            arguments = _prepared(signature.bind(*args, **kwargs), notes)
            try:
                return function(*arguments.args, **arguments.kwargs)
            except _NOT_OURS:
                raise
            except Exception as error:
                sentence = _crash(error, arguments.arguments.get("model"))
                if not sentence:
                    raise
                judge = judges[-1] if judges else Judge(function.__name__, first_line)
                judge.problem(sentence)
                raise ModelCrashed(judge.close()) from error

    return checked


def unwrapped(model: Any) -> Any:
    """The model inside the wrappers of torch's data parallelism and of ``torch.compile``, or the model itself.

    Raises:
        CannotJudge: Its parameters are sharded over several processes.
    """
    inner = model
    while (kind := type(inner).__name__) in (*WRAPPERS, *SHARDED):
        if kind in SHARDED:
            raise CannotJudge(
                f"the model is wrapped in {kind}, which may keep only a part of each parameter in this process: "
                "hand over the model before it is wrapped"
            )
        inner = getattr(inner, WRAPPERS[kind])
    return inner


def _prepared(arguments: inspect.BoundArguments, notes: list[str]) -> inspect.BoundArguments:
    given = arguments.arguments
    if "model" in given:
        inner = unwrapped(given["model"])
        if inner is not given["model"]:
            notes.append(f"judged is the model inside {type(given['model']).__name__}, run as it was written")
            given["model"] = inner
    for name in BATCHES.intersection(given):
        value = given[name]
        if isinstance(value, list | tuple):
            given[name] = [_batch(given.get("model"), each, notes) for each in value]
        else:
            given[name] = _batch(given.get("model"), value, notes)
    if "model" in given and given.get("processor") is not None:
        from pytest_qvl.checks.vocabulary import refuse_ids_beyond
        from pytest_qvl.models.anatomy import anatomy

        refuse_ids_beyond(anatomy(given["model"]), processor=given["processor"])
    return arguments


def _batch(model: Any, batch: Any, notes: list[str]) -> dict[str, Any]:
    import torch

    from pytest_qvl.checks.vocabulary import refuse_ids_beyond
    from pytest_qvl.models.anatomy import anatomy

    if not hasattr(batch, "keys"):
        raise ValueError(f"a batch is a mapping from names to tensors, got {type(batch).__name__}")
    values: dict[str, Any] = {name: batch[name] for name in batch.keys()}  # noqa: SIM118
    foreign = sorted(name for name, value in values.items() if not _is_model_input(value))
    if foreign:
        sentence = f"left out of the batch, since no model takes them: {', '.join(foreign)}"
        notes.extend([sentence] if sentence not in notes else [])
    values = {name: value for name, value in values.items() if name not in foreign}
    if model is None:
        return values
    parts = anatomy(model)
    ids = values.get("input_ids")
    if values.get("pixel_values_videos") is not None or (
        isinstance(ids, torch.Tensor) and bool((ids == parts.video_token_id).any())
    ):
        raise CannotJudge("not judged: video (the batch holds a video; the checks know images only)")
    refuse_ids_beyond(parts, batch=values)
    return {
        name: value.to(parts.device) if isinstance(value, torch.Tensor) else value for name, value in values.items()
    }


def _is_model_input(value: Any) -> bool:
    import torch

    return value is None or isinstance(value, torch.Tensor | bool | int | float)


def _crash(error: Exception, model: Any) -> str:
    """One sentence for an exception out of foreign code; empty if it is the check's own."""
    text = str(error).strip()
    if type(error).__name__ in _GPU_ERRORS or any(word in text for word in _GPU_WORDS):
        return ""
    frames = _frames(error)
    if not frames or _is_own(frames[-1]):
        return ""
    shown = text.splitlines()[0] if text else "without a message"
    return f"{_raiser(frames, model)} raised {type(error).__name__}: {shown}"


def _frames(error: Exception) -> list[FrameType]:
    frames, traceback = [], error.__traceback__
    while traceback is not None:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    return frames


def _is_own(frame: FrameType) -> bool:
    return Path(frame.f_code.co_filename).resolve().is_relative_to(PACKAGE)


def _raiser(frames: list[FrameType], model: Any) -> str:
    """Who raised: the innermost module of the model, the optimizer, autograd, or the function called."""
    import torch

    ours = max(number for number, frame in enumerate(frames) if _is_own(frame))
    foreign = frames[ours + 1 :]
    names = _names(model)
    for frame in reversed(foreign):
        owner = frame.f_locals.get("self")
        if id(owner) in names:
            return f"the model's {names[id(owner)]}" if names[id(owner)] else "the model"
        if isinstance(owner, torch.optim.Optimizer):
            return f"the optimizer ({type(owner).__name__})"
    if any("autograd" in Path(frame.f_code.co_filename).parts for frame in foreign):
        return "the backward pass"
    return f"{foreign[0].f_code.co_qualname}()"


def _names(model: Any) -> dict[int, str]:
    from pytest_qvl.models.anatomy import UnknownModelError, anatomy

    try:
        parts: Parts = anatomy(model)
    except UnknownModelError:
        return {}
    return {id(module): name for name, module in parts.base.named_modules()}
