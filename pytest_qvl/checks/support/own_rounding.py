"""Logits held to a noise floor, and to their own rounding where they are beyond it (docs/limits.md#own-rounding)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pytest_qvl.checks.support.activations import leaves
from pytest_qvl.checks.support.noise_floor import LOGITS, logits_dtype
from pytest_qvl.checks.support.rounding import last_place_noise, rounded_sums
from pytest_qvl.models.quantized import linear_states
from pytest_qvl.models.state import preserved

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from pytest_qvl.checks.support.noise_floor import NoiseFloor
    from pytest_qvl.models.anatomy import Parts

# Last-place noise is drawn so many times for a root mean square.
DRAWS = 16


def own_response(parts: Parts, run: Callable[[], torch.Tensor], *, tower: bool) -> torch.Tensor:
    """How far logits move when every module is a last place off: for each the root mean square of 16 draws.

    Args:
        parts: The model, its adapter as it is.
        run: Computes the logits by one plain forward, of any shape.
        tower: Whether the vision tower is given other images in what is compared, so that its rounding counts too.

    Returns:
        float32 in the shape of the logits; in float32 times
        :func:`pytest_qvl.checks.support.rounding.rounded_sums`.
    """
    import torch

    dtype, modules = logits_dtype(parts), [*leaves(parts.language_backbone), *leaves(parts.lm_head)]
    with preserved(parts.wrapped, training=False, seed=0), torch.no_grad():
        base = run().float()
        squares = torch.zeros_like(base)
        seen = leaves(parts.vision_tower) if tower else ()
        with last_place_noise(modules, torch.finfo(dtype).eps), last_place_noise(seen):
            for _ in range(DRAWS):
                squares += (run().float() - base).square_()
    terms = max(state.in_features for state in linear_states(parts) if tower or state.group in LOGITS)
    response: torch.Tensor = (squares / DRAWS).sqrt_() * rounded_sums(dtype, terms)
    return response


class HeldLogits:
    """The comparison of logits that comes nearest to its limit, or goes furthest beyond it.

    Args:
        floor: The noise floor; of other samples, and of the model without its adapter.

    Attributes:
        difference: Its largest difference (logit).
        limit: What that may be.
        name: What was compared.
        place: The number of the place within it.
        places: How many places were compared in all.
        beyond: How many comparisons went beyond the noise floor, and were held to their own rounding.
    """

    def __init__(self, floor: NoiseFloor) -> None:
        self.floor, self.difference, self.limit, self.name, self.place = floor, 0.0, math.inf, "nothing", 0
        self.places = self.beyond = 0

    def take(self, name: str, one: torch.Tensor, other: torch.Tensor, response: Callable[[], torch.Tensor]) -> None:
        """Compare finite logits ``(places, vocabulary)`` that are computed in two ways.

        Args:
            name: What to call them.
            one: Computed in one way.
            other: Computed in the other.
            response: Their :func:`own_response`; asked for beyond the noise floor only.
        """
        ours, theirs = one.float(), other.float().to(one.device)
        apart = (ours - theirs).abs().amax(dim=-1)
        place = int(apart.argmax())
        difference, logit = float(apart[place]), max(float(ours.abs().max()), float(theirs.abs().max()))
        limit = self.floor.limit_for(logit)
        if not difference <= limit:
            self.beyond += 1
            limit = self.floor.limit_for(logit, response=float(response().max()))
        self.places += len(apart)
        if self.limit == math.inf or difference / limit > self.difference / self.limit:
            self.difference, self.limit, self.name, self.place = difference, limit, name, place
