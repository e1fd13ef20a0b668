"""From a model's name or folder to its configuration and image sizes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.families import FAMILIES
from pytest_qvl.models.sources.hub import hub_options
from pytest_qvl.models.sources.model_source import ModelSource
from pytest_qvl.models.sources.released import ImageSizes, hub_id, image_sizes, released_config, released_names
from pytest_qvl.vram.forecast.processor_settings import first_settings, pixel_limits
from pytest_qvl.vram.forecast.runnable import NotRunnableError, absurd_size, why_not_runnable
from pytest_qvl.vram.forecast.videos import VideoSizes, video_sizes

if TYPE_CHECKING:
    from pytest_qvl.vram.forecast.request import Sample

# In this order Transformers 5 looks for an image processor's settings; 4 reads the second file alone.
_IMAGE_PROCESSOR = (("processor_config.json", "image_processor"), ("preprocessor_config.json", None))


@dataclass(frozen=True)
class Source:
    """A model to forecast.

    Attributes:
        label: What to call it.
        config: The Transformers configuration.
        sizes: What its processor does with image sizes.
        videos: What it does with videos.
    """

    label: str
    config: Any
    sizes: ImageSizes
    videos: VideoSizes

    @property
    def linear_attention(self) -> bool:
        """Whether some layers have linear attention."""
        return "linear_attention" in (getattr(self.config.get_text_config(), "layer_types", None) or ())

    def grids(self, sample: Sample) -> list[tuple[int, int, int]]:
        """The patch grids (time, rows, columns) of a sample's images, then of its videos.

        Every ``temporal_patch_size`` frames of a video are one step in time.

        Raises:
            ValueError: A size that the processor refuses.
        """
        return [*(self.sizes.grid(*image) for image in sample.images), *(self.videos.grid(*v) for v in sample.videos)]

    def lengths(self, sample: Sample, most: int | None) -> tuple[int, int]:
        """Visual and text tokens of a sample, the times between a video's frames and their markers among the text.

        Args:
            sample: One sample.
            most: Tokens that a trainer cuts it to (``max_length``); ``None`` for no limit.

        Raises:
            ValueError: Its images and videos alone have more, so that the trainer fails.
        """
        grids = self.grids(sample)
        visual = sum(prod(grid) // self.sizes.merge_size**2 for grid in grids)
        times = sum(sum(self.videos.times(time)) for time, _, _ in grids[len(sample.images) :])
        if most is None or visual + times + sample.tokens <= most:
            return visual, times + sample.tokens
        if most < visual + times + 2 * (len(sample.images) + len(sample.videos)) + 2:
            raise ValueError(
                f"max_length is {most} and a sample has {visual} visual tokens: the trainer would cut them off and "
                "fail; take a larger max_length, None for no limit, or smaller images"
            )
        return visual, most - visual


def find_source(model: str) -> Source:
    """The configuration of a released name or of a local folder; nothing is downloaded.

    Raises:
        NotRunnableError: The folder's configuration is of a model that cannot run.
        ValueError: Neither; or the folder's configuration is no Qwen-VL with a vision tower.
    """
    if model in released_names():
        return _source(model, released_config(model), image_sizes(model))
    file = Path(model).expanduser() / "config.json"
    if not file.is_file():
        raise ValueError(
            f"model {model!r} is neither a released configuration ({', '.join(released_names())}) "
            "nor a folder with a config.json"
        )
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    fields = fields if isinstance(fields, dict) else {}
    has_vision = isinstance(fields.get("vision_config"), dict)
    if fields.get("model_type") not in FAMILIES or not has_vision:
        raise ValueError(
            f"{file} describes no vision-language model that this package knows (model_type "
            f"{fields.get('model_type')!r}, vision_config {'present' if has_vision else 'missing'}); known: "
            f"{', '.join(FAMILIES)}"
        )
    if said := absurd_size(fields):
        raise ValueError(f"{file} says {said}")
    config = _config(file)
    if said := why_not_runnable(config):
        raise NotRunnableError(f"{file} describes a model that cannot run: {said}")
    return _source(file.parent.resolve().name, config, _folder_sizes(file.parent, config), file.parent)


def _source(label: str, config: Any, sizes: ImageSizes, folder: Path | None = None) -> Source:
    return Source(label, config, sizes, video_sizes(config.model_type, sizes, folder))


def _config(file: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(file.parent), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the class makes of values that it does not expect
        said = " ".join(str(error).split())
        raise ValueError(f"{file} is no configuration that Transformers takes: {said[:200]}") from None


def find_weights_source(weights: ModelSource) -> Source:
    """The configuration that a source of weights has.

    Of a hub id that is not built in, the configuration files are read from the hub (or its local cache).

    Raises:
        ValueError: The configuration is no Qwen-VL with a vision tower.
        OSError: The hub does not answer, or has no such model.
    """
    if weights.kind != "hub":
        return find_source(weights.location)
    released = {hub_id(name): name for name in released_names()}
    if weights.location in released:
        return find_source(released[weights.location])
    from transformers.utils.hub import cached_file

    options = hub_options(weights)
    cached_file(weights.location, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False, **options)
    return find_source(str(Path(cached_file(weights.location, "config.json", **options)).parent))


def source_of(config: Any, label: str) -> Source:
    """A source for a configuration at hand, with the image sizes of its family's released processor."""
    return _source(label, config, image_sizes(FAMILIES[config.model_type].typical))


def _folder_sizes(folder: Path, config: Any) -> ImageSizes:
    vision = config.vision_config
    known = asdict(image_sizes(FAMILIES[config.model_type].typical))
    if found := first_settings(folder, _IMAGE_PROCESSOR):
        usual = known["min_pixels"], known["max_pixels"]
        known["min_pixels"], known["max_pixels"] = pixel_limits(*found, usual)
    known["patch_size"] = vision.patch_size
    known["merge_size"] = vision.spatial_merge_size
    known["temporal_patch_size"] = vision.temporal_patch_size
    return ImageSizes(**known)
