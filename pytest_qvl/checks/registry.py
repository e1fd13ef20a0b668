"""``@check``: declares a function one of the public checks, and looks after its arguments and the model's exceptions.

What a check declares (its promise, what it needs) is read from the source by :mod:`pytest_qvl.checks.declared`. The
rest is the guard around it: users hand over what they train with, a model inside ``DistributedDataParallel`` or
``torch.compile``, a batch with strings in it, still on the CPU. And a broken setup often does not give wrong numbers
but an exception from deep inside, which is a finding like any other.
"""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from pytest_qvl.checks.declared import NEEDS
from pytest_qvl.checks.support.code_places import file_of, is_own
from pytest_qvl.evidence import (
    CannotJudge,
    CheckFailed,
    InputError,
    InputTypeError,
    Judge,
    ModelCrashed,
    judging,
    noted,
)

if TYPE_CHECKING:
    import torch

    from pytest_qvl.models.anatomy import Parts

P = ParamSpec("P")
R = TypeVar("R")

# The attribute in which each wrapper of torch keeps the model that was wrapped.
WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
# Those that may keep only a part of each parameter in this process: models inside are not judged.
SHARDED = ("FullyShardedDataParallel", "DeepSpeedEngine")
# The arguments of checks that hold model inputs, one batch or several.
BATCHES = frozenset({"batch", "batches", "training_batch"})
# Values of a batch that a model takes as tensors only; anything else that is no tensor is left out.
TENSORS = (
    "input_ids",
    "attention_mask",
    "labels",
    "mm_token_type_ids",
    "position_ids",
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
)
# Keys of grids, and of the pixels that they lay out.
GRIDS = {"image_grid_thw": "pixel_values", "video_grid_thw": "pixel_values_videos"}
BATCH_HELP = "make_batch(processor, samples) and the fixture qvl_batch(samples) return one"
# Verdicts of their own, told by whoever holds the GPU; and what a warning filter made of a warning is no crash.
_PASSED_ON: tuple[type[Exception], ...] = (CheckFailed, CannotJudge, InputError, MemoryError, Warning)
_GPU_ERRORS = ("OutOfMemoryError", "AcceleratorError")
_GPU_WORDS = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS")


