"""The picture matters as much as it did before quantization, or before the adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.chance import FALSE_ALARM, largest_by_chance
from pytest_qvl.checks.entry import check
from pytest_qvl.checks.reference import EVIDENCE, MAX_NEW_TOKENS, Probe, Reference
from pytest_qvl.checks.scoring import ABLATIONS, Said, Scored, ask, score
from pytest_qvl.evidence import CannotJudge, Evidence, Judge
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.state import preserved

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from pytest_qvl.samples import Sample


COLUMNS = (
    *("skill", "probes", "right before", "right now", "lost", "gained"),
    *(f"margin {ablation}" for ablation in ABLATIONS),
)


@dataclass(frozen=True)
class AlignmentLimits:
    """What :func:`alignment` holds a model to.

    Attributes:
        margin_ratio: Least mean margin, as a share of the reference's, under each ablation.
        flip_rate: Share of right answers that may be lost by chance where the reference itself makes fewer
            mistakes.
        false_alarm: Probability that a model within `flip_rate` fails.
    """

    margin_ratio: float = 0.9
    flip_rate: float = 0.02
    false_alarm: float = FALSE_ALARM


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


@dataclass(frozen=True)
class _Margin:
    """One probe under one ablation, in nat."""

    sample: Sample
    before: float
    now: float


@check
def alignment(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    reference: Reference,
    *,
    limits: AlignmentLimits | None = AlignmentLimits(),
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Evidence:
    """Right answers stay right, and the picture is why.

    *Margins.* A probe's margin under an ablation is how much more probable (nat, summed over the answer's
    tokens and ``<|im_end|>``, teacher-forced) the right answer is with the true pictures than with blank
    ones, noise, or pictures for which another answer is right. Under each ablation the mean margin must be at
    least 0.9 of the reference's. Probes whose margin in full precision is below one nat are left out there
    and counted: the model guesses them right without looking, and there is nothing to lose. On healthy NF4
    models the ratio was 0.97 to 1.03 over 45 sets of pictures in three dtypes, so 0.9 lies three times
    further out than anything quantization did.

    *Accuracy.* Lost answers less gained ones, on the same probes, may not exceed what chance explains. A
    healthy model loses a right answer when rounding or quantization tips a probe at the edge of its
    knowledge. Such probes are about as many as the ones that fell on the wrong side of that edge, so the
    allowed rate is the reference's own share of wrong answers, or 0.02 where that is smaller. The limit is
    the count that a binomial variable with that rate exceeds once in 10,000 runs, shared evenly (Bonferroni)
    among the total and every skill, so that a single lost skill (a transposed grid costs left and right only)
    is seen too. Gained answers only lower the count, so the probability of a false alarm is bounded, not
    approximated. A skill of which full precision answers fewer than half is not judged, and counted.

    With ``limits=None`` everything is measured and nothing judged: for a user's own adapter, whose "before"
    is the same model with the adapter disabled (``record_reference(..., adapter_disabled=True)``) and which
    may have been trained to answer otherwise.

    Also reported, without limit: mean Kullback-Leibler divergence (nat) of the answer-token distributions
    from the reference over its 64 most probable tokens and the rest as one, a lower bound of the full
    divergence, and how often the most probable token is the same. Equal accuracy hides answer flips;
    divergence shows them (arXiv:2407.09141).

    Args:
        model: Wrapped or not.
        processor: Its processor.
        samples: Probes that `reference` was recorded for.
        reference: From :func:`pytest_qvl.checks.reference.record_reference`.
        limits: None reports only.
        max_new_tokens: At most so many per reply.

    Returns:
        Evidence with a table per skill.

    Raises:
        CheckFailed: A limit is exceeded.
        CannotJudge: The reference does not tell true pictures from useless ones: random weights, or too few
            probes.
        ValueError: The reference was recorded for other samples.
    """
    recorded = {sample.id: reference.probe(sample) for sample in samples}
    if not reference.has_knowledge:
        raise CannotJudge(
            f"the reference ({reference.source}) does not tell true pictures from useless ones on "
            f"{len(reference.probes)} probes: it knows nothing about them (random weights?), or fewer than "
            "fourteen of them have pictures and a clear answer"
        )
    judge = Judge("alignment", "pictures matter as much as in the reference")
    if reference.caveat:
        judge.note(reference.caveat)
    margins: dict[str, list[_Margin]] = {ablation: [] for ablation in ABLATIONS}
    drift = _Drift()
    parts = anatomy(model)
    with preserved(model, training=False):
        for scored in score(parts, processor, samples):
            drift.take(scored, recorded)
            for sample, totals in zip(scored.samples, scored.totals, strict=True):
                for ablation in totals.keys() - {"true"}:
                    before = recorded[sample.id].margin(ablation)
                    assert before is not None
                    margins[ablation].append(_Margin(sample, before, totals["true"] - totals[ablation]))
        said = ask(parts, processor, samples, max_new_tokens=max_new_tokens)
    for ablation in ABLATIONS:
        if reference.sees(ablation):
            _judge_margins(judge, ablation, margins[ablation], limits, reference)
        else:
            judge.note(f"{ablation} pictures: not judged, full precision does not tell them from the true ones")
    skills = _skills(samples, recorded, said)
    _judge_accuracy(judge, skills, limits, reference)
    drift.report(judge)
    if limits is None:
        judge.note(f"reported, not judged, against {reference.source}")
    elif not any(figure.relation for figure in judge.figures):
        raise CannotJudge(f"none of these {len(samples)} samples decides: {'; '.join(judge.notes)}; give more pictures")
    return judge.verdict(COLUMNS, _rows(skills, margins))


def _judge_margins(
    judge: Judge, ablation: str, margins: list[_Margin], limits: AlignmentLimits | None, reference: Reference
) -> None:
    counted = [m for m in margins if m.before >= EVIDENCE]
    if not counted:
        judge.note(f"{ablation} pictures: not judged, none of these samples has a margin of {EVIDENCE:g} nat")
        return
    before = sum(m.before for m in counted) / len(counted)
    now = sum(m.now for m in counted) / len(counted)
    judge.report(f"mean margin over {ablation} pictures", now, "nat")
    judge.report(f"probes left out under {ablation} pictures", len(margins) - len(counted))
    name = f"margin over {ablation} pictures / reference"
    if limits is None:
        judge.report(name, now / before)
        return
    worst = min(counted, key=lambda m: m.now / m.before)
    judge.at_least(
        name,
        now / before,
        limits.margin_ratio,
        else_say=f"true pictures make the right answer {now:.3g} nat more probable than {ablation} ones, "
        f"where {reference.source} makes it {before:.3g}: the model looks less than before (worst: sample "
        f"{worst.sample.id!r}, {worst.now:.3g} of {worst.before:.3g} nat)",
    )


def _skills(samples: Sequence[Sample], recorded: dict[str, Probe], said: dict[str, Said]) -> dict[str, _Skill]:
    skills: dict[str, _Skill] = {}
    for sample in samples:
        skill = skills.setdefault(sample.skill, _Skill())
        before, now = recorded[sample.id].said.right, said[sample.id].right
        skill.asked += 1
        skill.before += before
        skill.now += now
        skill.gained += now and not before
        if before and not now:
            skill.lost.append(sample.id)
    return skills


def _judge_accuracy(
    judge: Judge, skills: dict[str, _Skill], limits: AlignmentLimits | None, reference: Reference
) -> None:
    judged = {name: skill for name, skill in skills.items() if skill.judged}
    left_out = sorted(skills.keys() - judged.keys())
    if left_out:
        judge.note(f"accuracy not judged where {reference.source} is mostly wrong: {', '.join(left_out)}")
    if not judged:
        return
    total = _Skill(
        sum(s.asked for s in judged.values()),
        sum(s.before for s in judged.values()),
        sum(s.now for s in judged.values()),
        [name for s in judged.values() for name in s.lost],
        sum(s.gained for s in judged.values()),
    )
    judge.report("right answers", total.now)
    judge.report("right answers of the reference", total.before)
    if limits is None:
        judge.report("answers lost less gained", total.net_lost)
        return
    level = limits.false_alarm / (len(judged) + 1)
    for name, skill in {"": total, **judged}.items():
        wrong = 1 - skill.before / skill.asked
        limit = largest_by_chance(skill.before, max(limits.flip_rate, wrong), level)
        if name and skill.net_lost <= limit:
            continue  # only broken skills get a figure of their own; the table has them all
        judge.at_most(
            f"answers lost less gained{f' ({name})' if name else ''}",
            skill.net_lost,
            limit,
            else_say=f"{f'skill {name!r}: ' if name else ''}{skill.now} of {skill.asked} answers are right, "
            f"{skill.before} in {reference.source}; lost, for instance, samples {', '.join(skill.lost[:3])}"
            f"{'' if name else _control(judged)}",
        )


def _control(skills: dict[str, _Skill]) -> str:
    """Whether text alone still works tells lost sight from lost language."""
    text = skills.get("text")
    if text is None:
        return ""
    return f" (text-only control: {text.now} of {text.asked} right, {text.before} before)"


def _rows(skills: dict[str, _Skill], margins: dict[str, list[_Margin]]) -> list[tuple[str | int | float | None, ...]]:
    rows = []
    for name, skill in skills.items():
        ratios = []
        for ablation in ABLATIONS:
            own = [m for m in margins[ablation] if m.sample.skill == name and m.before >= EVIDENCE]
            ratios.append(sum(m.now for m in own) / sum(m.before for m in own) if own else None)
        rows.append((name, skill.asked, skill.before, skill.now, len(skill.lost), skill.gained, *ratios))
    return rows


@dataclass
class _Drift:
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
        """Add the figures."""
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
