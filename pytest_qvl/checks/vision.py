"""The vision tower and its merger still say what they said in full precision, with room to spare."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.activations import Peak, Peaks, leaves, watched
from pytest_qvl.checks.support.not_finite import origin_in
from pytest_qvl.checks.support.rounding import rounded_sums
from pytest_qvl.checks.support.scoring import chunks
from pytest_qvl.checks.support.tower import DriftsSeen, TowerOutput, drifts, tower_dtype, tower_output
from pytest_qvl.checks.support.windows import Seen, judge_windows
from pytest_qvl.evidence import CannotJudge, Evidence, InputError, Judge
from pytest_qvl.models.adapters import adapted_layers
from pytest_qvl.models.anatomy import TOWER, Parts, anatomy
from pytest_qvl.models.quantized import dtype_name, linear_states
from pytest_qvl.models.state import preserved
from pytest_qvl.samples import Sample, make_batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from pytest_qvl.checks.support.reference import Reference

RMS_FACTOR = 1.5
ROW_FACTOR = 2.0
DRIFT_CAP = 0.1
HEADROOM = 0.5
STAGES = ("before the merger", "merger output")
PEAKS_SHOWN = 5


@check(promise=7, needs=("knowledge",))
def vision_stability(model: Any, processor: Any, samples: Sequence[Sample], reference: Reference | None) -> Evidence:
    """The images' features are finite, far from overflow, and those of the full-precision pass.

    Judged over all images of `samples`, through the vision tower alone:

    ============================== ================================================ ==============================
    judged                         limit                                            derived in
    ============================== ================================================ ==============================
    elements not finite            0; the first module with one is named
    highest activation             half of the largest number of its dtype          docs/limits.md#headroom
    attention windows of a block   bitwise, on the image with most windows          docs/limits.md#attention-windows
    row's distance, rms over rows  1.5 times the tower's response to rounding       docs/limits.md#tower-drift
    row's distance, worst row      2 times the same; both 0.1 at most               docs/limits.md#tower-drift
    ============================== ================================================ ==============================

    The distance of a row is ``|x - r| / |r|`` (Euclidean, float64) from its row in the reference, before and after the
    merger. It is exactly 0 where both passes run the same kernels, as on the CPU. In a family with windows the check
    does not pass where every image is a single window: nothing tells the two kinds of block apart there.

    Args:
        model: Wrapped or not.
        processor: Its processor.
        samples: Probes; those without images are passed over.
        reference: From :func:`pytest_qvl.checks.support.reference.record_reference`; None judges all but the distances.

    Returns:
        Evidence with the drift at both stages, the peak, and the number of images and of attention windows.

    Raises:
        CheckFailed: A limit is exceeded.
        CannotJudge: No sample has an image, each is a single attention window of a model that has windows, or full
            precision is not finite on one either.
        ValueError: The reference was recorded for other samples.
    """
    import torch

    with_images = [sample for sample in samples if sample.images]
    if not with_images:
        raise CannotJudge("no sample has an image: there are no visual features to judge")
    parts = anatomy(model)
    judge = Judge("vision_stability", "vision tower and merger keep their features")
    if reference is not None and reference.caveat:
        judge.note(reference.caveat)
    seen, broken = (DriftsSeen(), DriftsSeen()), []
    images: list[Seen] = []
    modules = [*leaves(parts.vision_tower), *parts.blocks]
    with preserved(model, training=False), watched(parts, modules) as peaks:
        for group in chunks(with_images):
            batch = make_batch(processor, group, device=parts.device)
            grids = iter(batch["image_grid_thw"].tolist())
            outputs = iter(tower_output(parts, batch))
            for sample in group:
                recorded = None if reference is None else reference.probe(sample).tower
                for image in range(len(sample.images)):
                    output, name = next(outputs), f"sample {sample.id!r}, image {image}"
                    images.append(Seen(name, sample.images[image], tuple(next(grids))))
                    if not output.finite:
                        broken.append(name)
                    elif recorded is not None:
                        _compare(seen, output, recorded[image], name)
    _judge_finite(judge, parts, broken, peaks)
    _judge_headroom(judge, [peak for peak in peaks.listed() if peak.finite])
    undecided = None
    if not broken:
        with preserved(model, training=False), torch.no_grad():
            undecided = judge_windows(judge, parts, processor, images)
    if reference is None:
        judge.note("features were not compared with full precision: no reference")
    elif not broken:
        _judge_drift(judge, parts, seen, reference)
    judge.report("images", sum(len(sample.images) for sample in with_images))
    if undecided and not judge.problems:
        raise CannotJudge(undecided)
    highest = sorted(peaks.listed(), key=lambda peak: -_share(peak))[:PEAKS_SHOWN]
    return judge.verdict(("module", "peak", "share of dtype max"), ((p.module, p.value, _share(p)) for p in highest))


def _share(peak: Peak) -> float:
    return peak.value / peak.dtype_max if peak.finite else math.inf


def _compare(seen: tuple[DriftsSeen, DriftsSeen], output: TowerOutput, recorded: TowerOutput, name: str) -> None:
    if not recorded.finite:
        raise CannotJudge(
            f"features of {name} are not finite in full precision either: record the reference in bfloat16"
        )
    if output.rows != recorded.rows:
        raise InputError(
            f"{name} has {output.rows[1][-1] + 1} visual tokens, but {recorded.rows[1][-1] + 1} in the "
            "reference: it was recorded with another processor"
        )
    for stage, drift, rows in zip(seen, drifts(output, recorded), output.rows, strict=True):
        stage.take(drift, name, rows)


def _judge_finite(judge: Judge, parts: Parts, broken: list[str], peaks: Peaks) -> None:
    judge.equal(
        "images whose features are not finite",
        len(broken),
        0,
        else_say=f"visual features are not finite on {', '.join(broken[:3])}" + origin_in(parts, peaks),
    )


def _judge_headroom(judge: Judge, peaks: list[Peak]) -> None:
    if not peaks:
        return
    top = max(peaks, key=_share)
    judge.at_most(
        "highest activation / largest number of its dtype",
        _share(top),
        HEADROOM,
        else_say=f"{top.module} reaches {top.value:.6g} of {top.dtype_max:.6g}: other images can overflow "
        "it to infinity; compute this part in bfloat16 or float32",
    )
    largest, half_max = max(peaks, key=lambda peak: peak.value), 65504.0
    if largest.dtype_max > half_max and largest.value > HEADROOM * half_max:
        judge.note(
            f"{largest.module} reaches {largest.value:.6g}: this tower would overflow, or nearly, in float16 "
            f"(largest number {half_max:,.0f}), the 16-bit dtype of cards before compute capability 8.0"
        )


def drift_limit(rounding: float, dtype: torch.dtype) -> float:
    """How far a row may move, relative to its length: as `rounding` explains, 0.1 at most, one step at least."""
    import torch

    return max(min(rounding, DRIFT_CAP), torch.finfo(dtype).eps)


def _judge_drift(judge: Judge, parts: Parts, seen: tuple[DriftsSeen, DriftsSeen], reference: Reference) -> None:
    import torch

    own, theirs = tower_dtype(parts), getattr(torch, reference.vision_dtype)
    coarser = max((own, theirs), key=lambda dtype: torch.finfo(dtype).eps)
    scale = torch.finfo(coarser).eps / torch.finfo(theirs).eps
    terms = max(state.in_features for state in linear_states(parts) if state.group in TOWER)
    scale *= rounded_sums(coarser, terms)
    cause = _cause(parts)
    for stage, response, found in zip(STAGES, reference.ulp_response, seen, strict=True):
        now = found.drift()
        for name, value, expected, factor in (
            (f"drift {stage}, rms", now.rms, response.rms, RMS_FACTOR),
            (f"drift {stage}, worst row", now.row, response.row, ROW_FACTOR),
        ):
            judge.at_most(
                name,
                value,
                drift_limit(factor * scale * expected, coarser),
                else_say=f"visual features {stage} moved away from {reference.source}, furthest at "
                f"{found.where} (tower in {dtype_name(own)}){cause}",
            )


def _cause(parts: Parts) -> str:
    states = [state for state in linear_states(parts) if state.group in TOWER]
    quantized = [state for state in states if state.is_quantized]
    if quantized:
        return (
            f": {len(quantized)} of {len(states)} linears of tower and merger are quantized "
            f"(first: {quantized[0].name}, {quantized[0].storage})"
        )
    adapted = [name for name in adapted_layers(parts) if parts.group_of(name) in TOWER]
    if adapted:
        return f": {len(adapted)} layers of tower and merger carry an adapter (first: {adapted[0]})"
    return ": its weights are not those of the reference, or its inputs or kernels differ"
