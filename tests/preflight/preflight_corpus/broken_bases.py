"""What is wrong with a base's own files (question 5), each with the finding that must name it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .broken import broken
from .making import FAMILIES, WEIGHTS, Arguments, Workshop, drop, edit, retensor


def _packed(shop: Workshop, family: str, **changes: Any) -> Path:
    return shop.copy(shop.packed(family, **changes))


def _quantization(folder: Path, **changes: Any) -> Arguments:
    edit(folder / "config.json", lambda content: content["quantization_config"].update(changes))
    return {"base": folder}


@broken("unslothai/unsloth/issues/10010", "states-missing", "no quantization state", FAMILIES)
def states_not_saved(shop: Workshop, family: str) -> Arguments:
    folder = _packed(shop, family)
    drop(folder / WEIGHTS, lambda name: "quant_state" in name)
    return {"base": folder}


@broken(
    "unslothai/unsloth/issues/4209",
    "idle-skip-entry kept-but-not-skipped",
    "find no state",
    ("qwen2_5_vl",),
    versions=">=5",
)
def saved_by_transformers_4(shop: Workshop, family: str) -> Arguments:
    return _quantization(_packed(shop, family), llm_int8_skip_modules=["visual", "lm_head"])


@broken("", "packed-but-skipped", "takes packed bytes for weights")
def list_edited_after_saving(shop: Workshop, family: str) -> Arguments:
    entries = ["model.visual", "lm_head", "model.language_model.layers.1.mlp"]
    return _quantization(_packed(shop, family), llm_int8_skip_modules=entries)


@broken("bitsandbytes-foundation/bitsandbytes/issues/2077", "slow-compute", "defaults to float32", ("qwen3_vl",))
def compute_dtype_left_out(shop: Workshop, family: str) -> Arguments:
    return _quantization(_packed(shop, family), bnb_4bit_compute_dtype="float32")


@broken("bitsandbytes-foundation/bitsandbytes/issues/1623", "not-nf4", "defaults to fp4", ("qwen2_vl",))
def saved_in_fp4(shop: Workshop, family: str) -> Arguments:
    return {"base": shop.packed(family, bnb_4bit_quant_type="fp4")}


@broken("", "nesting-differs", "stored otherwise")
def double_quantization_denied(shop: Workshop, family: str) -> Arguments:
    return _quantization(_packed(shop, family), bnb_4bit_use_double_quant=False)


@broken("NVIDIA-NeMo/Automodel/pull/2358", "configuration-lost", "quantization_config", ("qwen3_vl",))
def quantization_block_dropped(shop: Workshop, family: str) -> Arguments:
    folder = _packed(shop, family)
    edit(folder / "config.json", quantization_config=None)
    return {"base": folder}


@broken("bitsandbytes-foundation/bitsandbytes/pull/1971", "state-broken", "is BF16 and not F32")
def statistics_cast_to_sixteen_bits(shop: Workshop, family: str) -> Arguments:
    folder = _packed(shop, family)
    cast = ("quant_map", "nested_absmax")
    retensor(folder / WEIGHTS, lambda name, t: {name: t.bfloat16() if name.endswith(cast) else t})
    return {"base": folder}


@broken("hiyouga/LlamaFactory/issues/7837", "incomplete", "lacks", FAMILIES)
def shard_not_uploaded(shop: Workshop, family: str) -> Arguments:
    folder = shop.copy(shop.base(family))
    drop(folder / WEIGHTS, lambda name: ".layers.2.mlp." in name)
    return {"base": folder}


@broken("modelscope/ms-swift/issues/9753", "incomplete", "lm_head", ("qwen2_5_vl",))
def head_not_saved(shop: Workshop, family: str) -> Arguments:
    folder = shop.copy(shop.base(family))
    drop(folder / WEIGHTS, lambda name: name.startswith("lm_head"))
    return {"base": folder}


@broken("QwenLM/Qwen3-VL/issues/1402", "incomplete", "the vocabulary was changed", ("qwen2_vl",))
def vocabulary_of_another_size(shop: Workshop, family: str) -> Arguments:
    folder = shop.copy(shop.base(family))

    def shrink(content: dict[str, Any]) -> None:
        content["text_config"]["vocab_size"] -= 8

    edit(folder / "config.json", shrink)
    return {"base": folder}
