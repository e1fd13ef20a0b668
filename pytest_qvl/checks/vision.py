"""The vision tower and its merger still say what they said in full precision, with room to spare."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.activations import Peak, Peaks, leaves, watched
from pytest_qvl.checks.support.not_finite import origin_in
from pytest_qvl.checks.support.rounding import rounded_sums
from pytest_qvl.checks.support.scoring import chunks, coarsest_dtype
from pytest_qvl.checks.support.tower import TOWER, DriftsSeen, TowerOutput, drifts, tower_output
from pytest_qvl.checks.support.windows import Seen, judge_windows
from pytest_qvl.evidence import CannotJudge, Evidence, InputError, Judge
from pytest_qvl.models.adapters import adapted_layers
from pytest_qvl.models.anatomy import Parts, anatomy
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

    Four promises, over all images of `samples`, through the vision tower alone:

    *Finite.* Every element of what goes into the merger and what comes out of it; the first module whose
    output is not finite is named.

    *Headroom.* No module of the tower puts out more than half of what its dtype can hold. In float16 that is
    32,752. Activations of the tower's last blocks differ between images of one kind by well under a factor
    of two, so probes that stay below half leave room for images that are not among them; the float16
    overflow of Qwen2.5-VL-3B (one ``down_proj`` of block 31, ggml-org/llama.cpp#17534; its sign is a reply of
    nothing but "!", huggingface/transformers#33294) exceeds 65,504 on few images, but comes near it on
    most.

    *Windows.* In a family with window attention (Qwen2.5-VL) each vision block attends where the configuration
    says: within its window, or over the whole image. Judged bitwise on the image with most windows, first and last
    window, without a reference (:mod:`pytest_qvl.checks.support.windows`). On images of a single window nothing tells
    the two kinds of block apart, neither this nor the drift from the reference: where there is no other image the check
    does not pass.

    *Unchanged.* Rows move no further from the reference than rounding explains, measured as ``|x - r| / |r|``
    (Euclidean): as the root mean square over all rows, which sees a loss of precision anywhere in the tower,
    and for the worst row, which sees local damage. The reference records how far rows move when every leaf
    module of the tower is off by one unit in the last place. A block rounds in about 13 places, with a root
    mean square of ``eps / (2 * sqrt(3))`` each; the perturbation adds ``eps`` in 8 of them. So the response
    to it is ``sqrt(8 / (13 / 12)) = 2.7`` times the rounding error of one pass and 1.9 times the difference of two
    (measured: 1.6 to 4 times, tower depths 4 and 32). The limits are 1.5 times the response for the root mean
    square, which varies little, and twice the response for the worst row: some three and four times what
    healthy passes differ by. Where the two passes compute in different dtypes the response scales with the
    coarser ``eps``, and where that is float32, whose partial sums are rounded too, with
    :func:`pytest_qvl.checks.support.rounding.rounded_sums`. No limit lies below the coarser ``eps``: a row whose every
    element is one step off has moved by ``eps`` of its length at most, and that is the least that another
    rounding can do to it, however little the response. All limits are capped at 0.1: storing weights as NF4
    alters them by 0.09 of their norm (the relative error of NF4 with block 64 on normal weights), so beyond the
    cap four bits could hide. A tower whose linears are all NF4 drifts by two to twelve times its response; a
    single NF4 layer can stay below, and is what the quantization census is for.

    Where both passes run the same kernels, the 16-bit tower of a quantized model is bitwise that of the
    full-precision one, and the drift is exactly 0 (always seen on the CPU). A GPU may choose another kernel
    for the second model, and k-bit preparation casts the tower to float32: that is what rounding is left room
    for.

    Args:
        model: Wrapped or not.
        processor: Its processor.
        samples: Probes; those without images are passed over.
        reference: From :func:`pytest_qvl.checks.support.reference.record_reference`; None judges finiteness and
            headroom only.

    Returns:
        Evidence with the drift at both stages, the peak, and the number of images and of attention windows.

    Raises:
        CheckFailed: A promise is broken.
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

    own, theirs = coarsest_dtype(parts, TOWER), getattr(torch, reference.vision_dtype)
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
