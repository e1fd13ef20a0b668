"""Everything that alignment measures of a model, beside what was recorded of full precision."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.binomial import FALSE_ALARM
from pytest_qvl.checks.support.scoring import ABLATIONS, Said, Scored, graded, replies, score

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from pytest_qvl.checks.support.greedy import Reply
    from pytest_qvl.checks.support.reference import Probe, Reference
    from pytest_qvl.evidence import Judge
    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.samples import Sample


@dataclass(frozen=True)
class AlignmentLimits:
    """What :func:`pytest_qvl.checks.alignment` holds a model to (docs/limits.md#margins, docs/limits.md#accuracy).

    Attributes:
        margin_ratio: Least mean margin, as a share of the reference's, under each ablation.
        flip_rate: Share of right answers that may be lost by chance where the reference itself makes fewer
            mistakes.
        false_alarm: Probability that a model within `flip_rate` fails.
    """

    margin_ratio: float = 0.9
    flip_rate: float = 0.02
    false_alarm: float = FALSE_ALARM


@dataclass(frozen=True)
class Margin:
    """One probe under one ablation, in nat.

    Attributes:
        sample: The probe.
        before: Its margin in the reference.
        now: Its margin in the model under test.
        tokens: Tokens of the answer, the closing one included: as many log-probabilities are summed.
    """

    sample: Sample
    before: float
    now: float
    tokens: int


@dataclass
class Drift:
    """Divergence of the answer-token distributions from the recorded ones."""

    divergences: list[float] = field(default_factory=list)
    same_top: int = 0

    def take(self, scored: Scored, recorded: dict[str, Probe]) -> None:
        """Compare one batch with what was recorded of its samples."""
        import torch

        logprobs = scored.true.logits.log_softmax(-1)
        ids = torch.cat([recorded[s.id].top_ids for s in scored.samples]).to(logprobs.device)
        before = torch.cat([recorded[s.id].top_logprobs for s in scored.samples]).to(logprobs.device)
        now = logprobs.gather(1, ids)
        self.divergences += _divergence(before, now).tolist()
        self.same_top += int((logprobs.argmax(-1) == ids[:, 0]).sum())

    def report(self, judge: Judge) -> None:
        """Add the mean divergence (nat) and the share of equal most probable tokens to the evidence."""
        count = len(self.divergences)
        judge.report("mean KL divergence at answer tokens", sum(self.divergences) / count, "nat")
        judge.report("same most probable token", self.same_top / count)


def _divergence(before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """KL divergence (nat) per row over the listed outcomes, all others as one; takes log-probabilities."""
    import torch

    p, q = before.double(), now.double()
    smallest = torch.finfo(before.dtype).eps  # the rest is a difference from 1, known to that much only
    rest_p = (1 - p.exp().sum(-1)).clamp_min(smallest)
    rest_q = (1 - q.exp().sum(-1)).clamp_min(smallest)
    return (p.exp() * (p - q)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())


@dataclass(frozen=True)
class Run:
    """What one call was given."""

    parts: Parts
    processor: Any
    samples: Sequence[Sample]
    reference: Reference
    recorded: dict[str, Probe]
    max_new_tokens: int


@dataclass
class Measured:
    """What a model made of all probes.

    Attributes:
        margins: Per ablation, of the probes that have it.
        replies: By sample id, over the true images.
        said: How these went.
        drift: Divergence from the recorded distributions.
        broken: Probes with an answer whose probability is not finite.
    """

    margins: dict[str, list[Margin]] = field(default_factory=lambda: {ablation: [] for ablation in ABLATIONS})
    replies: dict[str, Reply] = field(default_factory=dict)
    said: dict[str, Said] = field(default_factory=dict)
    drift: Drift = field(default_factory=Drift)
    broken: list[Sample] = field(default_factory=list)

    def answers(self, run: Run) -> str:
        """How many answers are right, in words."""
        now = sum(said.right for said in self.said.values())
        before = sum(run.recorded[name].said.right for name in self.said)
        return f"{now} of {len(self.said)} answers are right, {before} in {run.reference.source}"


def measure(run: Run) -> Measured:
    """Score and ask every probe. The caller has set eval mode."""
    found = Measured()
    for scored in score(run.parts, run.processor, run.samples):
        found.drift.take(scored, run.recorded)
        for row, (sample, totals) in enumerate(zip(scored.samples, scored.totals, strict=True)):
            if not all(map(math.isfinite, totals.values())):
                found.broken.append(sample)
            for ablation in totals.keys() - {"true"}:
                before = run.recorded[sample.id].margin(ablation)
                assert before is not None
                now, tokens = totals["true"] - totals[ablation], scored.true.rows.count(row)
                found.margins[ablation].append(Margin(sample, before, now, tokens))
    found.replies = replies(run.parts, run.processor, run.samples, max_new_tokens=run.max_new_tokens)
    found.said = graded(run.processor, run.samples, found.replies)
    return found
