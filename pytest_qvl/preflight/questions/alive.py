"""Question 4: is the adapter alive? Its own tensors, read whole one by one, and its size beside the base's weights.

Every limit is one of arithmetic; none is fitted:

| finding | red when |
| --- | --- |
| integers | a tensor is stored as whole numbers, of which nobody knows the scale |
| not finite | a value is NaN or infinite |
| zero | A or B has no value but 0, or the scaling is 0: the product is 0 |
| constant | A or B has one value throughout (rank 1, whatever ``r`` says) |
| subnormal | no value of A or B reaches the smallest normal number of the dtype that it is stored in |
| overflow | a vector of length 1 can leave float16's range: the largest singular value of ΔW is above 65,504 |
| exploded | ``norm(ΔW) > norm(W)``: most of what a linear layer answers to a random input is the adapter's |
| copy as in the base | a copy that was to be trained has the base's values, bit for bit |

Effective rank is the exponential of the entropy of the singular values' shares (Roy and Vetterli, *The effective rank*,
EUSIPCO 2007); it is printed, and no limit is on it.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.anatomy import GROUPS
from pytest_qvl.preflight.commands import pytest_line, red
from pytest_qvl.preflight.files.values import FLOATS, pieces
from pytest_qvl.preflight.findings import Finding, counted, some
from pytest_qvl.preflight.merged import same_values
from pytest_qvl.preflight.starts import CONVERT
from pytest_qvl.preflight.timing import each_in_a_thread, one_thread

if TYPE_CHECKING:
    from pytest_qvl.preflight.files.headers import Tensor
    from pytest_qvl.preflight.subject import Subject
    from pytest_qvl.preflight.survey import Surveyed
    from pytest_qvl.preflight.updates import Update

NUMBER = 4
_red = partial(red, NUMBER)
_HALF_MOST = 65504.0
_DIVERGED = "the training diverged, and what was saved is what it ended with"
_EARLIER = "take an earlier checkpoint; train with a lower learning rate, or with gradients clipped"
_UNTRAINED = (
    "no gradient reached these modules, no optimizer step was made, or what was saved is the adapter as it was "
    "initialised (a ZeRO-3 or FSDP save that did not gather it)"
)
_TRAIN = "train these modules, or take them out of target_modules; save with the tensors gathered"


@dataclass(frozen=True)
class Vitals:
    """What one tensor's values say.

    Attributes:
        tensor: By its header.
        bad: Values that are NaN or infinite.
        least: The smallest value.
        most: The largest.
        tiny: The smallest normal number of its dtype.
    """

    tensor: Tensor
    bad: int
    least: float
    most: float
    tiny: float

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(abs(self.least), abs(self.most))

    @property
    def is_zero(self) -> bool:
        """Whether no value is other than zero."""
        return not self.bad and self.largest == 0

    @property
    def is_constant(self) -> bool:
        """Whether there are several values, all the same and not zero."""
        return not self.bad and self.tensor.numel > 1 and self.least == self.most != 0

    @property
    def is_subnormal(self) -> bool:
        """Whether there are values beside zero, and none of them is a normal number."""
        return not self.bad and 0 < self.largest < self.tiny


def vitals(tensor: Tensor) -> Vitals:
    """Look at every value of a tensor, piece by piece.

    Raises:
        ModelSourceError: The file has become shorter.
    """
    import torch

    bad, least, most, tiny = 0, math.inf, -math.inf, 0.0
    for _, values in pieces(tensor):
        tiny = torch.finfo(values.dtype).tiny
        low, high = (float(value) for value in torch.aminmax(values.float()))
        if not math.isfinite(low + high):
            bad += int((~torch.isfinite(values.float())).sum())
        else:
            least, most = min(least, low), max(most, high)
    empty = least > most
    return Vitals(tensor, bad, 0.0 if empty else least, 0.0 if empty else most, tiny)


def answer(subject: Subject) -> Iterator[Finding]:
    """What is dead or broken in the adapter's own values, then how large it is beside the base's."""
    subject.saved_adapter()
    updates = subject.updates
    yield from _integers(subject)
    if not (updates.pairs or updates.copies or updates.token_rows):
        raise CannotJudge(f"no tensor of the adapter is one that can be judged: {some(updates.beyond)}")
    with one_thread():
        yield from _judged(subject)


def _integers(subject: Subject) -> Iterator[Finding]:
    """Tensors of whole numbers, of which nobody knows the scale."""
    assert subject.adapter is not None
    whole = [t for t in subject.adapter.tensors.values() if t.dtype[0] in "IUB" and t.dtype != "BF16"]
    if whole:
        yield _red(
            subject, "integers",
            f"{len(whole)} of {len(subject.adapter.tensors)} tensors of the adapter are stored as "
            f"{', '.join(sorted({t.dtype for t in whole}))}: {some(t.name for t in whole)}",
            cause="the file was quantized, and PEFT, which knows no scale for it, takes the integers for the values",
            fix="save the adapter again in float32 or bfloat16",
        )  # fmt: skip


def _judged(subject: Subject) -> Iterator[Finding]:
    updates = subject.updates
    tensors = _tensors(subject)
    looked = dict(zip(tensors, each_in_a_thread(vitals, tensors.values()), strict=True))
    wrong = [*_not_finite(subject, looked), *_dead(subject, looked), *_untouched(subject)]
    yield from wrong
    broken = {name for name, each in looked.items() if each.bad}
    sound = [u for u in updates.pairs.values() if not {u.down.name, u.up.name} & broken]
    if updates.beyond:
        reasons = sorted(set(updates.beyond.values()))
        yield Finding(NUMBER, "not-looked-at", "not judged",
            f"{len(updates.beyond)} tensors are not judged ({'; '.join(reasons)}): {some(updates.beyond)}")  # fmt: skip
    for reason, modules in updates.not_at_hand.items():
        yield Finding(
            NUMBER, "start-unknown", "not judged",
            f"what {len(modules)} modules add to the base is not told: {reason}: {some(modules)}", fix=CONVERT,
        )  # fmt: skip
    yield from _size(subject, [u for u in sound if not u.not_at_hand], green=not wrong)


def _tensors(subject: Subject) -> dict[str, Tensor]:
    updates = subject.updates
    matrices = [t for u in updates.pairs.values() for t in (u.down, u.up, u.magnitude) if t is not None]
    biases = [update.up for update in updates.biases.values()]
    return {t.name: t for t in (*matrices, *biases, *updates.copies.values(), *updates.token_rows.values())}


def _not_finite(subject: Subject, looked: Mapping[str, Vitals]) -> Iterator[Finding]:
    bad = {name: each.bad for name, each in looked.items() if each.bad}
    if bad:
        count = sum(bad.values())
        yield _red(
            subject, "not-finite",
            f"{counted(count, 'value')} of the adapter {'is' if count == 1 else 'are'} NaN or infinite, in {len(bad)} "
            f"of its {len(looked)} tensors: {some(bad)}",
            cause=f"{_DIVERGED}, or values above 65,504 were cast to float16", fix=_EARLIER,
        )  # fmt: skip


def _dead(subject: Subject, looked: Mapping[str, Vitals]) -> Iterator[Finding]:
    pairs = subject.updates.pairs
    zero = [m for m, u in pairs.items() if not u.scaling or looked[u.down.name].is_zero or looked[u.up.name].is_zero]
    if zero:
        whole = len(zero) == len(pairs)
        yield _red(
            subject, "adapter-zero" if whole else "modules-zero",
            f"{len(zero)} of {len(pairs)} modules add nothing ({_counted(subject, zero)}): "
            f"{_which_zero(subject, looked, zero)}: {some(zero)}",
            cause=_UNTRAINED if all(pairs[m].scaling for m in zero) else "lora_alpha or alpha_pattern is 0",
            fix=_TRAIN if all(pairs[m].scaling for m in zero) else "put back the lora_alpha of the training",
        )  # fmt: skip
    matrices = {t.name: m for m, u in pairs.items() for t in (u.down, u.up)}
    constant = [name for name in matrices if looked[name].is_constant]
    if constant:
        yield _red(
            subject, "constant",
            f"{len(constant)} of {len(matrices)} matrices hold one value throughout, so their product has rank 1: "
            f"{some(constant)}",
            cause="the matrix was filled in place of being initialised or loaded", fix="save the trained adapter again",
        )  # fmt: skip
    faint = [name for name in matrices if looked[name].is_subnormal]
    if faint:
        dtype = looked[faint[0]].tensor.dtype
        yield _red(
            subject, "subnormal",
            f"{len(faint)} of {len(matrices)} matrices hold no value that {dtype} keeps as a normal number (largest "
            f"{max(looked[name].largest for name in faint):.1e}, smallest normal one {looked[faint[0]].tiny:.1e}): "
            f"{some(faint)}",
            cause=f"the adapter was trained a few steps at a tiny learning rate, or cast to {dtype}",
            fix="save it in float32 or bfloat16, and see that the learning rate is that of LoRA (about 1e-4)",
        )  # fmt: skip
    yield from _overflowing(subject, looked)


def _which_zero(subject: Subject, looked: Mapping[str, Vitals], zero: Sequence[str]) -> str:
    pairs = subject.updates.pairs
    if not pairs[zero[0]].scaling:
        return "the product is multiplied by 0"
    down, up = (sum(looked[getattr(pairs[m], side).name].is_zero for m in zero) for side in ("down", "up"))
    return f"B is 0 in {up}, A in {down}"


def _overflowing(subject: Subject, looked: Mapping[str, Vitals]) -> Iterator[Finding]:
    """The largest singular value is not above the product of both Frobenius norms; computed where that may matter."""
    found = {}
    for module, update in subject.updates.pairs.items():
        sides = [looked[tensor.name] for tensor in (update.down, update.up)]
        bound = abs(update.scaling) * math.prod(side.largest * math.sqrt(side.tensor.numel) for side in sides)
        if not update.not_at_hand and not any(side.bad for side in sides) and bound > _HALF_MOST:
            largest = float(update.factors().singular_values()[0])
            if largest > _HALF_MOST:
                found[module] = largest
    if found:
        yield _red(
            subject, "overflow",
            f"{len(found)} of {len(subject.updates.pairs)} modules stretch a vector of length 1 beyond float16's "
            f"65,504 (up to {max(found.values()):.1e}): {some(found)}",
            cause=_DIVERGED, fix=_EARLIER,
        )  # fmt: skip


def _untouched(subject: Subject) -> Iterator[Finding]:
    """Copies that were to be trained and have the base's values, where the base's are here."""
    asked = tuple(subject.lora.modules_to_save or ())
    compared = {
        name: tensor
        for name, tensor in subject.updates.copies.items()
        if name in subject.weights and not subject.weights.is_packed(name) and _is_asked_for(name, asked)
    }
    same = [name for name, tensor in compared.items() if _equal(tensor, subject.weights[name])]
    if same:
        yield _red(
            subject, "copy-untrained",
            f"{len(same)} of {len(compared)} trained copies have the base's values bit for bit: {some(same)}",
            cause="modules_to_save asks for them, and no gradient reached them, or every step was below half a step "
            "of their dtype",
            fix="train them (in float32: bfloat16 keeps no step below 1/512 of a value), or leave them out",
        )  # fmt: skip


def _is_asked_for(name: str, asked: Sequence[str]) -> bool:
    return any(f".{entry}." in f".{name}." for entry in asked)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and other.dtype in FLOATS and same_values(one, other)


def _size(subject: Subject, sound: Sequence[Update], *, green: bool) -> Iterator[Finding]:
    if not sound:
        return
    ranks = list(each_in_a_thread(_effective, sound))
    ranked = f"effective rank {statistics.median(ranks):.1f} of {_ranks(sound)} (smallest {min(ranks):.1f})"
    surveyed = list(subject.survey.values()) if subject.weights else []
    surveyed = [each for each in surveyed if math.isfinite(each.strength.value)]
    # Rows of embeddings are no answer to a random input: of an adapted one any row may be new.
    linear = [each for each in surveyed if not subject.updates.pairs[each.module].embedding]
    large = [each for each in linear if each.strength.value - each.strength.error > 1]
    if large:
        worst = max(large, key=lambda each: each.strength.value)
        yield _red(
            subject, "exploded",
            f"ΔW is larger than W in {len(large)} of {counted(len(linear), 'module')}, norm(ΔW) up to "
            f"{worst.strength.value:.3g} times norm(W) (in {worst.module}): {some(each.module for each in large)}",
            cause=f"{_DIVERGED}, or lora_alpha is not that of the training (the scaling is "
            f"{subject.updates.pairs[worst.module].scaling:g})",
            fix=f"put back the lora_alpha of the training, if it was edited; if not, {_EARLIER}",
        )  # fmt: skip
    if green and not large:
        copies = len(subject.updates.copies) + len(subject.updates.token_rows)
        also = f", and {copies} trained copies or rows" if copies else ""
        yield Finding(
            NUMBER, "alive", "green",
            f"{len(sound)} modules{also}: every value is finite, no matrix is zero or constant; {ranked}",
            keeps_green=pytest_line(subject),
        )  # fmt: skip
    if not subject.weights:
        yield Finding(NUMBER, "strength", "not judged",
            "how large the adapter is beside the base: base weights are not here")  # fmt: skip
    elif surveyed and not large:
        yield Finding(NUMBER, "strength", "green", _strengths(surveyed), keeps_green=pytest_line(subject))


def _strengths(surveyed: Sequence[Surveyed]) -> str:
    values = sorted(surveyed, key=lambda each: each.strength.value)
    middle, most = values[len(values) // 2], values[-1]
    looked = sum(each.share for each in surveyed) / len(surveyed)
    by_group = ", ".join(
        f"{group} {statistics.median(each.strength.value for each in each_group):.2g}"
        for group in GROUPS
        if (each_group := [each for each in surveyed if each.group == group])
    )
    sampled = "" if looked == 1 else f"; {looked:.0%} of the rows were looked at"
    return (
        f"norm(ΔW)/norm(W) is {middle.strength.value:.2g} in the median of {len(surveyed)} modules ({by_group}), at "
        f"most {most.strength.value:.2g} ± {most.strength.error:.1g} in {most.module}{sampled}"
    )


def _effective(update: Update) -> float:
    values = update.factors().singular_values()
    total = float(values.sum())
    if not total > 0:
        return 0.0
    shares = [share for share in (values / total).tolist() if share > 0]
    return math.exp(-math.fsum(share * math.log(share) for share in shares))


def _ranks(updates: Sequence[Update]) -> str:
    # What a start took out of the base is as wide as the adapter.
    return "/".join(str(rank) for rank in sorted({u.down.shape[0] * (2 if u.start else 1) for u in updates}))


def _counted(subject: Subject, modules: Sequence[str]) -> str:
    pairs = subject.updates.pairs
    some_, whole = Counter(pairs[m].group for m in modules), Counter(u.group for u in pairs.values())
    return ", ".join(f"{group} {some_[group]} of {whole[group]}" for group in GROUPS if some_[group])
