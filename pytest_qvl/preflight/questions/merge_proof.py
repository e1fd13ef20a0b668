"""Question 7 with ``--merged``: does the checkpoint hold the adapter, and is all else as it was in the base?

Names and shapes by the headers, then every value (:mod:`pytest_qvl.preflight.merged`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.anatomy import GROUPS
from pytest_qvl.preflight.commands import pytest_line, red
from pytest_qvl.preflight.findings import Finding, some
from pytest_qvl.preflight.merged import Place, Proof, outside_cells, prove, total
from pytest_qvl.preflight.packed_merge import packed_before
from pytest_qvl.preflight.questions.merge_files import (
    AGAIN,
    HARDLY_TRAINED,
    NOT_FOUND,
    OTHER_FACTOR,
    UNMERGED,
    Case,
    Rest,
    lonely_biases,
    names_of,
    odd_of,
)
from pytest_qvl.preflight.questions.merge_settings import head_of, settings_of
from pytest_qvl.preflight.questions.packed_proof import in_four_bits
from pytest_qvl.preflight.starts import CONVERT
from pytest_qvl.preflight.survey import weight_name
from pytest_qvl.preflight.timing import each_in_a_thread
from pytest_qvl.preflight.updates import BiasUpdate
from pytest_qvl.preflight.weights import Weights

if TYPE_CHECKING:
    from pytest_qvl.preflight.subject import Subject
    from pytest_qvl.preflight.updates import Update

NUMBER = 7


def judge(subject: Subject) -> Iterator[Finding]:
    """Everything that is to be said of the merged checkpoint.

    Raises:
        ModelSourceError: A file has become shorter.
        CannotJudge: It holds no weights, or the base or it is packed in FP4.
    """
    checkpoint = subject.merged
    assert checkpoint is not None
    case = Case(subject, checkpoint, Weights(checkpoint.tensors))
    if not case.there:
        raise CannotJudge(f"{checkpoint.label} has no weight files")
    if checkpoint.family != subject.base.family:
        yield case.red(
            "other-model", f"the merged checkpoint is {checkpoint.family}, the base {subject.base.family}",
            cause="these are two models", fix="give the base that the adapter was merged into",
        )  # fmt: skip
        return
    wrong = [*names_of(case), *settings_of(case), *head_of(case), *odd_of(case), *lonely_biases(case)]
    yield from wrong
    rest = Rest(case)
    changed = list(rest.findings())
    yield from changed
    work = _work(case)
    for reason, names in work.left_out.items():
        yield Finding(
            NUMBER, "not-compared", "not judged",
            f"{len(names)} of {len(names) + len(work.compared)} adapted weights are not compared: {reason}: "
            f"{some(names)}",
        )  # fmt: skip
    if work.packed:
        yield from in_four_bits(case, work.packed)
    if work.compared:
        whole = not (wrong or changed or work.left_out or work.packed)
        yield from _adapted(case, rest, work, spotless=whole)
    elif not work.packed:
        yield Finding(
            NUMBER, "nothing-merged", "not judged", "no adapted weight of the merged checkpoint can be compared"
        )


@dataclass(frozen=True)
class _Judged:
    """One adapted weight: what was found, and what that means."""

    update: Update
    proof: Proof
    verdict: str
    places: tuple[Place, Place]


def _adapted(case: Case, rest: Rest, work: _Work, *, spotless: bool) -> Iterator[Finding]:
    judged = list(_proofs(work))
    found: dict[str, list[_Judged]] = {}
    for each in judged:
        found.setdefault(each.verdict, []).append(each)
    for verdict, of_verdict in found.items():
        if verdict not in ("merged", "merged-16", "below", "unsure"):
            yield _misfit(case, verdict, of_verdict, len(judged))
    if len(found.get("below", ())) == len(judged):
        yield case.red(
            "merge-changes-nothing",
            f"the merged weights are the base's: ΔW is below half a step of every weight in all {len(judged)} modules",
            cause=HARDLY_TRAINED,
            fix=UNMERGED,
        )  # fmt: skip
    elif below := [each.proof.module for each in found.get("below", ())]:
        yield Finding(
            NUMBER, "below-every-step", "not judged",
            f"ΔW is below half a step of every weight in {len(below)} of {len(judged)} modules: merged and not "
            f"merged are the same there: {some(below)}",
        )  # fmt: skip
    if "unsure" in found:
        names = [each.proof.module for each in found["unsure"]]
        yield Finding(
            NUMBER, "start-unsure", "not judged",
            f"what the start took out of {len(names)} weights is not determined well enough (the singular values on "
            f"both sides of rank r are alike in float32): {some(names)}", fix=CONVERT,
        )  # fmt: skip
    if "merged-16" in found:
        of_verdict = found["merged-16"]
        yield Finding(
            NUMBER, "merged-16-bit", "green",
            f"{len(of_verdict)} weights are ΔW on 16-bit weights of which the base that was given is the 4-bit form: "
            "less ΔW, every value is packed into the base's code; give the 16-bit base to see more than NF4 shows",
            keeps_green=pytest_line(case.subject),
        )  # fmt: skip
    if "merged" in found:
        yield _survived(case, rest, [each.proof for each in found["merged"]], spotless and len(found) == 1)


def _proofs(work: _Work) -> Iterator[_Judged]:
    """Every adapted weight that both checkpoints have."""
    for (update, places), proof in zip(work.compared, each_in_a_thread(_prove, work.compared), strict=True):
        yield _Judged(update, proof, _verdict_of(update, proof, places), places)


def _prove(work: tuple[Update, tuple[Place, Place]]) -> Proof:
    import torch

    update, places = work
    with torch.no_grad():
        return prove(update, update.factors(), *places)


class _Work(NamedTuple):
    """What is compared, and what is not.

    Attributes:
        compared: Every update whose weight both checkpoints have as floating point, or the base in 4 bits, with both
            places.
        packed: Those whose weight the merged checkpoint has in 4 bits.
        left_out: Adapted weights that cannot be compared, by the reason.
    """

    compared: list[tuple[Update, tuple[Place, Place]]]
    packed: list[tuple[Update, tuple[Place, Place]]]
    left_out: dict[str, list[str]]


def _work(case: Case) -> _Work:
    subject = case.subject
    work = _Work([], [], {})
    for module, reason in case.unread.items():
        work.left_out.setdefault(f"the adapter's tensors are not read there: {reason}", []).append(module)
    for module, update in {**subject.updates.pairs, **subject.updates.biases}.items():
        if module in subject.lonely_biases:
            continue  # said by itself
        name = module if module in subject.updates.biases else weight_name(subject, module)
        other = f"{module}.weight" if f"{module}.weight" in case.there else name
        if name and other not in case.there:
            continue  # said by its name: dropped
        reason = update.unknown or _why_not_compared(case, update, name, other)
        if reason:
            work.left_out.setdefault(reason, []).append(module)
        else:
            kind = work.packed if case.there.is_packed(other) else work.compared
            kind.append((update, (Place(subject.weights, name), Place(case.there, other))))
    return work


def _why_not_compared(case: Case, update: Update, name: str, other: str) -> str:
    """Why the weight of an update cannot be compared; empty if it can."""
    before, there = case.subject.weights, case.there
    if not name:
        return "the base has no such tensor"
    if not before.is_numeric(name):
        return f"the base stores it as {before[name].dtype}"
    if not there.is_numeric(other):
        return f"the merged checkpoint stores it as {there[other].dtype}"
    shapes = before.shape(name), update.shape, there.shape(other)
    return "" if len(set(shapes)) == 1 else f"its shape is {list(shapes[2])}, the base's {list(shapes[0])}"


def _verdict_of(update: Update, proof: Proof, places: tuple[Place, Place]) -> str:
    """As :func:`_verdict`; a packed base is compared with what it was packed from, too."""
    verdict, base = _verdict(proof, update), places[0]
    if update.start is not None and not proof.numel * update.start.taken.error**2 < proof.uu:
        return "unsure"
    if verdict == "other" and update.start is not None:
        return "start-left-in" if not _prove((replace(update, start=None), places)).outside else verdict
    if update.magnitude is not None and verdict not in _SURE:
        plain = _prove((replace(update, magnitude=None), places))
        return "magnitude-left-out" if not plain.outside else verdict
    if verdict != "other" or update.magnitude is not None or not base.weights.is_packed(base.name):
        return verdict
    if not outside_cells(update.factors(), *places):
        return "merged-16"
    return verdict if outside_cells(None, *places) else "unmerged"


def _verdict(proof: Proof, update: Update) -> str:
    if proof.bad:
        return "not-finite"
    if not proof.outside:
        return "below" if proof.is_unchanged else "merged"
    if proof.is_unchanged or proof.is_multiple(0.0):
        return "unmerged"
    for multiple, words in _multiples(update).items():
        if proof.is_multiple(multiple):
            return words
    return "scaled" if proof.is_multiple(proof.kept) else "other"


def _multiples(update: Update) -> dict[float, str]:
    """What a merge that went wrong in a known way makes of ΔW."""
    rank, scaling = float(update.rank), update.scaling
    known = [
        (2.0, "merged twice"),
        (3.0, "merged three times"),
        (-1.0, "subtracted in place of added"),
        (rank, "scaled by alpha in place of alpha / r"),
        (1 / scaling, "merged without its scaling"),
        (math.sqrt(rank), "scaled by alpha / sqrt(r), as rsLoRA's, in place of alpha / r"),
        (1 / math.sqrt(rank), "scaled by alpha / r in place of rsLoRA's alpha / sqrt(r)"),
    ]
    found: dict[float, str] = {}
    for multiple, words in known:
        found[multiple] = f"{found[multiple]}, or {words}" if multiple in found else words
    return found


# Verdicts that need no second look, and of those that need no figures: name, words behind the count, cause.
_SURE = ("merged", "below", "unmerged", "not-finite")
_PLAIN = {
    "unmerged": (
        "not-merged",
        "are the base's: ΔW is not in them",
        NOT_FOUND,
    ),
    "not-finite": (
        "merge-not-finite",
        "hold NaN or infinite values",
        "the adapter has diverged, or a sum left the range of the dtype that it was merged in",
    ),
    "magnitude-left-out": (
        "magnitude-left-out",
        "hold W + s B A, as of a plain LoRA, without DoRA's magnitudes",
        "what merged it took no notice of use_dora and of the file's lora_magnitude_vector",
    ),
}


def _misfit(case: Case, verdict: str, judged: Sequence[_Judged], whole: int) -> Finding:
    names = [each.proof.module for each in judged]
    first = judged[0].proof
    line = f"{len(names)} of {whole} adapted weights ({case.group(names)})"
    if verdict in _PLAIN:
        name, words, cause = _PLAIN[verdict]
        return case.red(name, f"{line} {words}: {some(names)}", cause=cause)
    if verdict == "start-left-in":
        return case.red(
            "start-left-in",
            f"{line} hold W + s B A and not W - P + s B A: what the adapter's start took out of the base is still in "
            f"them: {some(names)}",
            cause=f"init_lora_weights is {case.subject.saved_adapter().init!r}, and what merged it took A and B for "
            "plain LoRA",
            fix=f"merge with PEFT, which takes that part out when it loads the adapter, or {CONVERT}",
        )  # fmt: skip
    if verdict == "other":
        weights = [each for each in judged if not isinstance(each.update, BiasUpdate)]
        smallest = min(weights or judged, key=lambda each: each.proof.numel)
        packed = packed_before(smallest.update.factors(), *smallest.places)
        if packed:
            return case.red(
                "merged-into-packed",
                f"{line} hold ΔW on top of a base that was quantized to {packed} and unpacked (shown on "
                f"{smallest.proof.module}): the step of 4 bits stays in 16-bit weights",
                cause="the base was loaded in 4 bits for the merge",
                fix=f"{AGAIN}; if it is meant, because the adapter was trained on it, give the 4-bit folder as BASE",
            )  # fmt: skip
        share = sum(each.proof.outside for each in judged) / sum(each.proof.numel for each in judged)
        return case.red(
            "merge-differs",
            f"{line} are not base plus adapter: {share:.2%} of their values are further off than rounding takes them"
            f"{f', and {first.kept:.3g} times ΔW is in {first.module}' if first.uu else ''}: {some(names)}",
            cause="it was merged into another base, from another checkpoint of the adapter, or changed afterwards",
        )  # fmt: skip
    said = f"{first.kept:.3g} times ΔW" if verdict == "scaled" else f"{verdict} ({first.kept:.3g} times ΔW)"
    return case.red(
        "merge-scaled", f"{line} hold {said}: {some(names)}",
        cause=OTHER_FACTOR if verdict == "scaled" else verdict,
    )  # fmt: skip


def _survived(case: Case, rest: Rest, proofs: list[Proof], spotless: bool) -> Finding:
    kept, error = total(proofs)
    of_group = {g: [p for p in proofs if p.group == g] for g in GROUPS}
    by_group = ", ".join(f"{group} {total(of)[0]:.1%}" for group, of in of_group.items() if of)
    least = sorted(proofs, key=lambda proof: proof.kept)[:3]
    notes = (
        f"kept by group: {by_group}",
        f"least is kept in {', '.join(f'{proof.module} {proof.kept:.1%}' for proof in least)}",
    )
    said = (
        f"{len(proofs)} weights hold ΔW, each of {sum(proof.numel for proof in proofs):,} values within rounding; "
        f"{kept:.1%} of it was kept along its direction, {1 - error**2:.0%} of its energy (error {error:.3g} times ΔW)"
    )
    if error**2 > 0.5:
        return red(
            NUMBER, case.subject, "merge-lost-most", said,
            cause="most of ΔW is below half a step of the weights it was added to",
            fix=UNMERGED, notes=notes,
        )  # fmt: skip
    others = f"; {len(rest.same)} other tensors are the base's bit for bit ({case.group(rest.same)})"
    others += f", {len(rest.wider)} in a wider dtype" if rest.wider else ""
    others += f", {len(rest.unpacked)} are packed into its 4-bit codes" if rest.unpacked else ""
    others += f", {len(rest.copies)} are the trained copies" if rest.copies else ""
    return Finding(
        NUMBER, "merged" if spotless else "merged-in-part", "green", said + others,
        keeps_green=pytest_line(case.subject), notes=notes,
    )  # fmt: skip
