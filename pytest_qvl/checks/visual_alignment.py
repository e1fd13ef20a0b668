"""The image matters as much as it did before quantization, or before the adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.binomial import largest_by_chance
from pytest_qvl.checks.support.noise_floor import EVIDENCE, NoiseFloor
from pytest_qvl.checks.support.not_finite import origin_of_not_finite
from pytest_qvl.checks.support.probing import AlignmentLimits, Margin, Measured, Run, measure
from pytest_qvl.checks.support.reference import MAX_NEW_TOKENS, Reference
from pytest_qvl.checks.support.scoring import ABLATIONS, answer_logits, chunks
from pytest_qvl.checks.support.trained_adapter import decisive_ablation, judge_looking
from pytest_qvl.evidence import CannotJudge, Evidence, Judge
from pytest_qvl.models.adapters import active_adapters, adapted_layers, adapters_disabled
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.state import preserved
from pytest_qvl.samples import make_batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_qvl.evidence import Value
    from pytest_qvl.samples import Sample


COLUMNS = (
    *("skill", "probes", "right before", "right now", "lost", "gained"),
    *(f"margin {ablation}" for ablation in ABLATIONS),
)

NET_LOST = "answers lost less gained"
ADAPTER_ON = "adapter on: "  # before the names of figures that a trained adapter changes
ANSWERS = "answers"  # in the data of the evidence: what pytest_qvl.report.record writes


@dataclass
class _Skill:
    """Answers of one skill, before (reference) and now."""

    asked: int = 0
    before: int = 0
    now: int = 0
    lost: list[str] = field(default_factory=list)
    gained: int = 0

    @property
    def net_lost(self) -> int:
        return len(self.lost) - self.gained

    @property
    def judged(self) -> bool:
        """Whether full precision is right on half of its probes: what it does not know cannot be lost."""
        return 2 * self.before >= self.asked


@check(promise=9, needs=("knowledge",))
def alignment(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    reference: Reference,
    *,
    limits: AlignmentLimits | Literal["usual"] | None = "usual",
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Evidence:
    """Right answers stay right, and the image is why.

    A margin is how much more probable (nat) the right answer is with the true images than with blank ones, noise, or
    images for which another answer is right. With ``limits=None`` everything is measured and nothing judged.

    ================================== ============================================ ================================
    judged                             limit                                        derived in docs/limits.md
    ================================== ============================================ ================================
    mean margin, under each ablation   0.9 of the reference's, less rounding        docs/limits.md#margins
    answers lost less gained           binomial, once in 10,000 runs                docs/limits.md#accuracy
    a trained adapter                  the base as above with the adapter off; on,  docs/limits.md#a-trained-adapter
                                       four binomial tests (:func:`judge_looking`)
    ================================== ============================================ ================================

    Also reported, without limit: mean Kullback-Leibler divergence (nat) of the answer-token distributions from the
    reference over its 64 most probable tokens and the rest as one, a lower bound of the full divergence, and how often
    the most probable token is the same. Equal accuracy hides answer flips; divergence shows them (arXiv:2407.09141).
    The base under an adapter that is merged into the weights is not judged: it cannot be switched off.

    Args:
        model: Wrapped or not.
        processor: Its processor.
        samples: Probes that `reference` was recorded for.
        reference: From :func:`pytest_qvl.checks.support.reference.record_reference`.
        limits: ``"usual"``: :class:`AlignmentLimits` as they stand for the base and for an adapter that changes
            no logit; None reports only.
        max_new_tokens: At most so many per reply.

    Returns:
        Evidence with a table per skill.

    Raises:
        CheckFailed: A limit is exceeded.
        CannotJudge: The reference does not tell true images from useless ones: random weights, or too few
            probes.
        ValueError: The reference was recorded for other samples.
    """
    recorded = {sample.id: reference.probe(sample) for sample in samples}
    if not reference.has_knowledge:
        raise CannotJudge(
            f"the reference ({reference.source}) does not tell true images from useless ones on "
            f"{len(reference.probes)} probes: it knows nothing about them (random weights?), or fewer than "
            "fourteen of them have images and a clear answer"
        )
    judge = Judge("alignment", "images matter as much as in the reference")
    if reference.caveat:
        judge.note(reference.caveat)
    run = Run(anatomy(model), processor, samples, reference, recorded, max_new_tokens)
    with preserved(model, training=False):
        if limits == "usual" and _differs(run):
            now = _judge_trained(judge, run, AlignmentLimits())
        else:
            now = measure(run)
            _judge_all(judge, run, now, AlignmentLimits() if limits == "usual" else limits)
    now.drift.report(judge)
    judge.data[ANSWERS] = _answers(run, now)
    if limits is None:
        judge.note(f"reported, not judged, against {reference.source}")
    elif not judge.problems and not any(figure.relation for figure in judge.figures):
        raise CannotJudge(f"none of these {len(samples)} samples decides: {'; '.join(judge.notes)}; give more images")
    return judge.verdict(COLUMNS, _rows(_skills(run, now), now.margins))


def _differs(run: Run) -> bool:
    """Whether the adapters change any logit of some probes; one merged into the weights counts as if it did."""
    layers = adapted_layers(run.parts).values()
    if any(layer.merged for layer in layers):
        return True
    if not active_adapters(run.parts):
        return False
    batch = make_batch(run.processor, next(chunks(run.samples)), answers=True, device=run.parts.device)
    on = answer_logits(run.parts, batch).logits
    with adapters_disabled(run.parts):
        off = answer_logits(run.parts, batch).logits
    return not bool(((on == off) | (on.isnan() & off.isnan())).all())


def _judge_trained(judge: Judge, run: Run, limits: AlignmentLimits) -> Measured:
    """Judge the base under a trained adapter, and whether the model still looks with it; returns the latter's."""
    if any(layer.merged for layer in adapted_layers(run.parts).values()):
        judge.note("the adapter is merged into the weights: the base under it was not judged")
    else:
        with adapters_disabled(run.parts):
            _judge_all(judge, run, measure(run), limits, "adapter off: ")
    now = measure(run)
    if not _judge_finite(judge, run, now, ADAPTER_ON):
        return now
    for ablation in ABLATIONS:
        _judge_margins(judge, run, now, None, ablation=ablation, prefix=ADAPTER_ON)
    _judge_accuracy(judge, _skills(run, now), None, run.reference, ADAPTER_ON)
    judge.note(
        "the adapter has learned something: its margins are reported, and judged only against limits of your own"
    )
    decisive = decisive_ablation(run.samples, run.reference)
    if decisive is None:
        judge.note(f"{ADAPTER_ON}not judged, full precision does not tell swapped images from the true ones")
        return now
    judge_looking(judge, run, now, decisive, limits)
    return now


