"""The vision tower and its merger still say what they said in full precision, with room to spare."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.activations import Peak, Peaks, leaves, watched
from pytest_qvl.checks.support.not_finite import origin_in
from pytest_qvl.checks.support.rounding import last_place_noise, rounded_sums
from pytest_qvl.checks.support.scoring import chunks, coarsest_dtype
from pytest_qvl.checks.support.windows import Seen, judge_windows
from pytest_qvl.evidence import CannotJudge, Evidence, InputError, Judge
from pytest_qvl.models.adapters import adapted_layers
from pytest_qvl.models.anatomy import Parts, anatomy
from pytest_qvl.models.quantized import dtype_name, linear_states
from pytest_qvl.models.state import preserved
from pytest_qvl.models.taps import vision_features
from pytest_qvl.samples import Sample, make_batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from pytest_qvl.checks.support.reference import Reference
    from pytest_qvl.models.anatomy import Group

ROWS_KEPT = 32
RMS_FACTOR = 1.5
ROW_FACTOR = 2.0
DRIFT_CAP = 0.1
HEADROOM = 0.5
TOWER: tuple[Group, ...] = ("vision", "merger")
STAGES = ("before the merger", "merger output")
PEAKS_SHOWN = 5


@dataclass(frozen=True)
class TowerOutput:
    """Rows of one picture, on the CPU, in the dtype the tower computed.

    Attributes:
        patches: ``(rows, vision hidden)``, what goes into the merger; at most 32 rows, evenly spaced.
        visual_tokens: ``(rows, language hidden)``, what comes out of it; at most 32 rows, evenly spaced.
        rows: Which patches and which visual tokens these are, counted from 0.
        finite: Whether every element of the whole picture was finite at both places.
    """

    patches: torch.Tensor
    visual_tokens: torch.Tensor
    rows: tuple[list[int], list[int]]
    finite: bool


def kept_rows(count: int) -> list[int]:
    """Which of `count` rows are kept: all, or 32 evenly spaced ones that include the first and the last."""
    if count <= ROWS_KEPT:
        return list(range(count))
    return [round(k * (count - 1) / (ROWS_KEPT - 1)) for k in range(ROWS_KEPT)]


def tower_output(parts: Parts, batch: dict[str, torch.Tensor]) -> list[TowerOutput]:
    """Run the vision tower alone on a batch's pictures and keep rows of each, in the batch's order."""
    import torch

    if "pixel_values" not in batch:
        return []
    seen: dict[str, torch.Tensor] = {}

    def before_merger(_module: Any, args: tuple[Any, ...]) -> None:
        seen["patches"] = args[0].detach()

    def after_tower(_module: Any, _args: tuple[Any, ...], output: Any) -> None:
        seen["tokens"] = vision_features(output).detach()

    handles = [
        parts.merger.register_forward_pre_hook(before_merger),
        parts.vision_tower.register_forward_hook(after_tower),
    ]
    try:
        with torch.no_grad():
            parts.core.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    finally:
        for handle in handles:
            handle.remove()
    counts = batch["image_grid_thw"].prod(dim=1).tolist()
    # Window attention permutes patches, but only inside a picture.
    patches = torch.split(seen["patches"].flatten(0, -2), counts)
    tokens = torch.split(seen["tokens"], [count // parts.merge_size**2 for count in counts])
    return [_kept(p, t) for p, t in zip(patches, tokens, strict=True)]


def _kept(patches: torch.Tensor, tokens: torch.Tensor) -> TowerOutput:
    rows = kept_rows(len(patches)), kept_rows(len(tokens))
    finite = bool(patches.isfinite().all() and tokens.isfinite().all())
    return TowerOutput(patches[rows[0]].cpu(), tokens[rows[1]].cpu(), rows, finite)


def row_drift(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Relative distance of each row, ``|one - other| / |other|`` (Euclidean): ``(rows,)``, NaN stays NaN."""
    import torch

    never_zero = torch.finfo(torch.float64).tiny
    length = torch.linalg.vector_norm(other.double(), dim=-1).clamp_min(never_zero)
    drift: torch.Tensor = torch.linalg.vector_norm(one.double() - other.double(), dim=-1) / length
    return drift


@dataclass(frozen=True)
class Drift:
    """How far the rows of many pictures moved at one stage, relative to their own length.

    Attributes:
        rms: Root mean square over rows.
        row: The row that moved most.
    """

    rms: float
    row: float


def ulp_response(parts: Parts, processor: Any, samples: Sequence[Sample]) -> tuple[Drift, Drift]:
    """How far the tower's rows move when every module in it is off by one unit in the last place.

    See :func:`pytest_qvl.checks.support.rounding.last_place_noise`.

    Returns:
        The drift before and after the merger over all pictures; zero without pictures.
    """
    seen = _Seen(), _Seen()
    for group in chunks([s for s in samples if s.images]):
        batch = make_batch(processor, group, device=parts.device)
        plain = tower_output(parts, batch)
        with last_place_noise(leaves(parts.vision_tower)):
            noisy = tower_output(parts, batch)
        for one, other in zip(noisy, plain, strict=True):
            for stage, drift in zip(seen, _drifts(one, other), strict=True):
                stage.take(drift)
    return seen[0].drift(), seen[1].drift()


