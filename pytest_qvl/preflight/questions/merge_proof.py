"""Question 7 with ``--merged``: does the checkpoint hold the adapter, and is all else as it was in the base?

Names and shapes by the headers, then every value (:mod:`pytest_qvl.preflight.merged`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.anatomy import GROUPS
from pytest_qvl.preflight.commands import pytest_line, red
from pytest_qvl.preflight.files.values import FLOATS
from pytest_qvl.preflight.findings import Finding, some
from pytest_qvl.preflight.merged import Place, Proof, outside_cells, packed_before, prove, total
from pytest_qvl.preflight.questions.merge_files import AGAIN, UNMERGED, Case, Rest, head_of, names_of
from pytest_qvl.preflight.survey import weight_name
from pytest_qvl.preflight.updates import BiasUpdate
from pytest_qvl.preflight.weights import Weights

if TYPE_CHECKING:
    from pytest_qvl.preflight.subject import Subject
    from pytest_qvl.preflight.updates import Update

NUMBER = 7
MOST_THREADS = 4  # each holds a few MiB


def judge(subject: Subject) -> Iterator[Finding]:
    """Everything that is to be said of the merged checkpoint.

    Raises:
        ModelSourceError: A file has become shorter.
        CannotJudge: It holds no weights, or such as are packed in 4 bits.
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
    wrong = [*names_of(case), *head_of(case)]
    yield from wrong
    if packed := [name for name in case.found if case.there.is_packed(name)]:
        yield Finding(
            NUMBER, "packed-merge", "not judged",
            f"{len(packed)} weights of the merged checkpoint are packed in 4 bits ({case.group(packed)}), which hides "
            "ΔW below their steps: give the 16-bit checkpoint that was packed",
        )  # fmt: skip
    rest = Rest(case)
    changed = list(rest.findings())
    yield from changed
    yield from _adapted(case, rest, spotless=not wrong and not changed)


@dataclass(frozen=True)
class _Judged:
    """One adapted weight: what was found, and what that means."""

    update: Update
    proof: Proof
    verdict: str
    places: tuple[Place, Place]


def _adapted(case: Case, rest: Rest, *, spotless: bool) -> Iterator[Finding]:
    judged = list(_proofs(case))
    if not judged:
        yield Finding(
            NUMBER, "nothing-merged", "not judged", "no adapted weight of the merged checkpoint can be compared"
        )
        return
    found: dict[str, list[_Judged]] = {}
    for each in judged:
        found.setdefault(each.verdict, []).append(each)
    for verdict, of_verdict in found.items():
        if verdict not in ("merged", "merged-16", "below"):
            yield _misfit(case, verdict, of_verdict, len(judged))
    if len(found.get("below", ())) == len(judged):
        yield case.red(
            "merge-changes-nothing",
            f"the merged weights are the base's: ΔW is below half a step of every weight in all {len(judged)} modules",
            cause="the adapter was hardly trained, or its scaling (lora_alpha / r) is not that of the training",
            fix=UNMERGED,
        )  # fmt: skip
    elif below := [each.proof.module for each in found.get("below", ())]:
        yield Finding(
            NUMBER, "below-every-step", "not judged",
            f"ΔW is below half a step of every weight in {len(below)} of {len(judged)} modules: merged and not "
            f"merged are the same there: {some(below)}",
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


def _proofs(case: Case) -> Iterator[_Judged]:
    """Every adapted weight that both checkpoints have, one to a thread: torch lets go of the interpreter meanwhile."""
    work = list(_comparable(case))
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
        for (update, places), proof in zip(work, threads.map(_prove, work), strict=True):
            if proof.bad or 0 < proof.uu < math.inf:
                yield _Judged(update, proof, _verdict_of(update, proof, places), places)


def _prove(work: tuple[Update, tuple[Place, Place]]) -> Proof:
    import torch

    update, places = work
    torch.set_num_threads(1)  # of this thread
    with torch.no_grad():
        return prove(update, update.factors(), *places)


def _comparable(case: Case) -> Iterator[tuple[Update, tuple[Place, Place]]]:
    subject = case.subject
    for module, update in {**subject.updates.pairs, **subject.updates.biases}.items():
        name = module if module in subject.updates.biases else weight_name(subject, module)
        other = f"{module}.weight" if f"{module}.weight" in case.there else name
        if not name or other not in case.there or not subject.weights.is_numeric(name):
            continue
        if case.there.is_packed(other) or case.there[other].dtype not in FLOATS:
            continue
        if subject.weights.shape(name) == update.shape == case.there.shape(other):
            yield update, (Place(subject.weights, name), Place(case.there, other))


def _verdict_of(update: Update, proof: Proof, places: tuple[Place, Place]) -> str:
    """As :func:`_verdict`; a packed base is compared with what it was packed from, too."""
    verdict, base = _verdict(proof, update), places[0]
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


_NAMES = {
    "unmerged": "not-merged",
    "not-finite": "merge-not-finite",
    "scaled": "merge-scaled",
    "other": "merge-differs",
}


def _misfit(case: Case, verdict: str, judged: Sequence[_Judged], whole: int) -> Finding:
    names = [each.proof.module for each in judged]
    first = judged[0].proof
    line = f"{len(names)} of {whole} adapted weights ({case.group(names)})"
    if verdict == "unmerged":
        return case.red(
            "not-merged", f"{line} are the base's: ΔW is not in them: {some(names)}",
            cause="the merge found no weight by the names of the adapter's keys, or the base was saved in its place",
        )  # fmt: skip
    if verdict == "not-finite":
        return case.red(
            "merge-not-finite", f"{line} hold NaN or infinite values: {some(names)}",
            cause="the adapter has diverged, or a sum left the range of the dtype that it was merged in",
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
            f"{line} are not base plus adapter: {share:.2%} of their values are further off than rounding takes them, "
            f"and {first.kept:.3g} times ΔW is in {first.module}: {some(names)}",
            cause="it was merged into another base, from another checkpoint of the adapter, or changed afterwards",
        )  # fmt: skip
    said = f"{first.kept:.3g} times ΔW" if verdict == "scaled" else f"{verdict} ({first.kept:.3g} times ΔW)"
    return case.red(
        _NAMES.get(verdict, "merge-scaled"), f"{line} hold {said}: {some(names)}",
        cause="the merge multiplied ΔW by another number than alpha / r" if verdict == "scaled" else verdict,
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
