"""Tiny random models of every family, for the checks that need no knowledge."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.families import FAMILIES, SMALL_WIDTH

if TYPE_CHECKING:
    import torch

RANDOM_FAMILIES = tuple(sorted(name for name, row in FAMILIES.items() if row.installed))


def random_model(
    family: str, *, seed: int, dtype: torch.dtype, quantization_config: Any, vision: dict[str, Any] | None = None
) -> Any:
    """A quantized model with random weights and the embedded checkpoint's token ids; no adapter.

    Args:
        family: One of :data:`RANDOM_FAMILIES`.
        seed: Seed of all weights.
        dtype: Dtype of what is not quantized.
        quantization_config: A ``transformers.BitsAndBytesConfig``, or None for full precision.
        vision: Fields of the vision configuration that differ from the usual ones.
    """
    from pytest_qvl.models.quantized import keep_quantized_weights_in_place
    from pytest_qvl.models.sources.synthetic import build_synthetic

    model = build_synthetic(random_config(family, vision=vision), quantization_config, "cpu", dtype, seed)
    keep_quantized_weights_in_place(model)
    return model.requires_grad_(False).eval()


def random_config(
    family: str, *, layers: int = 3, blocks: int = 4, tied: bool = False, vision: dict[str, Any] | None = None
) -> Any:
    """A small configuration with the token ids of the embedded checkpoint.

    Args:
        family: One of :data:`RANDOM_FAMILIES`.
        layers: Language layers.
        blocks: Vision blocks.
        tied: Whether the head is the embedding table.
        vision: Fields of the vision configuration that differ from the usual ones.
    """
    from transformers import AutoConfig

    from pytest_qvl.models.sources.embedded import embedded_model_dir

    embedded = AutoConfig.from_pretrained(embedded_model_dir())
    text = embedded.get_text_config()
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]}
    shared = {
        name: getattr(embedded, name)
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    }
    text_config = {
        "vocab_size": text.vocab_size,
        "hidden_size": SMALL_WIDTH,
        "intermediate_size": 2 * SMALL_WIDTH,
        "num_hidden_layers": layers,
        "tie_word_embeddings": tied,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "head_dim": SMALL_WIDTH // 4,
        "rope_theta": rope["rope_theta"],  # Transformers 4 reads it here, 5 below
        "rope_parameters": rope,
        "rope_scaling": {**rope, "type": "mrope"},
    }
    own = deepcopy(dict(FAMILIES[family].small_text))
    if kinds := own.pop("layer_types", None):
        own["layer_types"] = [kinds[number % len(kinds)] for number in range(layers)]
        del text_config["rope_theta"], text_config["rope_scaling"]
    text_config |= own
    vision_config: dict[str, Any] = {
        "depth": blocks,
        "num_heads": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        **deepcopy(dict(FAMILIES[family].small_vision)),
    }
    return AutoConfig.for_model(
        family,
        text_config=text_config,
        vision_config=vision_config | (vision or {}),
        tie_word_embeddings=tied,
        qvl_scene_cell=2 * FAMILIES[family].small_vision["patch_size"],  # small probes: there is nothing to read
        **shared,
    )
