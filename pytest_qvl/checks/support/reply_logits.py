"""The logits of replies: numbers at all, and no further apart than noise where they should be the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.greedy import Reply, greedy
from pytest_qvl.checks.support.not_finite import origin_of_not_finite
from pytest_qvl.checks.support.own_rounding import HeldLogits
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
    """The largest difference of logits between replies that should be bitwise the same."""

    largest: float = 0.0
    where: str = "nowhere"
    steps: int = 0

    def take(self, name: str, one: Reply, other: Reply) -> None:
        """Compare step by step, up to and including the first step with different tokens."""
        ours, theirs = comparable_logits(one, other)
        for step in range(len(ours)):
            difference = float((ours[step] - theirs[step]).abs().max())
            self.steps += 1
            if not difference <= self.largest:
                self.largest = math.inf if math.isnan(difference) else difference
                self.where = f"{name}, step {step}"


@dataclass
class HeldReplies:
    """Replies that should be the same but for rounding: the comparison nearest to its limit, and how many diverged.

    Attributes:
        held: Takes their logits.
        diverged: How many chose another token.
    """

    held: HeldLogits
    diverged: int = 0

    def take(self, name: str, one: Reply, other: Reply, responses: Callable[[], torch.Tensor], row: int = 0) -> None:
        """Compare step by step, up to and including the first step with different tokens.

        Args:
            name: What to call the reply.
            one: Computed in one way.
            other: Computed in the other.
            responses: How far rounding moves the logits ``(rows, steps, vocabulary)`` of the replies that `other`
                belongs to (:func:`pytest_qvl.checks.support.own_rounding.own_response`).
            row: Which of these rows is that of `other`.
        """
        ours, theirs = comparable_logits(one, other)
        self.diverged += one.ids[: len(ours)] != other.ids[: len(ours)]
        if len(ours):
            self.held.take(name, ours, theirs, lambda: responses()[row, : len(ours)])

    def judge(self, judge: Judge, name: str, hint: str) -> None:
        """Hold what comes nearest to its limit to it; a reply may diverge where it stays below."""
        held = self.held
        judge.at_most(
            name,
            held.difference,
            held.limit,
            unit="logit",
            else_say=f"{name}: logits differ by {held.difference:.4g} at {held.name}, step {held.place}, where the "
            f"noise floor is {held.floor.value:.3g}; {hint}",
        )
        judge.report(f"{name}: steps compared", held.places)
        judge.report(f"{name}: replies that diverged within the noise", self.diverged)
        judge.report(f"{name}: replies beyond the noise floor, held to their own rounding", held.beyond)


def comparable_logits(one: Reply, other: Reply) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the steps that have the same inputs: up to and including the first with different tokens."""
    pairs = list(zip(one.ids, other.ids, strict=False))
    steps = next((step + 1 for step, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
    ours = logits_of(one)[:steps]
    return ours, logits_of(other)[:steps].to(ours.device)


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
