"""Key-value caches that hold something else than was computed; replies end before logits show it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.tools import after, before
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.layers import language_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from pytest_qvl.faults.case import Case

    Stored = Callable[[Any, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

_ALL = slice(None)
PLACE = "model.language_model.layers.{attending}.self_attn"


@contextmanager
def stored(case: Case, change: Stored) -> Iterator[None]:
    """The first layer that attends stores what ``change(its layer of the cache, keys, values)`` makes of new ones."""
    from transformers import cache_utils

    kind: Any = cache_utils.DynamicLayer
    original, inside = kind.update, [False]

    def update(layer: Any, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if inside[0]:
            keys, values = change(layer, keys, values)
        return original(layer, keys, values, *args, **kwargs)

    def mark(entered: bool) -> Callable[..., None]:
        def hook(*_call: Any) -> None:
            inside[0] = entered

        return hook

    attention = next(layer.attention for layer in language_layers(anatomy(case.model)) if layer.attends)
    kind.update = update
    try:
        with before([attention], mark(True)), after([attention], mark(False)):
            yield
    finally:
        kind.update = original


@fault(
    "cache-one-step-stale",
    "While decoding, one layer's cache gets the key and value of the step before.",
    target="model",
    check="layer_arithmetic",
    expected_words=(f"key-value cache: {PLACE} holds at position", "the cache is one step stale"),
)
def _stale(case: Case) -> Iterator[None]:
    with stale(case):
        yield


def stale(case: Case, *, keys: slice | tuple[int | slice, ...] = _ALL, values: bool = True) -> Any:
    """While decoding, one layer's cache gets keys and values of the step before.

    Args:
        case: Its first layer that attends.
        keys: Which of the new keys, ``(rows, heads, 1, width)``.
        values: Whether all of its values too.
    """
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def older(layer: Any, new: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        last = kept.get(id(layer))
        kept[id(layer)] = new[:, :, -1:], value[:, :, -1:]
        if new.shape[2] > 1 or last is None:
            return new, value
        mixed = new.clone()
        mixed[keys] = last[0][keys]
        return mixed, last[1] if values else value

    return stored(case, older)


@fault(
    "cache-rounded-to-8-bits",
    "One layer's cache keeps keys and values in 8 bits, which nobody asked for.",
    target="model",
    check="layer_arithmetic",
    expected_words=(f"key-value cache: {PLACE} holds keys that are off by up to", "they were rounded"),
)
def _rounded(case: Case) -> Iterator[None]:
    import torch

    def coarse(_layer: Any, *both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (each.to(torch.float8_e4m3fn).to(each.dtype) for each in both)
        return keys, values

    with stored(case, coarse):
        yield
