"""Merged checkpoints in 4 bits, and in 16 bits after a merge in 4 (question 7)."""

from __future__ import annotations

from typing import Any

from .broken import broken
from .healthy import healthy
from .making import CONFIG, WEIGHTS, Arguments, Workshop, edit, retensor


def _faint(shop: Workshop, family: str, **lora: Any) -> dict[str, Any]:
    """An adapter as strong as a short training makes it: a few thousandths of the weights."""
    found = {"base": shop.base(family), "adapter": shop.adapter(family, **lora)}
    edit(found["adapter"] / CONFIG, lora_alpha=4)
    return found


@broken("ARahim3/mlx-tune/issues/15", "merge-lost-most", "packs the sum into NF4 again", ("qwen2_5_vl", "qwen3_vl"))
def merged_into_the_four_bit_model(shop: Workshop, family: str) -> Arguments:
    found = _faint(shop, family)
    return {**found, "merged": shop.merged_in_four_bits(found["base"], found["adapter"])}


@broken("", "merged-into-packed", "packed again with the sum", ("qwen2_vl",))
def merged_into_the_four_bit_model_and_unpacked(shop: Workshop, family: str) -> Arguments:
    import torch

    from pytest_qvl.models.quantized import usual_quantization

    found = _faint(shop, family)
    asked = usual_quantization(torch.bfloat16, llm_int8_skip_modules=["model.visual", "lm_head"])
    return {**found, "merged": shop.merged(found["base"], found["adapter"], quantization_config=asked)}


@broken("", "not-merged", "adapted weights in 4 bits", ("qwen2_vl",))
def packed_base_saved_in_place_of_the_merge(shop: Workshop, family: str) -> Arguments:
    found = _faint(shop, family)
    return {**found, "merged": shop.merged_in_four_bits(found["base"], None)}


@broken("", "merge-scaled", "times ΔW", ("qwen2_5_vl",))
def merged_with_alpha_and_quantized(shop: Workshop, family: str) -> Arguments:
    found = _faint(shop, family)
    other = shop.copy(found["adapter"])
    edit(other / CONFIG, lora_alpha=32)
    return {**found, "merged": shop.merged_in_four_bits(found["base"], other, first_packed=False)}


@broken("", "changed-elsewhere", "1.mlp.down_proj.weight", ("qwen3_vl",))
def another_weight_changed_and_quantized(shop: Workshop, family: str) -> Arguments:
    found = _faint(shop, family, target_modules=["q_proj"])
    changed = shop.copy(found["base"])
    retensor(changed / WEIGHTS, lambda n, t: {n: t * 1.25 if "1.mlp.down_proj" in n else t})
    return {**found, "merged": shop.merged_in_four_bits(changed, found["adapter"], first_packed=False)}


@healthy(("qwen2_5_vl", "qwen3_vl"))
def merged_and_quantized_afterwards(shop: Workshop, family: str) -> Arguments:
    found = _faint(shop, family)
    return {**found, "merged": shop.merged_in_four_bits(found["base"], found["adapter"], first_packed=False)}
