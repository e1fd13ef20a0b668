"""Whether a model with a trained adapter still answers, and still needs the image to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qvl.checks.support.binomial import largest_by_chance, smallest_by_chance
from pytest_qvl.checks.support.noise_floor import EVIDENCE
from pytest_qvl.checks.support.scoring import ABLATIONS, ablated, replies, says, text_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_qvl.checks.support.probing import AlignmentLimits, Measured, Run
    from pytest_qvl.checks.support.reference import Reference
    from pytest_qvl.evidence import Judge
    from pytest_qvl.samples import Sample

TESTS = 4  # that share the probability of a false alarm


def decisive_ablation(samples: Sequence[Sample], reference: Reference) -> str | None:
    """The ablation that tells sight from blindness; None where the reference itself does not see.

    Swapped images look like the true ones, and another answer is right for them. Blank and noisy ones look
    unlike all true images, and may push every answer one way, so they stand in only where no probe has swapped
    ones.
    """
    if any(sample.swapped is not None for sample in samples):
        return "swapped" if reference.sees("swapped") else None
    return next((ablation for ablation in ABLATIONS if reference.sees(ablation)), None)


def judge_looking(judge: Judge, run: Run, now: Measured, ablation: str, limits: AlignmentLimits) -> None:
    """Hold a trained adapter to what it must keep: it names right answers, and they depend on the image.

    Four one-sided binomial tests, each at a quarter of the probability of a false alarm: answers that are lost, margins
    that vanished, margins that turned, and replies that do not change with the image. The first takes all probes, the
    others those whose margin in the reference is a nat or more: there the image decided. Rates and reasons are in
    docs/limits.md#a-trained-adapter. An adapter that was taught not to name the right answer at all (boxes, say) has to
    be asked probes of its own task.

    Args:
        judge: Takes figures and problems.
        run: Model, probes and reference.
        now: What the model made of the probes with its adapter on.
        ablation: Which other images are shown.
        limits: Probability of a false alarm, and the share of answers that may be lost by chance.
    """
    margins, answers = now.margins[ablation], now.answers(run)
    level = limits.false_alarm / TESTS
    _judge_answers(judge, run, now, limits, level)
    judged = [m for m in margins if m.before >= EVIDENCE]
    kept = sum(m.now >= EVIDENCE for m in judged)
    turned = sum(m.now <= -EVIDENCE for m in judged)
    wrong = sum(m.before <= -EVIDENCE for m in margins) / max(len(margins), 1)
    least = smallest_by_chance(len(judged), 0.5, level)
    if not least:
        judge.note(
            f"adapter on: not judged, {len(judged)} probes that need the image in full precision are too few to tell "
            "a model that looks from one that does not; give more images"
        )
        return
    less = f"with the adapter on, the model looks less than before: of {len(judged)} answers that the image decided"
    judge.at_least(
        f"adapter on: probes that keep a margin over {ablation} images",
        kept,
        least,
        else_say=f"{less}, {kept} are still a nat more probable over it than over {ablation} images ({answers})",
    )
    judge.at_most(
        f"adapter on: probes whose margin over {ablation} images has turned",
        turned,
        largest_by_chance(len(judged), max(limits.flip_rate, wrong), level),
        else_say=f"{less}, {turned} are now a nat more probable over {ablation} images ({answers})",
    )
    # A probe with a margin under an ablation has its images.
    others = {m.sample.id: other for m in judged if (other := ablated(m.sample, ablation)) is not None}
    found = replies(run.parts, run.processor, list(others.values()), max_new_tokens=run.max_new_tokens)
    changed = sum(found[other.id].ids != now.replies[name].ids for name, other in others.items())
    judge.at_least(
        f"adapter on: replies that change with {ablation} images",
        changed,
        least,
        else_say=f"with the adapter on, the model answers without looking: {len(others) - changed} of {len(others)} "
        f"replies stay the same, word for word, over {ablation} images ({answers})",
    )


def _judge_answers(judge: Judge, run: Run, now: Measured, limits: AlignmentLimits, level: float) -> None:
    right = [run.recorded[sample.id].said.right for sample in run.samples]
    named = [says(text_of(run.processor, now.replies[sample.id]), sample.answer) for sample in run.samples]
    wrong = 1 - sum(right) / len(right)
    limit = largest_by_chance(sum(right), max(limits.flip_rate, wrong), level)
    judge.at_most(
        "adapter on: answers no longer named less newly named",
        sum(right) - sum(named),
        limit,
        else_say=f"with the adapter on, answers are lost: {now.answers(run)}, and {sum(named)} of {len(named)} replies "
        "name the right one at all; to an adapter that was taught not to name them, give probes of its own task",
    )
