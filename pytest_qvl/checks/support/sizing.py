"""The sizes of probe images for a model that is named and not yet loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.samples import ProbeSizes, pixel_limits, probe_sizes
from pytest_qvl.vram.forecast.source import find_weights_source

if TYPE_CHECKING:
    from pytest_qvl.models.sources.model_source import ModelSource

TRAINED_CELL = "qvl_scene_cell"


def sizes_for(source: ModelSource, processor: Any) -> ProbeSizes:
    """:func:`pytest_qvl.samples.probe_sizes` from the model's configuration and the pixel limits of its processor.

    Args:
        source: The model; its configuration is read, not its weights. Where that has a field ``qvl_scene_cell``, the
            model reads scenes of that many px per cell only (the embedded model, and copies of it).
        processor: Its processor.

    Raises:
        ValueError: The configuration is no Qwen-VL with a vision tower.
        OSError: The hub does not answer, or has no such model.
    """
    config = find_weights_source(source).config
    least, most = pixel_limits(processor.image_processor)
    return probe_sizes(
        config.vision_config,
        min_pixels=least,
        max_pixels=most,
        readable=source.has_knowledge,
        trained_cell=getattr(config, TRAINED_CELL, None),
    )
