"""What a model and its processor make of fixed inputs, against a record of verified releases beside the checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.golden_data import (
    GOLDEN_FILE,
    PROBES,
    RESIZED,
    Golden,
    Grid,
    Observed,
    Stage,
    image,
    inputs_of,
    observed,
    places_kept,
    recipe_of,
)
from pytest_qvl.checks.support.image_oracle import STEPS_IN_8_BITS
from pytest_qvl.checks.support.lora import rewrites_base
from pytest_qvl.checks.support.placeholders import show_grid
from pytest_qvl.checks.support.rounding import rounded_sums
from pytest_qvl.checks.support.scoring import coarsest_dtype
from pytest_qvl.checks.support.tower import DriftsSeen, row_drift
from pytest_qvl.checks.support.unpacked_weights import require_unpacked_weights
from pytest_qvl.evidence import CannotJudge, Evidence, Judge
from pytest_qvl.models.adapters import adapter_configs, adapters_disabled, is_merged
from pytest_qvl.models.anatomy import GROUPS, TOWER, Parts, anatomy
from pytest_qvl.models.policy import AdapterPolicy
from pytest_qvl.models.quantized import linear_states
from pytest_qvl.models.sources.stored import loaded_from
from pytest_qvl.models.sources.synthetic import kept_drawn
from pytest_qvl.models.state import preserved
from pytest_qvl.models.training import asked_biases, trained_on_purpose
from pytest_qvl.samples import make_batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    Array = np.ndarray[Any, Any]

# On a GPU cuDNN convolves float32 in TensorFloat-32 unless it is told not to: ten bits behind the point.
TENSOR_FLOAT_STEP = 2.0**-10


@check(promise=12, needs=("request",))
def golden_record(model: Any, processor: Any, policy: AdapterPolicy | None = None) -> Evidence:
    """Fixed inputs give the pixels, positions, features and logits that verified releases gave for this checkpoint.

    A reference that was recorded by a broken library, kernel or processor shares its fault; this record does not. It
    lies beside the checkpoint as ``qvl_golden.json``, was recorded in float32 on the CPU, and the releases that
    confirmed it stand in it. The embedded model ships with one; other checkpoints are not judged.

    ===================================== ======================================================================
    judged                                limit
    ===================================== ======================================================================
    token ids, grids, positions           exact; a constant added to all positions counts for nothing
    ``pixel_values``                      eight roundings of float32; two steps of 8 bits where resized
    visual features, each language layer, rows' relative distance, root mean square and worst, at most how far
    logits                                one last place in every module moves them: docs/limits.md#golden-record
    ===================================== ======================================================================

    The model is given pixels and token ids that no processor has made, so that what is wrong with the processor
    and what is wrong with the model is told apart. Adapters are off. NF4 weights of the language backbone alone, as
    this package quantizes, are held to a record of their own.

    Args:
        model: Wrapped or not, in NF4 or full precision.
        processor: The checkpoint's processor.
        policy: What may be trained beside adapters; nothing if not given.

    Raises:
        CheckFailed: Names what differs, by how much, and where in the model it begins.
        CannotJudge: No golden record lies beside the checkpoint, or the weights are meant to be others by now.
    """
    parts = anatomy(model)
    golden = _record(parts)
    _refuse_changed(parts, policy or AdapterPolicy())
    require_unpacked_weights(parts)
    judge = Judge("golden_record", "fixed inputs give what verified releases gave")
    typed = _judge_processor(judge, parts, processor, golden)
    with preserved(model, training=False), adapters_disabled(parts):
        found = [
            observed(parts, inputs_of(parts, probe, said["input_ids"], said["grids"], typed=typed))
            for probe, said in zip(PROBES, golden.probes, strict=True)
        ]
    _judge_positions(judge, golden, found)
    rows = _judge_stages(judge, parts, golden, found)
    releases = [golden.recorded_with, *golden.confirmed_with]
    judge.note(f"recorded with {_versions(releases[0])}, confirmed with {len(releases) - 1} other sets of releases")
    return judge.verdict(("module", "drift, rms", "limit", "worst row", "limit"), rows)


def _record(parts: Parts) -> Golden:
    folder = None if kept_drawn(parts) else loaded_from(parts)
    golden = None if folder is None else Golden.read(folder)
    if golden is None:
        raise CannotJudge(
            f"no golden record ({GOLDEN_FILE}) lies beside this checkpoint: one ships with each embedded model, which "
            "shows whether the installed libraries are right (--qvl-model embedded)"
        )
    return golden


def _refuse_changed(parts: Parts, policy: AdapterPolicy) -> None:
    """Refuse a base model whose weights are meant to be others than the checkpoint's."""
    rewritten = any(rewrites_base(config) for config in adapter_configs(parts).values())
    for changed, reason in (
        (is_merged(parts), "an adapter is merged into the weights"),
        (rewritten, "the adapter's initialisation has rewritten the base weights"),
        (asked_biases(parts), "biases of the base model are trained with the adapter"),
        (trained_on_purpose(parts, policy), "parts of the base model are trained, as the policy names them"),
    ):
        if changed:
            raise CannotJudge(f"{reason}, so the golden record of the checkpoint says nothing of this model")