def _judge_all(judge: Judge, run: Run, now: Measured, limits: AlignmentLimits | None, prefix: str = "") -> None:
    if not _judge_finite(judge, run, now, prefix):
        return
    for ablation in ABLATIONS:
        if run.reference.sees(ablation):
            _judge_margins(judge, run, now, limits, ablation=ablation, prefix=prefix)
        else:
            judge.note(f"{ablation} images: not judged, full precision does not tell them from the true ones")
    _judge_accuracy(judge, _skills(run, now), limits, run.reference, prefix)


def _judge_finite(judge: Judge, run: Run, now: Measured, prefix: str) -> bool:
    """Whether every answer has a finite probability; if not, that is the problem, and nothing else is told."""
    if now.broken:
        sample = now.broken[0]
        batch = make_batch(run.processor, [sample], answers=True, device=run.parts.device)
        origin = origin_of_not_finite(run.parts, lambda: answer_logits(run.parts, batch))
        judge.equal(
            f"{prefix}answers whose probability is not finite",
            len(now.broken),
            0,
            else_say=f"{prefix}logits at the answer of sample {sample.id!r} are not finite{origin}",
        )
    return not now.broken


def _judge_margins(
    judge: Judge, run: Run, now: Measured, limits: AlignmentLimits | None, *, ablation: str, prefix: str
) -> None:
    margins = now.margins[ablation]
    counted = [m for m in margins if m.before >= EVIDENCE]
    if not counted:
        judge.note(f"{ablation} images: not judged, none of these samples has a margin of {EVIDENCE:g} nat")
        return
    before = sum(m.before for m in counted) / len(counted)
    mean = sum(m.now for m in counted) / len(counted)
    judge.report(f"{prefix}mean margin over {ablation} images", mean, "nat")
    judge.report(f"{prefix}probes left out under {ablation} images", len(margins) - len(counted))
    name = f"{prefix}margin over {ablation} images / reference"
    if limits is None:
        judge.report(name, mean / before)
        return
    worst = min(counted, key=lambda m: m.now / m.before)
    judge.at_least(
        name,
        mean / before,
        margin_limit(run.reference.floor, counted, limits),
        else_say=f"{prefix}true images make the right answer {mean:.3g} nat more probable than {ablation} ones, "
        f"where {run.reference.source} makes it {before:.3g}: the model looks less than before (worst: sample "
        f"{worst.sample.id!r}, {worst.now:.3g} of {worst.before:.3g} nat)",
    )


