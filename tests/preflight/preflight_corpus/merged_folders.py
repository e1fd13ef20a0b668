"""What lies beside the weights of a merged checkpoint: configuration, index, processor (questions 0, 6 and 7)."""

from __future__ import annotations

import json
from typing import Any

from .broken import broken
from .healthy import healthy
from .making import Arguments, Workshop, copy_processor, edit, in_shards, with_merge


def _with(shop: Workshop, family: str, name: str, factor: float) -> Arguments:
    """A merge with one number of its configuration multiplied, wherever it stands."""

    def change(fields: dict[str, Any]) -> None:
        for key, value in fields.items():
            if isinstance(value, dict):
                change(value)
            elif key == name:
                fields[key] = type(value)(value * factor)

    found = with_merge(shop, family)
    edit(found["merged"] / "config.json", change)
    return found


@broken("Open-Athena/MarinFold/pull/184", "configuration-differs", "rope_theta is ", ("qwen2_5_vl", "qwen3_vl"))
def rotary_base_of_another_model(shop: Workshop, family: str) -> Arguments:
    return _with(shop, family, "rope_theta", 0.1)


@broken("", "configuration-differs", "text_config.rms_norm_eps is ", ("qwen2_vl",))
def epsilon_of_another_model(shop: Workshop, family: str) -> Arguments:
    return _with(shop, family, "rms_norm_eps", 1e4)


@broken("", "configuration-differs", "image_token_id is ")
def image_token_of_another_model(shop: Workshop, family: str) -> Arguments:
    return _with(shop, family, "image_token_id", 0.5)


@broken("", "configuration-differs", "vision_config.num_heads is 1 and not 2", ("qwen3_vl",))
def heads_of_another_tower(shop: Workshop, family: str) -> Arguments:
    return _with(shop, family, "num_heads", 0.5)


@broken("unslothai/unsloth/issues/1601", "configuration-quantized", "taken over from a 4-bit base", ("qwen2_5_vl",))
def quantization_of_the_base_left_in(shop: Workshop, family: str) -> Arguments:
    found = with_merge(shop, family)
    saved = json.loads((shop.packed(family) / "config.json").read_text(encoding="utf-8"))
    edit(found["merged"] / "config.json", quantization_config=saved["quantization_config"])
    return found


def _with_processor(shop: Workshop, family: str) -> dict[str, Any]:
    found = with_merge(shop, family)
    copy_processor(found["base"], found["merged"])
    return found


@healthy(("qwen2_vl", "qwen3_vl"))
def merged_with_its_processor(shop: Workshop, family: str) -> Arguments:
    found = _with_processor(shop, family)
    edit(found["merged"] / "config.json", use_cache=False, transformers_version="9.9.9", dtype="float32")
    return found


@broken("", "limits-impossible", "the processor of the merged checkpoint", ("qwen2_5_vl",))
def limits_swapped_in_the_merge(shop: Workshop, family: str) -> Arguments:
    found = _with_processor(shop, family)
    edit(found["merged"] / "preprocessor_config.json", min_pixels=12845056, max_pixels=3136)
    return found


@broken(
    "NVIDIA-NeMo/Automodel/issues/3256", "no-image-processor", "the processor of the merged checkpoint", ("qwen2_vl",)
)
def only_the_tokenizer_beside_the_merge(shop: Workshop, family: str) -> Arguments:
    found = _with_processor(shop, family)
    (found["merged"] / "preprocessor_config.json").unlink()
    return found


@healthy(("qwen2_5_vl",))
def merged_and_saved_in_shards(shop: Workshop, family: str) -> Arguments:
    found = with_merge(shop, family)
    in_shards(found["merged"], index=True)
    return found


@broken("", "merged-unreadable", "2 safetensors files", ("qwen3_vl",))
def index_of_the_merge_lost(shop: Workshop, family: str) -> Arguments:
    found = with_merge(shop, family)
    in_shards(found["merged"], index=False)
    return found


@broken("shuaijiang/Ke-Omni-R/issues/4", "base-unreadable", "the index was not copied", ("qwen2_vl",))
def index_of_the_base_lost(shop: Workshop, family: str) -> Arguments:
    base = shop.copy(shop.base(family))
    in_shards(base, index=False)
    return {"base": base, "adapter": shop.adapter(family)}