def _versions(packages: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def _judge_processor(judge: Judge, parts: Parts, processor: Any, golden: Golden) -> bool:
    """Hold token ids, grids and pixels; returns whether this release makes ``mm_token_type_ids``."""
    wrong, typed = [], False
    recipe = recipe_of(parts)
    for probe, said in zip(PROBES, golden.probes, strict=True):
        batch = make_batch(processor, [probe.sample(recipe)])
        typed = typed or "mm_token_type_ids" in batch
        ids, grids = batch["input_ids"][0].tolist(), batch["image_grid_thw"].tolist()
        if ids != said["input_ids"]:
            place = next(
                (n for n, pair in enumerate(zip(ids, said["input_ids"], strict=False)) if pair[0] != pair[1]), -1
            )
            wrong.append(f"the token ids of {probe.name!r} (first other one at place {place})")
        if grids != said["grids"]:
            wrong.append(f"the grids of {probe.name!r}")
    judge.equal(
        "token ids or grids that are not the recorded ones", len(wrong), 0,
        else_say=f"the processor makes other inputs than verified releases: {', '.join(wrong)}; is it the checkpoint's "
        "tokenizer and chat template, or is the library broken?",
    )  # fmt: skip
    pixels, worst = _wrong_pixels(parts, processor, golden)
    judge.report("pixel_values: largest difference in steps of 8 bits", worst)
    judge.equal(
        "images with other pixel_values than recorded", len(pixels), 0,
        else_say=f"the processor makes other pixel_values than verified releases: {'; '.join(pixels)}; are its files "
        "the checkpoint's, or is the library broken? image_preprocessing names the step",
    )  # fmt: skip
    return typed


def _wrong_pixels(parts: Parts, processor: Any, golden: Golden) -> tuple[list[str], float]:
    import numpy as np

    recipe = recipe_of(parts)
    wrong, worst = [], 0.0
    for said in golden.images:
        size, recorded = said["size"], np.asarray(said["values"])
        made = processor.image_processor(images=[image(*size)], return_tensors="pt")
        values = made["pixel_values"].double().cpu().numpy()
        grid: Grid = tuple(made["image_grid_thw"][0].tolist())
        if list(grid) != said["grid"]:
            wrong.append(f"the grid of {size[0]}x{size[1]} px is {show_grid(grid)}, was {show_grid(said['grid'])}")
            continue
        kept = np.asarray(places_kept(values.size))
        width, resized = values.shape[-1], tuple(size) == RESIZED
        furthest, off = recipe.apart(
            values.reshape(-1)[kept], recorded, kept % width, STEPS_IN_8_BITS if resized else 0
        )
        worst = max(worst, furthest)
        if off.any():
            first = int(off.argmax())
            wrong.append(
                f"{int(off.sum())} of {len(kept)} values kept of {size[0]}x{size[1]} px differ, first "
                f"value {kept[first] % width} of patch {kept[first] // width} "
                f"({values.reshape(-1)[kept[first]]:.5g}, was {recorded[first]:.5g})"
            )
    return wrong, worst


def _judge_positions(judge: Judge, golden: Golden, found: list[Observed]) -> None:
    import torch

    wrong = []
    for probe, said, own in zip(PROBES, golden.probes, found, strict=True):
        if own.positions is None:
            judge.note("positions are not judged: the model did not call its rotary embedding")
            return
        wanted = torch.tensor(said["positions"])
        apart = (own.positions - own.positions.min()) != (wanted - wanted.min())
        if bool(apart.any()):
            axis, token = (int(each) for each in apart.nonzero()[0])
            wrong.append(f"{int(apart.sum())} of {probe.name!r}, first {'thw'[axis]} of token {token}")
    judge.equal(
        "probes with other positions", len(wrong), 0,
        else_say=f"M-RoPE positions are not those of verified releases: {'; '.join(wrong)}",
    )  # fmt: skip


def _judge_stages(
    judge: Judge, parts: Parts, golden: Golden, found: list[Observed]
) -> list[tuple[str, float, float, float, float]]:
    rows, off = [], []
    for name, stage in _comparable(judge, parts, golden).items():
        if any(name not in own.stages for own in found):
            judge.note(f"{name} is not judged: the model did not call it")
            continue
        seen = DriftsSeen()
        for recorded, own in zip(stage.rows, found, strict=True):
            seen.take(row_drift(own.stages[name], recorded))
        drift, step = seen.drift(), rounding_step(parts, name, found)
        limits = stage.response.rms * step, stage.response.row * step
        rows.append((name, drift.rms, limits[0], drift.row, limits[1]))
        if not (drift.rms <= limits[0] and drift.row <= limits[1]):
            off.append(name)
        # What is between patches and merger may be sorted otherwise by another release, and be right.
        if stage.kind in ("features", "layer", "logits"):
            judged = f"{name}: drift"
            judge.at_most(f"{judged}, rms", drift.rms, limits[0], else_say=_moved(name, off[:1] or [name]))
            judge.at_most(f"{judged}, worst row", drift.row, limits[1], else_say=_moved(name, off[:1] or [name]))
    return rows


def _moved(name: str, first: list[str]) -> str:
    return (
        f"the output of {name} is not what verified releases gave for the same input, and {first[0]} is the first that "
        "differs: a weight, a setting, a kernel or the library is wrong there, whatever a reference recorded with the "
        "same installation says"
    )


def _comparable(judge: Judge, parts: Parts, golden: Golden) -> dict[str, Stage]:
    """The stages that were recorded of weights stored as this model's are, with a note on the others."""
    states = linear_states(parts)
    quantized = [state for state in states if state.is_quantized]
    if not quantized:
        return {**golden.stages["vision"], **golden.stages["full"]}
    usual = all((s.storage, s.blocksize, s.double_quantized) == ("nf4", 64, True) for s in quantized)
    if usual and {s.name for s in quantized} == {s.name for s in states if s.group == "language"}:
        return {**golden.stages["vision"], **golden.stages["nf4"]}
    in_tower = any(state.group in TOWER for state in quantized)
    judge.note(
        f"{'features and logits are' if in_tower else 'logits are'} not judged: recorded are full precision, and NF4 "
        "in blocks of 64 with double quantization on the language linears alone; here "
        f"{len(quantized)} linears are quantized (first: {quantized[0].name}, {quantized[0].storage})"
    )
    return {} if in_tower else golden.stages["vision"]


def rounding_step(parts: Parts, name: str, found: Sequence[Observed] = ()) -> float:
    """The step that a module's output is known to, relative to it, by all that it was computed from.

    That of the coarsest dtype, of linears or of the autocast that modules were seen to run under: up to the merger that
    of the tower, behind it of all. In float32, whose partial sums are rounded, ``sqrt(n / 6)`` times, n being the
    longest product (the patch embedding's among them); on a GPU that of TensorFloat-32.
    """
    import torch

    in_tower = parts.group_of(name) in TOWER
    groups = TOWER if in_tower else GROUPS
    casts = [cast for own in found for place, cast in own.autocast.items() if cast and parts.group_of(place) in groups]
    dtype = max((coarsest_dtype(parts, groups), *casts), key=lambda each: torch.finfo(each).eps)
    if dtype == torch.float32 and parts.device.type != "cpu":
        return TENSOR_FLOAT_STEP
    recipe = recipe_of(parts)
    terms = max(state.in_features for state in linear_states(parts) if state.group in groups)
    terms = max(terms, 3 * recipe.frames * recipe.patch**2)
    return float(torch.finfo(dtype).eps) * rounded_sums(dtype, terms)
