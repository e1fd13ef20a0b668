"""The logits of replies: numbers at all, and no further apart than noise where they should be the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.greedy import Reply, greedy
from pytest_qvl.checks.support.noise_floor import NoiseFloor
from pytest_qvl.checks.support.not_finite import origin_of_not_finite
from pytest_qvl.checks.support.placeholders import attended
from pytest_qvl.evidence import InputError, Judge
from pytest_qvl.models.anatomy import Parts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

NOT_FINITE = "replies with logits that are not finite"


def judge_finite_logits(
    judge: Judge,
    parts: Parts,
    named: Sequence[tuple[str, Reply]],
    inputs: dict[str, torch.Tensor],
    again: Callable[[], Any] | None = None,
) -> bool:
    """Whether all logits are finite; if not, the problem says so, and nothing else can be told from them.

    Args:
        judge: Takes the problem.
        parts: The model.
        named: Replies with what to call each.
        inputs: The batch that they answer.
        again: Computes these logits once more; if not given, cached generation.
    """
    broken = [(name, reply.not_finite) for name, reply in named if reply.not_finite is not None]
    if broken:
        name, step = broken[0]
        run = again or partial(greedy, parts.wrapped, inputs, max_new_tokens=step + 1)
        origin = origin_of_not_finite(parts, run)
        judge.equal(
            NOT_FINITE,
            len(broken),
            0,
            else_say=f"logits of {name} are not finite from step {step} on{origin}",
        )
    return not broken


def by_row(replies: Sequence[Reply]) -> list[tuple[str, Reply]]:
    """Each reply with what to call it: the row that it answers."""
    return [(f"row {row}", reply) for row, reply in enumerate(replies)]


@dataclass
class LogitsApart:
    """The largest difference of logits between replies that should be the same."""

    largest: float = 0.0
    where: str = "nowhere"
    logit: float = 0.0
    steps: int = 0
    diverged: int = 0

    def take(self, name: str, one: Reply, other: Reply) -> None:
        """Compare step by step, up to and including the first step with different tokens."""
        ours, theirs = logits_of(one), logits_of(other).to(logits_of(one).device)
        for step in range(min(len(one.ids), len(other.ids))):
            difference = float((ours[step] - theirs[step]).abs().max())
            self.logit = max(self.logit, float(ours[step].abs().max()), float(theirs[step].abs().max()))
            self.steps += 1
            if not difference <= self.largest:
                self.largest = math.inf if math.isnan(difference) else difference
                self.where = f"{name}, step {step}"
            if one.ids[step] != other.ids[step]:
                self.diverged += 1
                break


def judge_apart(judge: Judge, name: str, apart: LogitsApart, floor: NoiseFloor, hint: str) -> None:
    """Hold the largest difference to the noise floor's limit; a reply may diverge where it stays below."""
    judge.at_most(
        name,
        apart.largest,
        floor.limit_for(apart.logit),
        unit="logit",
        else_say=f"{name}: logits differ by {apart.largest:.4g} at {apart.where}, where the noise floor is "
        f"{floor.value:.3g}; {hint}",
    )
    judge.report(f"{name}: steps compared", apart.steps)
    judge.report(f"{name}: replies that diverged within the noise", apart.diverged)


def logits_of(reply: Reply) -> torch.Tensor:
    """``(len(ids), vocabulary)`` of a reply that was generated with ``keep_logits=True``."""
    assert reply.logits is not None
    return reply.logits


def require_left_padding(batch: dict[str, torch.Tensor]) -> None:
    """Refuse a batch whose rows do not all end with a token that is attended to.

    Raises:
        ValueError: It is padded on the right.
    """
    if not bool(attended(batch)[:, -1].all()):
        raise InputError("generation continues the last column of each row: pad the batch on the left")
