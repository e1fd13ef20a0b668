"""Adapters whose start took a part out of the base, by PEFT's own PiSSA and OLoRA (questions 4 and 7)."""

from __future__ import annotations

from typing import Any

from .broken import broken
from .healthy import healthy
from .making import CONFIG, Arguments, Workshop, edit


def _started(shop: Workshop, family: str, init: str, **lora: Any) -> dict[str, Any]:
    return {"base": shop.base(family), "adapter": shop.adapter(family, init_lora_weights=init, **lora)}


def _merged(shop: Workshop, family: str, init: str, *, dtype: str = "bfloat16", **lora: Any) -> dict[str, Any]:
    found = _started(shop, family, init, **lora)
    return {**found, "merged": shop.merged(found["base"], found["adapter"], dtype=dtype)}


@healthy(("qwen2_5_vl", "qwen3_vl"))
def started_by_olora(shop: Workshop, family: str) -> Arguments:
    return _started(shop, family, "olora")


@healthy(("qwen2_vl",))
def started_by_pissa(shop: Workshop, family: str) -> Arguments:
    return _started(shop, family, "pissa")


@broken("", "start-not-repeatable", "another part with every load")
def merged_from_random_pissa(shop: Workshop, family: str) -> Arguments:
    """Each load draws another start, so the merge is not judged."""
    return _merged(shop, family, "pissa_niter_4")


@healthy(("qwen2_vl", "qwen3_vl"))
def merged_from_pissa(shop: Workshop, family: str) -> Arguments:
    return _merged(shop, family, "pissa")


@healthy(("qwen2_5_vl", "qwen2_vl"))
def merged_from_olora(shop: Workshop, family: str) -> Arguments:
    return _merged(shop, family, "olora", use_rslora=True)


@healthy(("qwen2_5_vl",))
def merged_from_olora_in_float32(shop: Workshop, family: str) -> Arguments:
    return _merged(shop, family, "olora", dtype="float32")


@healthy(("qwen2_5_vl",))
def merged_from_pissa_with_dora(shop: Workshop, family: str) -> Arguments:
    return _merged(shop, family, "pissa", use_dora=True)


@broken("", "start-left-in", "took A and B for plain LoRA", ("qwen2_5_vl", "qwen2_vl"))
def start_left_in_the_base(shop: Workshop, family: str) -> Arguments:
    """A merge by the rules of plain LoRA of an adapter that started as OLoRA."""
    found = _started(shop, family, "olora")
    plain = shop.copy(found["adapter"])
    edit(plain / CONFIG, init_lora_weights=True)
    return {**found, "merged": shop.merged(found["base"], plain)}


@broken("", "merge-differs", "not base plus adapter", ("qwen3_vl",))
def another_checkpoint_of_pissa_merged(shop: Workshop, family: str) -> Arguments:
    found = _started(shop, family, "pissa")
    other = shop.copy(found["adapter"])
    edit(other / CONFIG, lora_alpha=8)
    return {**found, "merged": shop.merged(found["base"], other)}


@broken("", "vllm-unsupported", "takes a part out of the base", ("qwen2_vl",))
def pissa_served_by_vllm(shop: Workshop, family: str) -> Arguments:
    return {**_started(shop, family, "pissa"), "runtime": "vllm"}
