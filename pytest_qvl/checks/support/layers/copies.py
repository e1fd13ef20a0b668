"""Modules that PEFT trains in full beside an adapter (``modules_to_save``): which of them runs, and which rests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.models.adapters import auxiliary_layers, base_modules

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from pytest_qvl.models.anatomy import Parts


def place_of(label: str) -> str:
    """The dotted name in the base model of a module or of a copy, whose label is ``name (adapter)``."""
    return label.partition(" ")[0]


def trained_copies(parts: Parts) -> dict[str, nn.Module]:
    """Every copy, with the modules inside of it, by ``name (adapter)``: the name in the base model, and whose it is."""
    wrappers = auxiliary_layers(parts)
    return {label: module for name in wrappers for _, label, module in _copies(name, wrappers[name])}


def resting(parts: Parts) -> set[str]:
    """Labels of the modules that are not due: originals of which a copy or rows work, and copies of other adapters."""
    found: set[str] = set()
    originals = base_modules(parts)
    for name, wrapper in auxiliary_layers(parts).items():
        active = () if wrapper.disable_adapters else tuple(wrapper.active_adapters)
        working = {adapter for adapter in active if adapter in _holder(wrapper)}
        if working:
            found |= {each for each in originals if each == name or each.startswith(f"{name}.")}
        found |= {label for adapter, label, _ in _copies(name, wrapper) if adapter not in working}
    return found


def _copies(name: str, wrapper: Any) -> Iterator[tuple[str, str, nn.Module]]:
    """Adapter, label and module of everything inside of the copies of one wrapper."""
    for adapter, copy in getattr(wrapper, "modules_to_save", {}).items():
        for inner, module in copy.named_modules():
            yield adapter, f"{name}.{inner} ({adapter})" if inner else f"{name} ({adapter})", module


def _holder(wrapper: Any) -> Any:
    """What a wrapper keeps by the name of the adapter: its copies, or the rows that are trained."""
    rows = getattr(wrapper, "token_adapter", None)
    return wrapper.modules_to_save if rows is None else rows.trainable_tokens_delta
