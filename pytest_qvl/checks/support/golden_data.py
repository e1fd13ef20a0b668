"""The golden record of a checkpoint: fixed inputs, and what a verified installation made of them in float32.

It lies beside the checkpoint's files as ``qvl_golden.json`` and is written by ``tools/golden_record.py``. Images are
drawn by integer arithmetic and preprocessed by :mod:`pytest_qvl.checks.support.image_oracle`, token ids are recorded:
what a model makes of them depends on no processor.
"""

from __future__ import annotations

import base64
import json
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_qvl.checks.support.image_oracle import Recipe
from pytest_qvl.models.autocast import autocast_dtype
from pytest_qvl.models.layers import family_of
from pytest_qvl.models.taps import forget_positions, tapped, vision_features
from pytest_qvl.samples import Sample

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np
    import torch
    from PIL.Image import Image

    from pytest_qvl.models.anatomy import Parts

    Array = np.ndarray[Any, Any]

GOLDEN_FILE = "qvl_golden.json"
VALUES_KEPT = 96  # of an image's pixel_values
ROWS_KEPT = {"patch_embed": 4, "block": 4, "features": 8, "layer": 6, "logits": 6}  # per probe
_ROUND = 2**31 - 1  # a prime, which takes places of pixel_values from everywhere
Grid = tuple[int, int, int]


class Probe(NamedTuple):
    """One fixed row of input.

    Attributes:
        name: What to call it.
        question: Its text.
        tokens: Width and height of each image in visual tokens; whole ones, so that nothing is resized.
    """

    name: str
    question: str
    tokens: tuple[tuple[int, int], ...]

    def sizes(self, recipe: Recipe) -> list[tuple[int, int]]:
        """Width and height of each image in pixels."""
        side = recipe.patch * recipe.merge
        return [(width * side, height * side) for width, height in self.tokens]

    def sample(self, recipe: Recipe) -> Sample:
        """The same as a sample for the processor."""
        images = tuple(image(*size) for size in self.sizes(recipe))
        return Sample(images, self.question, "red", "golden", self.name)


# The first image is six attention windows of the embedded Qwen2.5-VL, of which three are cut off.
PROBES = (
    Probe("one image", "What is in the middle?", ((5, 4),)),
    Probe("two images", "How many shapes are there?", ((3, 2), (2, 3))),
)
RESIZED = (100, 90)  # px: no whole visual tokens, of 28 px or of 32


