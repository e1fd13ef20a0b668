"""The Qwen-VL families that this package knows: one row each.

Everything that differs by family and is data stands here: names, Transformers classes, the released checkpoint whose
processor is typical of it, a small configuration with all of its features. A new family is a row here and its released
configurations in ``sources/released.json``. Standard library only, because a model's name is checked while pytest
starts.

Source of class and field names: ``transformers/models/qwen2_vl``, ``qwen2_5_vl``, ``qwen3_vl`` and ``qwen3_5``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from pytest_qvl.releases import is_before

SMALL_WIDTH = 128  # hidden size of the small random models' language backbone, which their vision tower writes into


@dataclass(frozen=True)
class Family:
    """What differs from one family to another and is data.

    Attributes:
        model_type: What its ``config.json`` says.
        label: Its name in prose.
        config_class: Class of its configuration in Transformers.
        processor_class: Class of its processor in Transformers.
        typical: The released configuration (a name in ``released.json``) whose processor's image sizes are assumed
            where a configuration comes without a processor.
        small_vision: Fields of its vision configuration in small random models of :data:`SMALL_WIDTH`, beside those
            that all families share: every feature of the family is there, in few pixels. ``patch_size`` is one.
        image_mean: Of each channel, in the ``preprocessor_config.json`` of every released checkpoint.
        image_std: Standard deviation of each channel, ditto.
        video_time: What its positions count along a video: ``"patches"`` of frames, ``"seconds"`` times the
            configuration's ``tokens_per_second``, or nothing, since each frame stands alone behind its time in words
            (``"words"``).
        interleaved: Whether the axes of its M-RoPE take turns over the frequencies, instead of a run of them each.
        zero_centred_norms: Class of those of its norms that scale by ``1 + weight``; empty for none.
        small_text: Fields of its text configuration in small random models, beside those that all families share.
        embedded: The embedded model of it (``embedded:NAME``); empty for none.
        samples: Whether the ``generation_config.json`` of its releases draws replies at random, and not in name only.
        since: The first release of Transformers that has it; empty for every supported one.
    """

    model_type: str
    label: str
    config_class: str
    processor_class: str
    typical: str
    small_vision: Mapping[str, Any]
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    video_time: Literal["patches", "seconds", "words"]
    interleaved: bool = False
    zero_centred_norms: str = ""
    small_text: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    embedded: str = ""
    samples: bool = False
    since: str = ""

    @property
    def installed(self) -> bool:
        """Whether the installed Transformers has it."""
        return not self.since or not is_before("transformers", self.since)


def _small(**fields: Any) -> Mapping[str, Any]:
    return MappingProxyType(fields)


# OpenAI's CLIP (https://github.com/openai/CLIP/blob/main/clip/clip.py, ``_transform``).
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
_ROWS = (
    Family(
        "qwen2_vl",
        "Qwen2-VL",
        "Qwen2VLConfig",
        "Qwen2VLProcessor",
        "qwen2-vl-2b",
        _small(patch_size=14, embed_dim=64, hidden_size=SMALL_WIDTH, mlp_ratio=2),
        _CLIP_MEAN,
        _CLIP_STD,
        "patches",
    ),
    Family(
        "qwen2_5_vl",
        "Qwen2.5-VL",
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLProcessor",
        "qwen2.5-vl-7b",
        _small(
            patch_size=14,
            hidden_size=64,
            intermediate_size=128,
            out_hidden_size=SMALL_WIDTH,
            window_size=56,
            fullatt_block_indexes=[1, 3],
        ),
        _CLIP_MEAN,
        _CLIP_STD,
        "seconds",
        embedded="qwen2.5-vl",
    ),
    Family(
        "qwen3_vl",
        "Qwen3-VL",
        "Qwen3VLConfig",
        "Qwen3VLProcessor",
        "qwen3-vl-8b",
        _small(
            patch_size=16,
            hidden_size=64,
            intermediate_size=128,
            out_hidden_size=SMALL_WIDTH,
            deepstack_visual_indexes=[0, 2],
            num_position_embeddings=256,
        ),
        _HALF,
        _HALF,
        "words",
        interleaved=True,
        embedded="qwen3-vl",
        samples=True,
    ),
    Family(
        "qwen3_5",
        "Qwen3.5",
        "Qwen3_5Config",
        "Qwen3VLProcessor",
        "qwen3.5-9b",
        _small(
            patch_size=16,
            hidden_size=64,
            intermediate_size=128,
            out_hidden_size=SMALL_WIDTH,
            num_position_embeddings=256,
        ),
        _HALF,
        _HALF,
        "words",
        interleaved=True,
        embedded="qwen3.5",
        samples=True,
        zero_centred_norms="Qwen3_5RMSNorm",
        small_text=_small(
            layer_types=["linear_attention", "linear_attention", "full_attention"],
            head_dim=64,
            linear_key_head_dim=32,
            linear_num_key_heads=2,
            linear_value_head_dim=32,
            linear_num_value_heads=4,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [3, 3, 2],
                "mrope_interleaved": True,
                "partial_rotary_factor": 0.25,
            },
        ),
        since="5.2",
    ),
)
FAMILIES: Mapping[str, Family] = MappingProxyType({row.model_type: row for row in _ROWS})
# The family of the embedded model; a processor that does not say what it is is taken for one of its.
DEFAULT = FAMILIES["qwen2_5_vl"]
