"""Tensors in dtypes that nobody expects: integers and floating point of 8 bits, in base, adapter and merge."""

from __future__ import annotations

from typing import Any

from .broken import broken
from .healthy import healthy
from .making import ADAPTER, WEIGHTS, Arguments, Workshop, retensor, with_adapter, with_merge


@broken("", "integers", "takes the integers for the values")
def adapter_of_integers(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    retensor(found["adapter"] / ADAPTER, lambda name, tensor: {name: (tensor * 100).char()})
    return found


@broken("", "integers", "2 of 42 tensors", ("qwen3_vl",))
def one_module_of_integers(shop: Workshop, family: str) -> Arguments:
    found = with_merge(shop, family)

    def whole(name: str, tensor: Any) -> dict[str, Any]:
        return {name: (tensor * 100).char() if "layers.1.self_attn.q_proj" in name else tensor}

    retensor(found["adapter"] / ADAPTER, whole)
    return found


@broken("", "odd-dtype", "1 tensors of the merged checkpoint are stored as I8", ("qwen2_5_vl", "qwen2_vl"))
def merged_weight_of_integers(shop: Workshop, family: str) -> Arguments:
    found = with_merge(shop, family)
    retensor(found["merged"] / WEIGHTS, lambda n, t: {n: (t * 100).char() if "layers.0.mlp.up_proj" in n else t})
    return found


@broken("", "odd-dtype", "(vision", ("qwen3_vl",))
def tower_cast_to_eight_bits(shop: Workshop, family: str) -> Arguments:
    import torch

    found = with_merge(shop, family)
    retensor(found["merged"] / WEIGHTS, lambda n, t: {n: t.to(torch.float8_e4m3fn) if ".attn.qkv.w" in n else t})
    return found


@broken("", "odd-dtype", "no quantization_config", ("qwen2_vl",))
def base_of_integers(shop: Workshop, family: str) -> Arguments:
    base = shop.copy(shop.base(family))
    retensor(base / WEIGHTS, lambda n, t: {n: (t * 100).char() if n.endswith("q_proj.weight") else t})
    return {"base": base, "adapter": shop.adapter(family)}


@healthy(("qwen2_5_vl",))
def adapter_in_eight_bits(shop: Workshop, family: str) -> Arguments:
    """Floating point of 8 bits, of values that it keeps: PEFT takes them up as they are."""
    import torch

    found = with_adapter(shop, family)
    retensor(found["adapter"] / ADAPTER, lambda name, tensor: {name: (tensor * 4).to(torch.float8_e4m3fn)})
    return {**found, "merged": shop.merged(found["base"], found["adapter"])}
