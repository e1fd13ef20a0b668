"""Tiny random models of every family, for the checks that need no knowledge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

RANDOM_FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")
WIDTH = 128
PATCH = {"qwen2_5_vl": 14, "qwen2_vl": 14, "qwen3_vl": 16}


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
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": layers,
        "tie_word_embeddings": tied,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "head_dim": WIDTH // 4,
        "rope_parameters": rope,
        "rope_scaling": {**rope, "type": "mrope"},
    }
    vision_config: dict[str, Any] = {
        "depth": blocks,
        "num_heads": 2,
        "patch_size": PATCH[family],
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
    }
    if family == "qwen2_vl":
        vision_config |= {"embed_dim": 64, "hidden_size": WIDTH, "mlp_ratio": 2}
    else:
        vision_config |= {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": WIDTH}
    if family == "qwen2_5_vl":
        vision_config |= {"window_size": 56, "fullatt_block_indexes": [1, 3]}
    if family == "qwen3_vl":
        vision_config |= {"deepstack_visual_indexes": [0, 2], "num_position_embeddings": 256}
    return AutoConfig.for_model(
        family,
        text_config=text_config,
        vision_config=vision_config | (vision or {}),
        tie_word_embeddings=tied,
        qvl_scene_cell=2 * PATCH[family],  # small probes: there is nothing to read
        **shared,
    )