def check(
    *,
    promise: int,  # noqa: ARG001 - read from the source, as all that is declared
    needs: tuple[str, ...] = (),
    guarded: bool = True,
    videos: bool = False,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function one of the public checks; the only place that says which promise it proves and what it needs.

    Everything that lists checks comes from this (:mod:`pytest_qvl.checks.declared`, which reads the arguments without
    importing the check: they are literals).

    Args:
        promise: Number of the promise, as :data:`pytest_qvl.promises.PROMISES` counts from 1.
        needs: Keys of :data:`pytest_qvl.checks.declared.NEEDS`.
        guarded: Whether its arguments and the model's exceptions are looked after (:func:`_guarded`); a check that is
            given no model looks after itself.
        videos: Whether it judges batches of videos too.

    Raises:
        ValueError: A need that nobody knows, or a check with the name of its module: ``pytest_qvl.checks.NAME`` would
            be the module from then on, and no function.
    """
    if unknown := set(needs) - set(NEEDS):
        raise ValueError(f"a check cannot need {', '.join(sorted(unknown))}; known: {', '.join(NEEDS)}")

    def declare(function: Callable[P, R]) -> Callable[P, R]:
        if function.__module__.rpartition(".")[2] == (name := function.__name__):
            raise ValueError(
                f"the check {name} and its module {function.__module__} have one name, so that importing the module "
                "hides the check: rename the module"
            )
        return _guarded(function, videos=videos) if guarded else function

    return declare


def _guarded(function: Callable[P, R], *, videos: bool) -> Callable[P, R]:
    """Look after what a check is given, and after the exceptions of a model under it.

    - ``model``: taken out of ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``, which the evidence
      notes.
    - Every batch (a ``BatchFeature``, any other mapping, or a sequence of them) becomes a ``dict`` on the model's
      device, without values that no model takes (strings, images), which the evidence notes.
    - A batch of videos is not judged by a check that knows images only.
    - Gradients are on at the start, whatever the caller has switched off (``no_grad``, ``inference_mode``): a check
      that trains would otherwise find an adapter without gradients.
    - An exception out of the model, its processor or the optimizer becomes :class:`ModelCrashed`, which names the
      module that raised it, notes the line, and says what is malformed about the batch, if anything is. Errors of
      the check itself (:class:`InputError`, a ``ValueError``, for its arguments), of GPU memory and of CUDA stay as
      they are.
    """
    first_line = (inspect.getdoc(function) or function.__name__).splitlines()[0]
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        with judging() as judges, noted() as notes, _gradients_on():
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise InputTypeError(f"{function.__name__}: {error}") from None
            arguments = _prepared(function.__name__, bound, notes, videos=videos)
            try:
                return function(*arguments.args, **arguments.kwargs)
            except _PASSED_ON:
                raise
            except Exception as error:
                crash = _crash(error, arguments.arguments)
                if crash is None:
                    raise
                judge = judges[-1] if judges else Judge(function.__name__, first_line)
                judge.problem(crash.sentence)
                judge.note(crash.place)
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


@contextmanager
def _gradients_on() -> Iterator[None]:
    import torch

    with torch.inference_mode(False), torch.enable_grad():
        yield


def _prepared(
    check_name: str, arguments: inspect.BoundArguments, notes: list[str], *, videos: bool
) -> inspect.BoundArguments:
    given = arguments.arguments
    if "model" in given:
        inner = unwrapped(given["model"])
        if inner is not given["model"]:
            notes.append(f"judged is the model inside {type(given['model']).__name__}, run as it was written")
            given["model"] = inner
    for name in BATCHES.intersection(given):
        value = given[name]
        if name == "batches" and isinstance(value, list | tuple):
            named = [(f"{name}[{number}]", each) for number, each in enumerate(value)]
            for where, each in named:
                refuse_no_batch(check_name, where, each)
            given[name] = [_batch(given.get("model"), each, notes, videos=videos) for each in value]
        else:
            refuse_no_batch(check_name, name, value)
            given[name] = _batch(given.get("model"), value, notes, videos=videos)
    if "model" in given and given.get("processor") is not None:
        from pytest_qvl.checks.support.vocabulary import refuse_ids_beyond
        from pytest_qvl.models.anatomy import anatomy

        refuse_ids_beyond(anatomy(given["model"]), processor=given["processor"])
    return arguments


def refuse_no_batch(check_name: str, argument: str, batch: Any, *, grids: bool = True) -> None:
    """Refuse what no processor returns, before a check stumbles over it.

    Args:
        check_name: Of the check that was given it.
        argument: By which argument.
        batch: What was given.
        grids: Whether grids of a floating dtype are refused as well.

    Raises:
        InputError: Names the check, its argument, what it was given and what it takes.
    """
    import torch

    def kind(value: Any) -> str:
        return "None" if value is None else type(value).__name__

    if not hasattr(batch, "keys"):
        raise InputError(
            f"{check_name}: a batch is a mapping from names to tensors, got {kind(batch)} for {argument}; {BATCH_HELP}"
        )
    values = _values(batch)
    for name in TENSORS:
        value = values.get(name)
        if value is not None and not isinstance(value, torch.Tensor):
            raise InputError(
                f"{check_name}: {argument}[{name!r}] is of type {kind(value)} where the model takes a torch.Tensor: "
                f'ask the processor for return_tensors="pt"; {BATCH_HELP}'
            )
    for name, pixels in GRIDS.items() if grids else ():
        made = values.get(name)
        if made is not None and made.is_floating_point():
            raise InputError(
                f"{check_name}: {argument}[{name!r}] is {str(made.dtype).removeprefix('torch.')}, and counts "
                f"frames, rows and columns of patches: cast {pixels} alone, or hand it on as the processor returns it "
                f"(int64); {BATCH_HELP}"
            )
        if made is not None and (made.ndim != 2 or made.shape[1] != 3):
            raise InputError(
                f"{check_name}: {argument}[{name!r}] has shape {tuple(made.shape)} where the processor makes a row for "
                f"each image or video: frames, rows and columns of patches; concatenate them along the first axis; "
                f"{BATCH_HELP}"
            )
    ids = values.get("input_ids")
    if ids is None or ids.ndim != 2:
        names = ", ".join(sorted(map(str, values))) or "no names at all"
        found = f"of shape {tuple(ids.shape)}" if ids is not None else f"missing among {names}"
        raise InputError(
            f"{check_name}: the batch needs input_ids of shape (rows, length); in {argument} they are {found}"
        )


def _values(batch: Any) -> dict[str, Any]:
    return {name: batch[name] for name in batch.keys()}  # noqa: SIM118 - a mapping need not iterate over its names


def _batch(model: Any, batch: Any, notes: list[str], *, videos: bool) -> dict[str, Any]:
    import torch

    from pytest_qvl.checks.support.vocabulary import refuse_ids_beyond
    from pytest_qvl.models.anatomy import anatomy

    values = _values(batch)
    foreign = sorted(name for name, value in values.items() if not _is_model_input(name, value))
    if foreign:
        sentence = f"left out of the batch, since no model takes them: {', '.join(foreign)}"
        notes.extend([sentence] if sentence not in notes else [])
    values = {name: value for name, value in values.items() if name not in foreign}
    if model is None:
        return values
    parts = anatomy(model)
    holds_video = values.get("pixel_values_videos") is not None or bool(
        (values["input_ids"] == parts.video_token_id).any()
    )
    if holds_video and not videos:
        raise CannotJudge("not judged: video (the batch holds a video; this check knows images only)")
    refuse_ids_beyond(parts, batch=values)
    return {
        name: _usable(value).to(parts.device) if isinstance(value, torch.Tensor) else value
        for name, value in values.items()
    }


def _usable(tensor: torch.Tensor) -> torch.Tensor:
    """What was made under ``torch.inference_mode`` cannot be saved for a backward pass; its copy can."""
    return tensor.clone() if tensor.is_inference() else tensor


def _is_model_input(name: str, value: Any) -> bool:
    import torch

    if name == "second_per_grid_ts" and (isinstance(value, list | tuple) or type(value).__name__ == "ndarray"):
        # As a processor returns it without tensors, or a collator lists it: the model takes one number after another.
        return all(isinstance(each, Real) or (isinstance(each, torch.Tensor) and each.numel() == 1) for each in value)
    return value is None or isinstance(value, torch.Tensor | bool | int | float)


@dataclass(frozen=True)
class _Crash:
    """An exception out of foreign code.

    Attributes:
        sentence: Who raised it, its type and its message.
        place: The line that raised it.
    """

    sentence: str
    place: str


def _crash(error: Exception, arguments: Mapping[str, Any]) -> _Crash | None:
    """What an exception out of foreign code says; None if it is the check's own."""
    text = str(error).strip()
    if type(error).__name__ in _GPU_ERRORS or any(word in text for word in _GPU_WORDS):
        return None
    entries = list(traceback.walk_tb(error.__traceback__))
    frames = [frame for frame, _line in entries]
    if not frames or is_own(frames[-1]):
        return None
    model = arguments.get("model")
    shown = text.splitlines()[0] if text else "without a message"
    sentence = f"{_raiser(frames, model)} raised {type(error).__name__}: {shown}{_malformed(model, arguments)}"
    return _Crash(sentence, _place(entries))


def _malformed(model: Any, arguments: Mapping[str, Any]) -> str:
    """What is malformed about the batches of a check, as the end of a sentence; empty if nothing is."""
    from pytest_qvl.checks.support.placeholders import validate_batch

    given = [arguments[name] for name in sorted(BATCHES.intersection(arguments))]
    batches = [batch for value in given for batch in (value if isinstance(value, list) else [value])]
    try:
        problems = [] if model is None else [problem for batch in batches for problem in validate_batch(model, batch)]
    except Exception:  # so malformed that it cannot even be described: the model's own error stands alone
        problems = []
    return f"; the batch is malformed: {problems[0]}" if problems else ""


def _place(entries: Sequence[tuple[FrameType, int]]) -> str:
    """The innermost line outside torch, which is the model's code or the user's; or the innermost of all."""
    import torch

    inside_torch = Path(torch.__file__).parent
    outside = [
        (frame, line)
        for frame, line in entries
        if not is_own(frame) and not Path(frame.f_code.co_filename).is_relative_to(inside_torch)
    ]
    frame, line = outside[-1] if outside else entries[-1]
    return f"raised at {file_of(frame)}:{line}, in {frame.f_code.co_qualname}()"


def _raiser(frames: list[FrameType], model: Any) -> str:
    """Who raised: the innermost module of the model, the optimizer, autograd, or the function called."""
    import torch

    ours = max(number for number, frame in enumerate(frames) if is_own(frame))
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