def margin_limit(floor: NoiseFloor, margins: Sequence[Margin], limits: AlignmentLimits) -> float:
    """Least share of the reference's mean margin: what `limits` ask for, less where rounding alone takes more away."""
    before = sum(margin.before for margin in margins) / len(margins)
    return min(limits.margin_ratio, 1 - margin_noise(floor, margins, limits.false_alarm) / before)


def margin_noise(floor: NoiseFloor, margins: Sequence[Margin], level: float) -> float:
    """How far (nat) rounding moves the mean of these margins with probability `level`; see :func:`alignment`."""
    known = max(floor.value, floor.resolution)
    tokens = sum(margin.tokens for margin in margins)
    return 4 * known * math.sqrt(tokens * math.log(1 / level)) / len(margins)


def _skills(run: Run, measured: Measured) -> dict[str, _Skill]:
    skills: dict[str, _Skill] = {}
    for sample in run.samples:
        skill = skills.setdefault(sample.skill, _Skill())
        before, now = run.recorded[sample.id].said.right, measured.said[sample.id].right
        skill.asked += 1
        skill.before += before
        skill.now += now
        skill.gained += now and not before
        if before and not now:
            skill.lost.append(sample.id)
    return skills


def _answers(run: Run, now: Measured) -> list[Value]:
    """For each sample its digest and whether its answer is right, lost, gained or wrong, against the reference."""
    found: list[Value] = []
    for name, probe in run.recorded.items():
        before, right = probe.said.right, now.said[name].right
        became = ("gained" if not before else "right") if right else "lost" if before else "wrong"
        found.append(f"{probe.digest:08x} {became}")
    return found


def _judge_accuracy(
    judge: Judge, skills: dict[str, _Skill], limits: AlignmentLimits | None, reference: Reference, prefix: str
) -> None:
    judged = {name: skill for name, skill in skills.items() if skill.judged}
    left_out = sorted(skills.keys() - judged.keys())
    if left_out:
        note = f"accuracy not judged where {reference.source} is mostly wrong: {', '.join(map(repr, left_out))}"
        if note not in judge.notes:
            judge.note(note)
    if not judged:
        return
    total = _Skill(
        sum(s.asked for s in judged.values()),
        sum(s.before for s in judged.values()),
        sum(s.now for s in judged.values()),
        [name for s in judged.values() for name in s.lost],
        sum(s.gained for s in judged.values()),
    )
    judge.report(f"{prefix}right answers", total.now)
    judge.report(f"{prefix}right answers of the reference", total.before)
    if limits is None:
        judge.report(f"{prefix}{NET_LOST}", total.net_lost)
        return
    level = limits.false_alarm / (len(judged) + 1)
    for name, skill in {"": total, **judged}.items():
        wrong = 1 - skill.before / skill.asked
        limit = largest_by_chance(skill.before, max(limits.flip_rate, wrong), level)
        if name and skill.net_lost <= limit:
            continue  # only broken skills get a figure of their own; the table has them all
        judge.at_most(
            f"{prefix}{NET_LOST}{f' ({name})' if name else ''}",
            skill.net_lost,
            limit,
            else_say=f"{prefix}{f'skill {name!r}: ' if name else ''}{skill.now} of {skill.asked} answers are right, "
            f"{skill.before} in {reference.source}; lost, for instance, samples {', '.join(map(repr, skill.lost[:3]))}"
            f"{'' if name else _control(judged)}",
        )


def _control(skills: dict[str, _Skill]) -> str:
    """Whether text alone still works tells lost sight from lost language."""
    text = skills.get("text")
    if text is None:
        return ""
    return f" (text-only control: {text.now} of {text.asked} right, {text.before} before)"


def _rows(skills: dict[str, _Skill], margins: dict[str, list[Margin]]) -> list[tuple[str | int | float | None, ...]]:
    rows = []
    for name, skill in skills.items():
        ratios = []
        for ablation in ABLATIONS:
            own = [m for m in margins[ablation] if m.sample.skill == name and m.before >= EVIDENCE]
            ratios.append(sum(m.now for m in own) / sum(m.before for m in own) if own else None)
        rows.append((name, skill.asked, skill.before, skill.now, len(skill.lost), skill.gained, *ratios))
    return rows
