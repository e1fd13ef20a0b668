"""Question 7: what survives a merge, predicted from adapter and base; and with ``--merged`` what did.

Definitions and sampling: :mod:`pytest_qvl.preflight.rounding` and :mod:`pytest_qvl.preflight.survey`.

| finding | state |
| --- | --- |
| what storing keeps of ΔW | green: figures of a bf16 merge and of both ways into NF4 |
| a bf16 merge would lose more of ΔW's energy than it keeps (``error**2 > 1/2``) | not judged: no merge was given |
| a bf16 merge would change no weight that was looked at | red: the adapter is below half a step everywhere |
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.anatomy import GROUPS
from pytest_qvl.preflight.commands import pytest_line, red
from pytest_qvl.preflight.findings import Finding, some
from pytest_qvl.preflight.questions.merge_files import HARDLY_TRAINED, SERVE, UNMERGED
from pytest_qvl.preflight.survey import pooled
from pytest_qvl.preflight.timing import one_thread

if TYPE_CHECKING:
    from pytest_qvl.preflight.rounding import Loss
    from pytest_qvl.preflight.subject import Subject
    from pytest_qvl.preflight.survey import Surveyed

NUMBER = 7
_red = partial(red, NUMBER)
_BF16 = "bf16"
_AFTER, _IN_PLACE = "nf4-after-bf16", "nf4-in-place"


def answer(subject: Subject) -> Iterator[Finding]:
    """What a merge will keep; of a merged checkpoint what it did."""
    subject.saved_adapter()
    if subject.asked.merged is not None and subject.merged is None:
        raise CannotJudge("the merged checkpoint is not read (question 0)")
    if not subject.updates.pairs and subject.asked.merged is None:
        raise CannotJudge("no module has A and B that can be merged")
    if not subject.weights:
        raise CannotJudge("base weights are not here: give a folder with them")
    if subject.asked.merged is not None:
        from pytest_qvl.preflight.questions.merge_proof import judge

        with one_thread():
            yield from judge(subject)
    else:
        with one_thread():
            yield _predicted(subject)
        if lonely := subject.lonely_biases:
            yield Finding(
                NUMBER, "cannot-merge", "not judged",
                f"no merge was given to judge, and PEFT refuses to make one: {len(lonely)} biases of B (lora_bias) "
                f"have no bias to be added to: {some(lonely)}", fix=SERVE,
            )  # fmt: skip


def _predicted(subject: Subject) -> Finding:
    surveyed = [each for each in subject.survey.values() if _BF16 in each.losses]
    if not surveyed:
        reasons = "; ".join(subject.updates.not_at_hand)
        raise CannotJudge(reasons or "no adapted weight has an update that is finite and not zero")
    loss = pooled(surveyed, _BF16)
    said = _said(loss)
    if not any(each.losses[_BF16].changed for each in surveyed):
        strength = statistics.median(each.strength.value for each in surveyed)
        return _red(
            subject, "merge-changes-nothing",
            f"a bf16 merge changes no weight in {len(surveyed)} modules: ΔW is below half a step of every weight that "
            f"was looked at (norm(ΔW)/norm(W) is {strength:.1e} in the median)",
            cause=HARDLY_TRAINED,
            fix=f"see that it does anything at all; {UNMERGED}",
        )  # fmt: skip
    notes = (_by_group(surveyed), *_in_four_bits(surveyed), _least(surveyed))
    if loss.error**2 > 0.5:
        return Finding(
            NUMBER, "merge-would-lose", "not judged",
            f"no merge was given to judge, but a bf16 merge would lose more of ΔW than it keeps: {said}",
            cause="most of ΔW is below half a step of the weights it is added to", fix=UNMERGED,
            keeps_green=pytest_line(subject), notes=notes,
        )  # fmt: skip
    return Finding(NUMBER, "survives", "green", f"a bf16 merge keeps ΔW: {said}",
                   keeps_green=pytest_line(subject), notes=notes)  # fmt: skip


def _said(loss: Loss) -> str:
    return (
        f"{_percent(loss.kept, loss.kept_error)} along its direction, {1 - loss.error**2:.0%} of its energy; the error "
        f"is {_number(loss.error, loss.error_error)} times ΔW, and {loss.changed:.0%} of the weights change"
    )


def _percent(value: float, error: float) -> str:
    return f"{value:.1%}" + (f" ± {error:.1%}" if error else "")


def _number(value: float, error: float) -> str:
    return f"{value:.3g}" + (f" ± {error:.1g}" if error else "")


def _by_group(surveyed: Sequence[Surveyed]) -> str:
    found = []
    for group in GROUPS:
        if of_group := [each for each in surveyed if each.group == group]:
            found.append(f"{group} {pooled(of_group, _BF16).kept:.1%} in {len(of_group)} modules")
    return f"kept by a bf16 merge: {', '.join(found)}"


def _least(surveyed: Sequence[Surveyed]) -> str:
    least = sorted(surveyed, key=lambda each: each.losses[_BF16].kept)[:3]
    said = ", ".join(f"{each.module} {_percent(*each.losses[_BF16][:2])}" for each in least)
    return f"least is kept in {said}"


def _in_four_bits(surveyed: Sequence[Surveyed]) -> Iterator[str]:
    """What packing in NF4 does, of the language backbone, which is what is packed."""
    language = [each for each in surveyed if each.group == "language"]
    words = {
        _AFTER: "merged in bf16 and quantized to NF4 afterwards",
        _IN_PLACE: "merged into the 4-bit model (PEFT's merge_and_unload of Linear4bit)",
    }
    for method, how in words.items():
        if any(method in each.losses for each in language):
            loss = pooled(language, method)
            yield (
                f"{how}: {_percent(loss.kept, loss.kept_error)} along ΔW's direction, and an error of "
                f"{_number(loss.error, loss.error_error)} times ΔW besides"
            )