def _drifts(one: TowerOutput, other: TowerOutput) -> tuple[torch.Tensor, torch.Tensor]:
    return row_drift(one.patches, other.patches), row_drift(one.visual_tokens, other.visual_tokens)


@dataclass
class _Seen:
    """Collects row drifts at one stage and remembers where the largest was."""

    squares: float = 0.0
    rows: int = 0
    largest: float = 0.0
    where: str = "nowhere"

    def take(self, drift: torch.Tensor, name: str = "", rows: Sequence[int] = ()) -> None:
        """Add the ``(rows,)`` drifts of one picture; `rows` says which of the picture's rows they are."""
        self.squares += float(drift.pow(2).sum())
        self.rows += len(drift)
        index = int(drift.nan_to_num(math.inf).argmax())
        if not float(drift[index]) <= self.largest:
            self.largest = float(drift[index])
            self.where = f"{name}, row {rows[index]}" if rows else name

    def drift(self) -> Drift:
        """The summary."""
        return Drift(math.sqrt(self.squares / self.rows) if self.rows else 0.0, self.largest)


@check(promise=7, needs=("knowledge",))
def vision_stability(model: Any, processor: Any, samples: Sequence[Sample], reference: Reference | None) -> Evidence:
    """The pictures' features are finite, far from overflow, and those of the full-precision pass.

    Four promises, over all pictures of `samples`, through the vision tower alone:

    *Finite.* Every element of what goes into the merger and what comes out of it; the first module whose
    output is not finite is named.

    *Headroom.* No module of the tower puts out more than half of what its dtype can hold. In float16 that is
    32,752. Activations of the tower's last blocks differ between pictures of one kind by well under a factor
    of two, so probes that stay below half leave room for pictures that are not among them; the float16
    overflow of Qwen2.5-VL-3B (one ``down_proj`` of block 31, ggml-org/llama.cpp#17534; its sign is a reply of
    nothing but "!", huggingface/transformers#33294) exceeds 65,504 on few pictures, but comes near it on
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
        samples: Probes; those without pictures are passed over.
        reference: From :func:`pytest_qvl.checks.support.reference.record_reference`; None judges finiteness and
            headroom only.

    Returns:
        Evidence with the drift at both stages, the peak, and the number of pictures and of attention windows.

    Raises:
        CheckFailed: A promise is broken.
        CannotJudge: No sample has a picture, each is a single attention window of a model that has windows, or full
            precision is not finite on one either.
        ValueError: The reference was recorded for other samples.
    """
    import torch

    pictured = [sample for sample in samples if sample.images]
    if not pictured:
        raise CannotJudge("no sample has a picture: there are no visual features to judge")
    parts = anatomy(model)
    judge = Judge("vision_stability", "vision tower and merger keep their features")
    if reference is not None and reference.caveat:
        judge.note(reference.caveat)
    seen, broken = (_Seen(), _Seen()), []
    images: list[Seen] = []
    modules = [*leaves(parts.vision_tower), *parts.blocks]
    with preserved(model, training=False), watched(parts, modules) as peaks:
        for group in chunks(pictured):
            batch = make_batch(processor, group, device=parts.device)
            grids = iter(batch["image_grid_thw"].tolist())
            outputs = iter(tower_output(parts, batch))
            for sample in group:
                recorded = None if reference is None else reference.probe(sample).tower
                for picture in range(len(sample.images)):
                    output, name = next(outputs), f"sample {sample.id!r}, picture {picture}"
                    images.append(Seen(name, sample.images[picture], tuple(next(grids))))
                    if not output.finite:
                        broken.append(name)
                    elif recorded is not None:
                        _compare(seen, output, recorded[picture], name)
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
    judge.report("pictures", sum(len(sample.images) for sample in pictured))
    if undecided and not judge.problems:
        raise CannotJudge(undecided)
    highest = sorted(peaks.listed(), key=lambda peak: -_share(peak))[:PEAKS_SHOWN]
    return judge.verdict(("module", "peak", "share of dtype max"), ((p.module, p.value, _share(p)) for p in highest))


def _share(peak: Peak) -> float:
    return peak.value / peak.dtype_max if peak.finite else math.inf


def _compare(seen: tuple[_Seen, _Seen], output: TowerOutput, recorded: TowerOutput, name: str) -> None:
    if not recorded.finite:
        raise CannotJudge(
            f"features of {name} are not finite in full precision either: record the reference in bfloat16"
        )
    if output.rows != recorded.rows:
        raise InputError(
            f"{name} has {output.rows[1][-1] + 1} visual tokens, but {recorded.rows[1][-1] + 1} in the "
            "reference: it was recorded with another processor"
        )
    for stage, drift, rows in zip(seen, _drifts(output, recorded), output.rows, strict=True):
        stage.take(drift, name, rows)


def _judge_finite(judge: Judge, parts: Parts, broken: list[str], peaks: Peaks) -> None:
    judge.equal(
        "pictures whose features are not finite",
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
        else_say=f"{top.module} reaches {top.value:.6g} of {top.dtype_max:.6g}: other pictures can overflow "
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


def _judge_drift(judge: Judge, parts: Parts, seen: tuple[_Seen, _Seen], reference: Reference) -> None:
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
