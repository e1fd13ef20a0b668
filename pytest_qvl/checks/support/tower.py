"""What the vision tower and its merger put out, kept row by row, and how far rows move."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.activations import leaves
from pytest_qvl.checks.support.rounding import coarsest, last_place_noise
from pytest_qvl.checks.support.scoring import chunks, coarsest_dtype
from pytest_qvl.models.anatomy import TOWER, Parts
from pytest_qvl.models.autocast import autocast_dtype
from pytest_qvl.models.taps import vision_features
from pytest_qvl.samples import Sample, make_batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


ROWS_KEPT = 32


@dataclass(frozen=True)
class TowerOutput:
    """Rows of one image, on the CPU, in the dtype the tower computed.

    Attributes:
        patches: ``(rows, vision hidden)``, what goes into the merger; at most 32 rows, evenly spaced.
        visual_tokens: ``(rows, language hidden)``, what comes out of it; at most 32 rows, evenly spaced.
        rows: Which patches and which visual tokens these are, counted from 0.
        finite: Whether every element of the whole image was finite at both places.
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


def tower_dtype(parts: Parts) -> torch.dtype:
    """The coarsest dtype that the tower computes in when it runs alone: its linears', or that of autocast around it."""
    return coarsest((coarsest_dtype(parts, TOWER), autocast_dtype(parts.device.type)))


def tower_output(parts: Parts, batch: dict[str, torch.Tensor]) -> list[TowerOutput]:
    """Run the vision tower alone on a batch's images and keep rows of each, in the batch's order."""
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
    # Window attention permutes patches, but only inside an image.
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
    """How far the rows of many images moved at one stage, relative to their own length.

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
        The drift before and after the merger over all images; zero without images.
    """
    seen = DriftsSeen(), DriftsSeen()
    for group in chunks([s for s in samples if s.images]):
        batch = make_batch(processor, group, device=parts.device)
        plain = tower_output(parts, batch)
        with last_place_noise(leaves(parts.vision_tower)):
            noisy = tower_output(parts, batch)
        for one, other in zip(noisy, plain, strict=True):
            for stage, drift in zip(seen, drifts(one, other), strict=True):
                stage.take(drift)
    return seen[0].drift(), seen[1].drift()


def drifts(one: TowerOutput, other: TowerOutput) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`row_drift` of an image before and after the merger."""
    return row_drift(one.patches, other.patches), row_drift(one.visual_tokens, other.visual_tokens)


@dataclass
class DriftsSeen:
    """Collects row drifts at one stage and remembers where the largest was."""

    squares: float = 0.0
    rows: int = 0
    largest: float = 0.0
    where: str = "nowhere"

    def take(self, drift: torch.Tensor, name: str = "", rows: Sequence[int] = ()) -> None:
        """Add the ``(rows,)`` drifts of one image; `rows` says which of the image's rows they are."""
        self.squares += float(drift.pow(2).sum())
        self.rows += len(drift)
        index = int(drift.nan_to_num(math.inf).argmax())
        if not float(drift[index]) <= self.largest:
            self.largest = float(drift[index])
            self.where = f"{name}, row {rows[index]}" if rows else name

    def drift(self) -> Drift:
        """Root mean square over all rows taken so far, and the largest; zeros where there were none."""
        return Drift(math.sqrt(self.squares / self.rows) if self.rows else 0.0, self.largest)
