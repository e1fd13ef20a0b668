"""Many probes per forward: what a model says, and how probable it holds the right answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.greedy import Reply, greedy
from pytest_qvl.checks.support.rounding import coarsest
from pytest_qvl.models.quantized import linear_states
from pytest_qvl.samples import Sample, make_batch
from pytest_qvl.samples.batch import IGNORED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from pytest_qvl.models.anatomy import Group, Parts

ABLATIONS = ("blank", "noise", "swapped")
NOISE_SEED = 0
ROWS_PER_FORWARD = 16
PIXELS_PER_FORWARD = 1 << 20  # some 1,300 visual tokens: activations stay far below the weights of any real model


@dataclass(frozen=True)
class AnswerLogits:
    """Logits that predict the answer's tokens, teacher-forced.

    Attributes:
        rows: Row of the batch that each scored position belongs to.
        targets: ``(positions,)`` int64, the right tokens, the closing ``<|im_end|>`` included.
        logits: ``(positions, vocabulary)`` float32, on the model's device.
    """

    rows: tuple[int, ...]
    targets: torch.Tensor
    logits: torch.Tensor

    def totals(self, count: int) -> list[float]:
        """Log-probability of the whole answer in nat, for each of the `count` rows."""
        picked = self.logits.log_softmax(-1).gather(1, self.targets[:, None]).flatten().tolist()
        sums = [0.0] * count
        for row, value in zip(self.rows, picked, strict=True):
            sums[row] += value
        return sums


@dataclass(frozen=True)
class Scored:
    """Some probes, scored together.

    Attributes:
        samples: The probes, one per row.
        batch: Left-padded inputs with answers and `labels`, true images.
        true: Answer logits over the true images.
        totals: For each row, log-probability of the right answer (nat) with the ``"true"`` images and under
            each ablation that the probe has.
    """

    samples: list[Sample]
    batch: dict[str, torch.Tensor]
    true: AnswerLogits
    totals: list[dict[str, float]]


@dataclass(frozen=True)
class Said:
    """What a model replied to one probe.

    Attributes:
        right: Whether the reply ends by itself and contains the answer.
        stopped: Whether it ends by itself.
    """

    right: bool
    stopped: bool


def chunks(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Samples in groups that fit one forward, alike in length, the same groups for the same samples."""
    group: list[Sample] = []
    for sample in sorted(samples, key=lambda s: (_pixels(s), len(s.question), s.id)):
        if group and (
            len(group) == ROWS_PER_FORWARD or sum(map(_pixels, group)) + _pixels(sample) > PIXELS_PER_FORWARD
        ):
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def _pixels(sample: Sample) -> int:
    return sum(image.width * image.height for image in sample.images)


def ablated(sample: Sample, ablation: str) -> Sample | None:
    """The probe with its images made useless, its right answer kept; None where that does not exist."""
    if not sample.images:
        return None
    if ablation == "blank":
        return sample.blank()
    if ablation == "noise":
        return sample.noise(NOISE_SEED)
    return None if sample.swapped is None else sample.with_swapped()


def without_labels(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model's forward takes; `labels` would make it compute a loss over all logits."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def scored_columns(batch: dict[str, torch.Tensor]) -> int:
    """How many of the last columns hold every position whose logits predict an answer token."""
    labels = batch["labels"]
    first = int((labels != IGNORED).any(dim=0).nonzero()[0])
    return labels.shape[1] - first + 1


def answer_logits(parts: Parts, batch: dict[str, torch.Tensor]) -> AnswerLogits:
    """One forward over a left-padded batch with `labels`; only the columns needed go through the head."""
    import torch

    keep = scored_columns(batch)
    parts.core.rope_deltas = None
    with torch.no_grad():
        logits = parts.wrapped(**without_labels(batch), logits_to_keep=keep, use_cache=False).logits[:, -keep:]
    tail = batch["labels"][:, -keep + 1 :]
    rows, columns = (tail != IGNORED).nonzero(as_tuple=True)
    return AnswerLogits(tuple(rows.tolist()), tail[rows, columns], logits[rows, columns].float())


def score(parts: Parts, processor: Any, samples: Sequence[Sample]) -> Iterator[Scored]:
    """Score every probe with its true images and under each ablation. The caller has set eval mode."""
    for group in chunks(samples):
        batch = make_batch(processor, group, answers=True, device=parts.device)
        true = answer_logits(parts, batch)
        totals = [{"true": total} for total in true.totals(len(group))]
        for ablation in ABLATIONS:
            pairs = [(row, changed) for row, s in enumerate(group) if (changed := ablated(s, ablation)) is not None]
            if pairs:
                inputs = make_batch(processor, [s for _, s in pairs], answers=True, device=parts.device)
                found = answer_logits(parts, inputs).totals(len(pairs))
                for (row, _), total in zip(pairs, found, strict=True):
                    totals[row][ablation] = total
        yield Scored(group, batch, true, totals)


def ask(parts: Parts, processor: Any, samples: Sequence[Sample], *, max_new_tokens: int) -> dict[str, Said]:
    """Let the model reply to every probe, by sample id; see :func:`graded`."""
    return graded(processor, samples, replies(parts, processor, samples, max_new_tokens=max_new_tokens))


def replies(parts: Parts, processor: Any, samples: Sequence[Sample], *, max_new_tokens: int) -> dict[str, Reply]:
    """What the model replies to every probe, by sample id."""
    found: dict[str, Reply] = {}
    for group in chunks(samples):
        batch = make_batch(processor, group, device=parts.device)
        made = greedy(parts.wrapped, batch, max_new_tokens=max_new_tokens)
        found |= {sample.id: reply for sample, reply in zip(group, made, strict=True)}
    return found


def graded(processor: Any, samples: Sequence[Sample], found: dict[str, Reply]) -> dict[str, Said]:
    """Which replies are right.

    A reply is right when it ends by itself within its limit of tokens and contains the answer as whole words,
    upper and lower case alike: a model that answers in a sentence is right too.
    """
    said = {}
    for sample in samples:
        reply = found[sample.id]
        said[sample.id] = Said(reply.stopped and says(text_of(processor, reply), sample.answer), reply.stopped)
    return said


def text_of(processor: Any, reply: Reply) -> str:
    """The reply as text, special tokens left out."""
    text: str = processor.tokenizer.decode(list(reply.ids), skip_special_tokens=True)
    return text


def says(text: str, answer: str) -> bool:
    """Whether `answer` stands in `text` as whole words."""
    wanted = answer.strip().strip(".").casefold()
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text.casefold()) is not None


def coarsest_dtype(parts: Parts, groups: Sequence[Group]) -> torch.dtype:
    """The dtype with the largest unit roundoff among those that the linears of `groups` compute in."""
    import torch

    names = {s.compute_dtype or s.storage for s in linear_states(parts) if s.group in groups}
    dtypes: list[torch.dtype] = [torch.float16 if name == "int8" else getattr(torch, name) for name in names]
    return coarsest(dtypes)
