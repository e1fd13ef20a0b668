"""What a mutation is: a change of the live model that undoes itself, with words for it."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_qvl.faults.mutation.places import Places

TENSOR, SETTING, CODE = "tensor", "setting", "code"
# How often each kind is drawn: code has the most places that can be wrong, settings the fewest.
SHARES = {TENSOR: 0.4, SETTING: 0.2, CODE: 0.4}
ATTEMPTS = 100


@dataclass(frozen=True)
class Mutation:
    """One random defect.

    Attributes:
        kind: :data:`TENSOR`, :data:`SETTING` or :data:`CODE`.
        what: What is changed where, and how, in words.
        made: Makes it for the length of a block.
    """

    kind: str
    what: str
    made: Callable[[], AbstractContextManager[object]]


def draw(seed: int, number: int, places: Places) -> Mutation:
    """The mutation of that number: the same one for the same seed, model and releases.

    Args:
        seed: Of the run.
        number: Of the mutation, from 0.
        places: What can be changed.

    Raises:
        RuntimeError: Nothing that changes anything was drawn in :data:`ATTEMPTS` attempts.
    """
    generator = random.Random(f"{seed}/{number}")
    kind = generator.choices(list(SHARES), list(SHARES.values()))[0]
    for _ in range(ATTEMPTS):
        # A zero that is set to zero, or equal rows exchanged, is no mutation: then the next one is drawn.
        if (found := places.draw(kind, generator)) is not None:
            return found
    raise RuntimeError(f"no mutation of a {kind} was found for seed {seed}, number {number}")