def drawn(width: int, height: int) -> Array:
    """``(height, width, 3)`` uint8: a gradient, a chequered and a curved channel; of integers, so the same anywhere."""
    import numpy as np

    y, x = np.mgrid[:height, :width].astype(np.int64)
    channels = (37 * x + 11 * y, x // 14 * 53 + y // 14 * 29, x * y // 7 + 90)
    return np.stack([channel % 256 for channel in channels], axis=-1).astype(np.uint8)


def image(width: int, height: int) -> Image:
    """:func:`drawn` as an image; the one that is resized with half the contrast, around 128.

    A cubic filter widens contrast by at most 1.27 per pass (docs/limits.md#bicubic-resizing), so that none of its two
    has to cut a value off at 0 or 255 (``64 * 1.27**2 = 103 < 127``). Where one does, results depend on which pass
    comes first by more than rounding.
    """
    from PIL import Image as Pillow

    values = drawn(width, height)
    return Pillow.fromarray(64 + values // 2 if (width, height) == RESIZED else values)


def places_kept(total: int) -> list[int]:
    """Which of an image's values are recorded, by their number in the flat ``pixel_values``."""
    return [number * _ROUND % total for number in range(VALUES_KEPT)]


def rows_kept(kind: str, count: int) -> list[int]:
    """Which of `count` rows of a stage are recorded: evenly spaced, the first and the last among them."""
    kept = min(ROWS_KEPT[kind], count)
    return [round(k * (count - 1) / max(kept - 1, 1)) for k in range(kept)]


class Response(NamedTuple):
    """How far rows of a stage move, relative to their length, when each module's output is off by one step.

    Attributes:
        rms: Root mean square over rows, in steps.
        row: The row that moves most, in steps.
    """

    rms: float
    row: float


@dataclass(frozen=True)
class Stage:
    """What was recorded at one place of the model.

    Attributes:
        kind: Key of :data:`ROWS_KEPT`.
        rows: For each probe ``(rows, width)`` float32.
        response: How these rows answer to rounding.
    """

    kind: str
    rows: tuple[torch.Tensor, ...]
    response: Response

    def plain(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return {"kind": self.kind, "rows": [_text(rows) for rows in self.rows], "response": list(self.response)}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Stage:
        """Inverse of :meth:`plain`."""
        return cls(plain["kind"], tuple(_tensor(rows) for rows in plain["rows"]), Response(*plain["response"]))


@dataclass(frozen=True)
class Golden:
    """The content of the file.

    Attributes:
        recorded_with: Version of each package that it was recorded with.
        confirmed_with: Versions that gave the same, within the limits of float32.
        probes: For each probe ``input_ids``, ``grids`` and ``positions`` (t, h, w), as lists.
        images: For each image ``size``, ``grid`` and ``values`` of the processor, the resized one last.
        stages: Of the ``"vision"`` tower, and of the language backbone by its weights (``"full"`` or ``"nf4"``): each
            by the module's dotted name, in order of the calls.
    """

    recorded_with: dict[str, str]
    confirmed_with: list[dict[str, str]]
    probes: list[dict[str, Any]]
    images: list[dict[str, Any]]
    stages: dict[str, dict[str, Stage]]

    def write(self, folder: Path) -> None:
        """Write it beside a checkpoint's files."""
        stages = {kind: {n: s.plain() for n, s in found.items()} for kind, found in self.stages.items()}
        text = json.dumps({**vars(self), "stages": stages}, indent=1)
        (folder / GOLDEN_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Golden | None:
        """The record beside a checkpoint's files; ``None`` if there is none."""
        file = folder / GOLDEN_FILE
        if not file.is_file():
            return None
        plain = json.loads(file.read_text(encoding="utf-8"))
        stages = {kind: {n: Stage.of(s) for n, s in found.items()} for kind, found in plain.pop("stages").items()}
        return cls(**plain, stages=stages)


def _text(rows: torch.Tensor) -> dict[str, Any]:
    return {"shape": list(rows.shape), "float32": base64.b64encode(rows.numpy().astype("<f4").tobytes()).decode()}


def _tensor(plain: dict[str, Any]) -> torch.Tensor:
    import numpy as np
    import torch

    values = np.frombuffer(base64.b64decode(plain["float32"]), dtype=np.dtype("<f4")).astype(np.float32)
    return torch.from_numpy(values.reshape(plain["shape"]))


def recipe_of(parts: Parts) -> Recipe:
    """How the model's images are preprocessed, of its configuration and its family, without resizing."""
    vision, family = parts.config.vision_config, family_of(parts)
    return Recipe(
        patch=vision.patch_size,
        merge=vision.spatial_merge_size,
        frames=vision.temporal_patch_size,
        fewest=0,
        most=2**62,
        mean=family.image_mean,
        deviation=family.image_std,
        resize=False,
    )


def inputs_of(
    parts: Parts, probe: Probe, ids: list[int], grids: list[list[int]], *, typed: bool
) -> dict[str, torch.Tensor]:
    """Model inputs of one probe, made without a processor, on the model's device.

    Args:
        parts: The model.
        probe: Which.
        ids: Its token ids, placeholders expanded.
        grids: ``image_grid_thw``.
        typed: Whether this release's processor makes ``mm_token_type_ids``, without which positions would be 1-D.
    """
    import numpy as np
    import torch

    recipe = recipe_of(parts)
    pixels = np.concatenate([recipe.patches(recipe.normalised(drawn(*size))) for size in probe.sizes(recipe)])
    tokens = torch.tensor([ids])
    made = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": torch.from_numpy(pixels).float(),
        "image_grid_thw": torch.tensor(grids),
    }
    if typed:
        made["mm_token_type_ids"] = (tokens == parts.image_token_id).to(tokens.dtype)
    return {name: tensor.to(parts.device) for name, tensor in made.items()}


class Observed(NamedTuple):
    """What a model makes of one probe.

    Attributes:
        positions: ``(3, tokens)`` int64, as the rotary embedding received them; ``None`` if nobody called it.
        stages: By the module's dotted name ``(rows, width)`` float32 on the CPU.
        autocast: The dtype of the ``torch.autocast`` that each of these modules ran under; None outside of one.
    """

    positions: torch.Tensor | None
    stages: dict[str, torch.Tensor]
    autocast: dict[str, torch.dtype | None]


def places(parts: Parts) -> dict[str, tuple[str, Any]]:
    """Kind and module of each stage by its dotted name, in order of the calls."""
    tower, language = parts.roots["vision"], parts.roots["language"]
    return {
        f"{tower}.patch_embed": ("patch_embed", parts.patch_embed),
        **{f"{tower}.blocks.{n}": ("block", block) for n, block in enumerate(parts.blocks)},
        tower: ("features", parts.vision_tower),
        **{f"{language}.layers.{n}": ("layer", layer) for n, layer in enumerate(parts.language_backbone.layers)},
        parts.roots["lm_head"]: ("logits", parts.lm_head),
    }


def observed(parts: Parts, inputs: dict[str, torch.Tensor]) -> Observed:
    """Run one probe through a model and keep the rows that are recorded; the caller preserves its state."""
    import torch

    forget_positions(parts)
    with torch.no_grad(), tapped(parts) as tap, _keeping(parts) as (kept, autocast):
        parts.wrapped(**inputs, use_cache=False)
    positions = tap.language[0].position_ids[:, 0].cpu() if tap.language else None
    return Observed(positions, kept, autocast)


@contextmanager
def _keeping(parts: Parts) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, torch.dtype | None]]]:
    kept: dict[str, torch.Tensor] = {}
    autocast: dict[str, torch.dtype | None] = {}

    def watch(name: str, kind: str) -> Any:
        def after(_module: Any, _args: Any, output: Any) -> None:
            found = vision_features(output) if kind == "features" else output
            found = (found[0] if isinstance(found, tuple) else found).detach()
            found = found.reshape(-1, found.shape[-1])
            autocast[name] = autocast_dtype(found.device.type)
            kept[name] = found[rows_kept(kind, len(found))].float().cpu()

        return after

    handles = [module.register_forward_hook(watch(name, kind)) for name, (kind, module) in places(parts).items()]
    try:
        yield kept, autocast
    finally:
        for handle in handles:
            handle.remove()
