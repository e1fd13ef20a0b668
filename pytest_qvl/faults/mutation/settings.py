"""Mutations of values that are no tensors: of modules, configurations, processor and adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.mutation.drawn import SETTING, Mutation
from pytest_qvl.faults.tools import attribute

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from pytest_qvl.models.anatomy import Parts

FACTORS = (0.0, 0.1, 0.5, 0.9, 0.99, 1.01, 1.1, 2.0, 10.0)
STEPS = (-2, -1, 1, 2)
# What says whether a module is in training: every test sets it, and it is nobody's setting.
ASIDE = frozenset({"training"})
Place = tuple[str, Any, str]


def settings_of(parts: Parts, processor: Any) -> list[list[Place]]:
    """Numbers, flags and lists of numbers in attributes: ``(owner's name, owner, attribute)``, alike ones together.

    Those of one class and name are alike, as the epsilon of all norms is: else layers would crowd out the rest.
    """
    groups: dict[tuple[str, str], list[Place]] = {}
    for name, owner in _owners(parts, processor):
        for key, value in vars(owner).items():
            if key not in ASIDE and not key.startswith("_") and _changeable(value):
                groups.setdefault((type(owner).__name__, key), []).append((name, owner, key))
    return list(groups.values())


def _owners(parts: Parts, processor: Any) -> Iterator[tuple[str, Any]]:
    yield from ((name or "the model", module) for name, module in parts.base.named_modules())
    yield "config", parts.config
    yield from ((key, value) for key, value in vars(parts.config).items() if key.endswith("_config"))
    yield "generation_config", parts.base.generation_config
    yield "image processor", processor.image_processor


def _changeable(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(one, int | float) for one in value)
    if isinstance(value, dict):
        return any(_changeable(one) for one in value.values())
    return isinstance(value, int | float)


def draw_setting(groups: list[list[Place]], generator: random.Random) -> Mutation | None:
    """Change one value of one owner; nothing if the change would not be one."""
    name, owner, key = generator.choice(generator.choice(groups))
    before = vars(owner)[key]
    after = _changed(before, generator)
    if after == before and type(after) is type(before):
        return None
    return Mutation(SETTING, f"{name}.{key}: {before!r} becomes {after!r}", lambda: attribute(owner, key, after))


def _changed(value: Any, generator: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, dict):
        key = generator.choice([key for key, one in value.items() if _changeable(one)])
        return {**value, key: _changed(value[key], generator)}
    if isinstance(value, list | tuple):
        made = list(value)
        first, second = generator.randrange(len(made)), generator.randrange(len(made))
        if generator.random() < 0.5:
            made[first], made[second] = made[second], made[first]
        else:
            made[first] = _changed(made[first], generator)
        return type(value)(made)
    if isinstance(value, int):
        return value + generator.choice(STEPS)
    return value * generator.choice(FACTORS) if value else generator.choice(FACTORS)
