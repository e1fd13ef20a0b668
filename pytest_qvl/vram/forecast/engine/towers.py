"""Which layers of a tower have to run so that the others' memory is known from them.

The layers of a tower repeat: of 28 decoder layers, 24 take the same memory in the same order. One of them runs, and
what it did is written down for the others (:mod:`.repeats`). Layers that differ, and those beside them, run themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from pytest_qvl.models.families import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from torch import nn

    from pytest_qvl.models.anatomy import Parts


@dataclass(frozen=True)
class Tower:
    """One of a model's two stacks of layers.

    Attributes:
        owner: The module whose forward calls them.
        layers: All of them.
        runs: Which of them run, in order.
        stands_for: Layers that do not run, in order, by the one that runs for them.
    """

    owner: nn.Module
    layers: nn.ModuleList
    runs: tuple[int, ...]
    stands_for: dict[int, tuple[int, ...]]


def towers(parts: Parts) -> list[Tower]:
    """The towers of a model some of whose layers need not run."""
    config = parts.config
    # Towers of these families call their layers one after the other, each with the last one's result, and tell them
    # apart by nothing but what is asked below.
    if config.model_type not in FAMILIES:
        return []
    vision, text = config.vision_config, parts.text_config
    full = getattr(vision, "fullatt_block_indexes", None) or ()
    deep = getattr(vision, "deepstack_visual_indexes", None) or ()
    attention = getattr(text, "layer_types", None) or [None] * len(parts.language_backbone.layers)
    blocks = [(_structure(block), i in full, i in deep) for i, block in enumerate(parts.blocks)]
    layers: list[Hashable] = [
        # The first decoder layers are given what the vision tower's deep layers saw.
        (_structure(layer), attention[i], i if i < len(deep) else None)
        for i, layer in enumerate(parts.language_backbone.layers)
    ]
    found = [
        _tower(parts.vision_tower, parts.blocks, blocks, must_run=deep),
        _tower(parts.language_backbone, parts.language_backbone.layers, layers),
    ]
    return [tower for tower in found if tower.stands_for and not any(map(_changes, tower.layers.modules()))]


def _changes(module: nn.Module) -> bool:
    """Whether its next forward keeps other tensors than it was given: bitsandbytes' layers cast their bias for good."""
    bias, compute_dtype = getattr(module, "bias", None), getattr(module, "compute_dtype", None)
    return isinstance(bias, torch.Tensor) and compute_dtype is not None and bias.dtype != compute_dtype


def _structure(layer: nn.Module) -> Hashable:
    """Equal for layers that run the same operations on tensors of the same shapes, their inputs aside."""
    modules = tuple((name, type(module), getattr(module, "p", None)) for name, module in layer.named_modules())
    parameters = tuple(
        (name, type(p), p.dtype, p.shape, p.stride(), p.requires_grad)
        for name, p in (*layer.named_parameters(), *layer.named_buffers())
    )
    return modules, parameters


def _tower(
    owner: nn.Module, layers: nn.ModuleList, kinds: Sequence[Hashable], *, must_run: Iterable[int] = ()
) -> Tower:
    around = surroundings(kinds)
    runs = chosen(kinds, must_run)
    stands_for: dict[int, tuple[int, ...]] = {}
    for index in sorted(set(range(len(kinds))) - set(runs)):
        stand_in = around.index(around[index])  # the first of each surroundings runs
        stands_for[stand_in] = (*stands_for.get(stand_in, ()), index)
    return Tower(owner, layers, runs, stands_for)


def surroundings(kinds: Sequence[Hashable]) -> list[tuple[Hashable, ...]]:
    """Each layer's kind between those of its neighbours; the first and the last layer are of kinds of their own."""
    last = len(kinds) - 1
    own: list[Hashable] = [(kind, index == 0, index == last) for index, kind in enumerate(kinds)]
    return [tuple(own[max(index - 1, 0) : index + 2]) for index in range(len(own))]


def chosen(kinds: Sequence[Hashable], must_run: Iterable[int] = ()) -> tuple[int, ...]:
    """The layers that run: of every surroundings the first, and what joins them.

    A layer that runs has neighbours of the same kinds in the shortened tower as in the whole one.

    Args:
        kinds: Equal for layers that do the same to memory.
        must_run: Layers after which the tower does something of its own.
    """
    around = surroundings(kinds)
    found = {around.index(one) for one in around} | set(must_run)
    while True:
        runs = sorted(found)
        joining = set()
        for before, after in pairwise(runs):
            if after > before + 1 and kinds[after] != kinds[before + 1]:
                joining.add(after - 1)
            if after > before + 1 and kinds[before] != kinds[after - 1]:
                joining.add(before + 1)
        if not joining:
            return tuple(runs)
        found |= joining
