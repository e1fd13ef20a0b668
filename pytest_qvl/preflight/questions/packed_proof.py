"""Question 7 with ``--merged`` in 4 bits: how much of ΔW the codes hold, and how it was merged.

Of each weight the share of ΔW along its direction is measured over all elements. What quantization adds to it has the
standard deviation ``sqrt(dd / (numel uu))``: noise of D's size in each of its elements, without any relation to ΔW. A
share is below one half, or above one and a half, if it is so by four of them; a weight of which they are wider than an
eighth is not judged.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pytest_qvl.preflight.commands import pytest_line
from pytest_qvl.preflight.findings import Finding, some
from pytest_qvl.preflight.packed_merge import WAYS, PackedProof, kept, prove_packed
from pytest_qvl.preflight.questions.merge_files import AGAIN, NOT_FOUND, OTHER_FACTOR, SERVE, Case

if TYPE_CHECKING:
    from pytest_qvl.preflight.merged import Place
    from pytest_qvl.preflight.updates import Update

NUMBER = 7
_HALF, _SURE = 0.5, 4.0  # standard deviations


def in_four_bits(case: Case, work: Sequence[tuple[Update, tuple[Place, Place]]]) -> Iterator[Finding]:
    """What is to be said of adapted weights that the merged checkpoint stores in 4 bits.

    Raises:
        ModelSourceError: A file has become shorter, or a quantization state is not what bitsandbytes writes.
    """
    import torch

    with torch.no_grad():
        proofs = [prove_packed(update, update.factors(), *places) for update, places in work]
    proofs = [proof for proof in proofs if 0 < proof.uu < math.inf]
    sure = [proof for proof in proofs if _SURE * _deviation(proof) < _HALF]
    low = [proof for proof in sure if _share(proof) + _SURE * _deviation(proof) < _HALF]
    high = [proof for proof in sure if _share(proof) - _SURE * _deviation(proof) > 1 + _HALF]
    if len(sure) < len(work):
        yield Finding(
            NUMBER, "packed-merge", "not judged",
            f"ΔW is too faint in {len(work) - len(sure)} of {len(work)} weights in 4 bits to be told from the noise of "
            "quantization: give the 16-bit checkpoint that was packed",
        )  # fmt: skip
    if low:
        yield _lost(case, low, len(sure))
    if high:
        yield case.red(
            "merge-scaled", f"{len(high)} of {len(sure)} adapted weights in 4 bits hold {kept(high):.3g} times ΔW: "
            f"{some(proof.module for proof in high)}",
            cause=OTHER_FACTOR,
        )  # fmt: skip
    if sure and not low and not high:
        yield Finding(
            NUMBER, "packed-merge", "green",
            f"{len(sure)} adapted weights in 4 bits hold {kept(sure):.1%} of ΔW along its direction, beside the noise "
            f"of quantization ({_ways(sure)})", keeps_green=pytest_line(case.subject),
        )  # fmt: skip


def _lost(case: Case, low: Sequence[PackedProof], whole: int) -> Finding:
    line = f"{len(low)} of {whole} adapted weights in 4 bits hold {kept(low):.1%} of ΔW"
    names = some(proof.module for proof in low)
    if sum(proof.way == "in place" for proof in low) * 2 > len(low):
        return case.red(
            "merge-lost-most", f"{line}, {WAYS['in place']}: {names}",
            cause="PEFT's merge_and_unload of a Linear4bit packs the sum into NF4 again, whose steps are so wide that "
            "most weights stay where they stand",
            fix=f"{AGAIN}, and quantize that; or {SERVE}",
        )  # fmt: skip
    return case.red(
        "not-merged", f"{line}, and are the base's: {names}",
        cause=NOT_FOUND,
    )  # fmt: skip


def _ways(proofs: Sequence[PackedProof]) -> str:
    counts = Counter(WAYS.get(proof.way, "by neither way that is known here") for proof in proofs)
    return ", ".join(f"{count} {way}" for way, count in counts.items())


def _share(proof: PackedProof) -> float:
    return proof.du / proof.uu


def _deviation(proof: PackedProof) -> float:
    return math.sqrt(proof.dd / (proof.numel * proof.uu))
