"""Small changes that undo themselves; what the faults are made of."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.attributes import attributes_replaced
from pytest_qvl.samples.batch import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    import torch
    from torch import nn

    from pytest_qvl.faults.case import Batch, Case
    from pytest_qvl.models.anatomy import Parts

    Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    Through = Callable[[Parts, Callable[[torch.Tensor], torch.Tensor]], AbstractContextManager[None]]

IMAGE_TYPE = 1


def attribute(owner: Any, name: str, value: Any) -> AbstractContextManager[None]:
    """Set an attribute on an object itself, see :func:`pytest_qvl.models.attributes.attributes_replaced`."""
    return attributes_replaced([(owner, name, value)])


@contextmanager
def attributes_restored(model: nn.Module) -> Iterator[None]:
    """Put every attribute of every module back as it was, the ones that appeared included; weights are not copied."""
    kept = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, own in kept:
            vars(module).clear()
            vars(module).update(own)


@contextmanager
def values(tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Write ``change(tensor)`` into a tensor, and the old bits back on leaving."""
    before = tensor.detach().clone()
    tensor.data.copy_(change(before.clone()))
    try:
        yield
    finally:
        tensor.data.copy_(before)


@contextmanager
def before(modules: Sequence[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    """Run ``hook(module, args, kwargs) -> (args, kwargs) | None`` before each of the modules."""
    with _removed([module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]):
        yield


@contextmanager
def after(modules: Sequence[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    """Run ``hook(module, args, output) -> output | None`` after each of the modules."""
    with _removed([module.register_forward_hook(hook) for module in modules]):
        yield


@contextmanager
def at_tokens(parts: Parts, token: int, through: Through, change: Change) -> Iterator[None]:
    """Pass what `through` sees of every prompt with a token through ``change(values, its places)``.

    Args:
        parts: The model.
        token: Id of the token; its places are ``(rows, length)`` bool.
        through: Hands over values and takes others in their place for the length of a block, as functions of
            :mod:`pytest_qvl.models.taps` do.
        change: Is given a copy of the values.
    """
    seen: dict[str, Any] = {}

    def note(_module: Any, _args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids")
        seen["places"] = None if ids is None else ids == token

    def changed(values: torch.Tensor) -> torch.Tensor:
        places = seen.get("places")
        if places is None or not bool(places.any()):
            return values
        return change(values.clone(), places)

    with before([parts.core], note), through(parts, changed):
        yield


def name_of(parts: Parts, module: Any) -> str:
    """The dotted name in the base model of one of its modules, or of what PEFT has put in its place."""
    from pytest_qvl.models.adapters import base_modules, original_module

    own = original_module(module)
    return next(name for name, each in base_modules(parts).items() if each is own)


@contextmanager
def rows_scored(parts: Any) -> Iterator[list[int]]:
    """How many rows of images are being scored, in a list of one; 0 elsewhere.

    Scored is by a forward in eval mode, not in ``generate()``, and without videos.
    """
    base, original = parts.base, parts.base.generate
    generating, rows = [0], [0]

    def generate(*args: Any, **kwargs: Any) -> Any:
        generating[0] += 1
        try:
            return original(*args, **kwargs)
        finally:
            generating[0] -= 1

    def note(module: Any, _args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids")
        elsewhere = generating[0] or module.training or kwargs.get("pixel_values_videos") is not None
        rows[0] = 0 if ids is None or elsewhere else len(ids)

    def forget(_module: Any, _args: Any, _output: Any) -> None:
        rows[0] = 0

    with attribute(base, "generate", generate), before([parts.core], note), after([parts.core], forget):
        yield rows


@contextmanager
def while_running(modules: Sequence[nn.Module], name: str, value: Callable[[Any], Any]) -> Iterator[None]:
    """Give modules another attribute for the length of each call: what a kernel does that does not read it.

    Whoever looks at the modules between two calls finds them as they were.

    Args:
        modules: The modules.
        name: Of the attribute.
        value: Makes its other value of the right one.
    """
    kept: dict[int, Any] = {}

    def enter(module: Any, _args: Any, _kwargs: Any) -> None:
        kept[id(module)] = getattr(module, name)
        setattr(module, name, value(kept[id(module)]))

    def leave(module: Any, _args: Any, _output: Any) -> None:
        setattr(module, name, kept.pop(id(module)))

    with before(modules, enter), after(modules, leave):
        yield


@contextmanager
def replaced_while_running(module: nn.Module, name: str, stand_in: Any) -> Iterator[None]:
    """Have a module find something else in the place of one of its submodules while it runs, and only then."""

    def enter(module: Any, _args: Any, _kwargs: Any) -> None:
        object.__setattr__(module, name, stand_in)

    def leave(module: Any, _args: Any, _output: Any) -> None:
        object.__delattr__(module, name)

    with before([module], enter), after([module], leave):
        yield


@contextmanager
def _removed(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def all_of(contexts: Sequence[Any]) -> Iterator[None]:
    """Enter several context managers together, and leave them in reverse order."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def load_again(case: Case, **options: Any) -> None:
    """Put another load of the case's model in its place, with other options of :attr:`Case.load`; in its own dtype."""
    case.model = case.load(**{"dtype": case.policy.compute_dtype, **options})


def on_first(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A layer's output with its hidden states changed, whether it is a tensor or a tuple."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def rebuilt(case: Case, batch: Batch, rows: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """A batch for training with other tokens in its rows, padded on the right; its images stay.

    Args:
        case: Whose processor and image token they are.
        batch: Its ``input_ids``, ``attention_mask``, ``labels`` and ``mm_token_type_ids`` are made anew.
        rows: Ids and labels of each, without padding.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def padded(values: Sequence[list[int]], padding: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(each) for each in values], batch_first=True, padding_value=padding)

    made = {
        "input_ids": padded([ids for ids, _ in rows], case.processor.tokenizer.pad_token_id),
        "attention_mask": padded([[1] * len(ids) for ids, _ in rows], 0),
        "labels": padded([labels for _, labels in rows], IGNORED),
    }
    if "mm_token_type_ids" in batch:
        made["mm_token_type_ids"] = image_types(made["input_ids"], anatomy(case.model).image_token_id)
    return {**batch, **made}


def image_types(ids: torch.Tensor, image: int) -> torch.Tensor:
    """``mm_token_type_ids`` as the processors of Transformers 5 make them, of rows without videos."""
    return (ids == image).to(ids) * IMAGE_TYPE
