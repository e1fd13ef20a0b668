"""Merged checkpoints, broken and healthy (question 7)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytest_qvl.models.renamed import in_todays_layout

from .broken import broken
from .healthy import healthy
from .making import ADAPTER, BOTH_SIDES, CONFIG, FAMILIES, WEIGHTS, Arguments, Workshop, edit, retensor, with_merge


def _from_base(found: dict[str, Any], wanted: Callable[[str], bool]) -> None:
    """Put the base's own tensors back into the merged checkpoint."""
    from safetensors.torch import load_file

    base = {in_todays_layout(name): tensor for name, tensor in load_file(found["base"] / WEIGHTS).items()}

    def as_in_the_base(name: str, tensor: Any) -> dict[str, Any]:
        return {name: base[in_todays_layout(name)] if wanted(name) else tensor}

    retensor(found["merged"] / WEIGHTS, as_in_the_base)


@broken("OpenBMB/MiniCPM-V/issues/559", "not-merged", "language 21", FAMILIES)
def base_saved_in_place_of_the_merge(shop: Workshop, family: str) -> Arguments:
    found = with_merge(shop, family)
    _from_base(found, lambda name: True)
    return found


@broken("unslothai/unsloth-zoo/pull/1234", "not-merged", "6 of 10 adapted weights (language 6)")
def language_tower_left_out(shop: Workshop, family: str) -> Arguments:
    found = with_merge(shop, family, target_modules=BOTH_SIDES)
    _from_base(found, lambda name: "visual" not in name)
    return found


@broken("unslothai/unsloth/issues/1352", "not-merged", "vision 4", ("qwen2_vl", "qwen3_vl"))
def vision_tower_left_out(shop: Workshop, family: str) -> Arguments:
    found = with_merge(shop, family, target_modules=BOTH_SIDES)
    _from_base(found, lambda name: "visual" in name)
    return found


@broken("huggingface/peft/issues/2502", "merge-scaled", "merged twice (2 times")
def merged_twice(shop: Workshop, family: str) -> Arguments:
    found = with_merge(shop, family)
    return {**found, "merged": shop.merged(found["base"], found["adapter"], times=2)}


def _with_other_scaling(shop: Workshop, family: str, scaling: dict[str, Any], **lora: Any) -> Arguments:
    found = with_merge(shop, family, **lora)
    other = shop.copy(found["adapter"])
    edit(other / CONFIG, **scaling)
    return {**found, "merged": shop.merged(found["base"], other)}


@broken("Blaizzy/mlx-vlm/pull/986", "merge-scaled", "alpha in place of alpha / r", ("qwen2_5_vl", "qwen2_vl"))
def merged_with_alpha(shop: Workshop, family: str) -> Arguments:
    return _with_other_scaling(shop, family, {"lora_alpha": 128})


@broken("paiml/aprender/pull/2189", "merge-scaled", "in place of rsLoRA's")
def merged_as_plain_lora(shop: Workshop, family: str) -> Arguments:
    return _with_other_scaling(shop, family, {"use_rslora": False}, use_rslora=True)


@broken("hao-ai-lab/FastVideo/pull/870", "merge-scaled", "without its scaling")
def merged_without_scaling(shop: Workshop, family: str) -> Arguments:
    return _with_other_scaling(shop, family, {"lora_alpha": 8})


@broken("unslothai/unsloth/issues/195", "merged-into-packed", "NF4", ("qwen2_5_vl", "qwen3_vl"))
def merged_into_an_unpacked_base(shop: Workshop, family: str) -> Arguments:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from safetensors.torch import load_file

    found = with_merge(shop, family)
    base, added = load_file(found["base"] / WEIGHTS), _added(found["adapter"])

    def unpacked(name: str, tensor: Any) -> dict[str, Any]:
        update = next((value for module, value in added.items() if _end(name) == module), None)
        if update is None:
            return {name: tensor}
        packed = quantize_4bit(base[name], quant_type="nf4", blocksize=64, compress_statistics=True)
        return {name: (dequantize_4bit(*packed).float() + update).bfloat16()}

    retensor(found["merged"] / WEIGHTS, unpacked)
    return found


def _end(name: str) -> str:
    """The end of a name that every layout has."""
    return name[name.find("layers.") :].removesuffix(".weight")


def _added(adapter: Path) -> dict[str, Any]:
    """ΔW of every module in float32, by the end of its name; the scaling is that of the adapter as it was made."""
    from safetensors.torch import load_file

    tensors = load_file(adapter / ADAPTER)
    stems = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    return {_end(f"{s}.weight"): 2 * tensors[f"{s}.lora_B.weight"] @ tensors[f"{s}.lora_A.weight"] for s in stems}


@broken("huggingface/peft/issues/1035", "cast", "from BF16 to F16")
def cast_to_float16(shop: Workshop, family: str) -> Arguments:
    found = with_merge(shop, family)
    return {**found, "merged": shop.merged(found["base"], found["adapter"], dtype="float16")}


@broken("unslothai/unsloth/issues/3091", "merge-lost-most", "below half a step")
def most_of_it_rounded_away(shop: Workshop, family: str) -> Arguments:
    source, adapter = shop.base(family), shop.adapter(family)
    edit(adapter / CONFIG, lora_alpha=0.2)
    return {"base": source, "adapter": adapter, "merged": shop.merged(source, adapter)}


@broken("modelscope/ms-swift/issues/9187", "dropped", "(vision", FAMILIES)
def vision_tower_dropped(shop: Workshop, family: str) -> Arguments:
    found = with_merge(shop, family)
    retensor(found["merged"] / WEIGHTS, lambda name, tensor: {} if "visual" in name else {name: tensor})
    return found


@broken("huggingface/transformers/issues/38489", "renamed", "saved by a release or a tool")
def saved_under_other_names(shop: Workshop, family: str) -> Arguments:
    found = with_merge(shop, family)

    def renamed(name: str, tensor: Any) -> dict[str, Any]:
        return {name.replace("visual.", "vision_tower.model.") if "visual" in name else name: tensor}

    retensor(found["merged"] / WEIGHTS, renamed)
    return found


@broken("OpenGVLab/InternVL/issues/548", "adapter-beside", "ΔW lies beside the weights")
def saved_with_the_adapter_beside(shop: Workshop, family: str) -> Arguments:
    found = with_merge(shop, family)
    _from_base(found, lambda name: True)

    def beside(name: str, tensor: Any) -> dict[str, Any]:
        if not name.endswith("q_proj.weight"):
            return {name: tensor}
        stem = name.removesuffix(".weight")
        rows, columns = tensor.shape
        return {f"{stem}.base_layer.weight": tensor, f"{stem}.lora_A.default.weight": tensor.new_ones(8, columns),
                f"{stem}.lora_B.default.weight": tensor.new_ones(rows, 8)}  # fmt: skip

    retensor(found["merged"] / WEIGHTS, beside)
    return found


@broken("2U1/Qwen-VL-Series-Finetune/issues/231", "changed-elsewhere", "merger")
def merger_of_another_training(shop: Workshop, family: str) -> Arguments:
    found = with_merge(shop, family)
    retensor(found["merged"] / WEIGHTS, lambda n, t: {n: t * 1.25 if "merger" in n else t})
    return found


@broken("QwenLM/Qwen-VL/issues/415", "copy-not-merged", "lm_head.weight", ("qwen2_vl",))
def trained_head_left_behind(shop: Workshop, family: str) -> Arguments:
    found = with_merge(shop, family, modules_to_save=["lm_head"])
    _from_base(found, lambda name: "lm_head" in name)
    return found


@broken("huggingface/transformers/issues/45127", "head-tied-over", "tie_word_embeddings stayed true", ("qwen2_vl",))
def trained_head_tied_over(shop: Workshop, family: str) -> Arguments:
    """As the merge wrote it: a head of its own in the file, and a configuration by which vLLM ties it."""
    found = with_merge(shop, family, base={"tied": True})
    retensor(found["merged"] / WEIGHTS, _head_beside(1.25))
    return {**found, "runtime": "vllm"}


@broken("unslothai/unsloth/issues/1971", "head-untied", "lost when the checkpoint was saved", ("qwen2_vl", "qwen3_vl"))
def tied_head_untied(shop: Workshop, family: str) -> Arguments:
    found = with_merge(shop, family, base={"tied": True})
    retensor(found["merged"] / WEIGHTS, _head_beside(1.0))
    edit(found["merged"] / "config.json", _untie)
    return found


def _head_beside(factor: float) -> Callable[[str, Any], dict[str, Any]]:
    def change(name: str, tensor: Any) -> dict[str, Any]:
        return {name: tensor, **({"lm_head.weight": tensor * factor} if "embed_tokens" in name else {})}

    return change


def _untie(content: dict[str, Any]) -> None:
    content["tie_word_embeddings"] = False
    content.get("text_config", {})["tie_word_embeddings"] = False


@broken("huggingface/diffusers/pull/5316", "merge-not-finite", "hold NaN", ("qwen3_vl",))
def merged_beyond_the_range(shop: Workshop, family: str) -> Arguments:
    found = with_merge(shop, family)
    retensor(found["merged"] / WEIGHTS, lambda n, t: {n: t * float("inf") if "1.mlp.up_proj" in n else t})
    return found


@broken("cactus-compute/needle/pull/59", "merge-changes-nothing", "below half a step", ("qwen2_vl",))
def merged_and_nothing_changed(shop: Workshop, family: str) -> Arguments:
    source, adapter = shop.base(family), shop.adapter(family)
    edit(adapter / CONFIG, lora_alpha=1e-9)  # below half a step of the smallest weight that any draw has
    return {"base": source, "adapter": adapter, "merged": shop.merged(source, adapter)}


@healthy()
def merged_in_bfloat16(shop: Workshop, family: str) -> Arguments:
    return with_merge(shop, family)


@healthy(("qwen2_5_vl",))
def merged_in_float32(shop: Workshop, family: str) -> Arguments:
    found = with_merge(shop, family)
    return {**found, "merged": shop.merged(found["base"], found["adapter"], dtype="float32")}


@healthy(("qwen2_vl", "qwen3_vl"))
def merged_dora(shop: Workshop, family: str) -> Arguments:
    return with_merge(shop, family, use_dora=True)


@healthy(("qwen2_5_vl",))
def merged_rslora(shop: Workshop, family: str) -> Arguments:
    return with_merge(shop, family, use_rslora=True, rank_pattern={"q_proj": 4}, alpha_pattern={"down_proj": 64})


@healthy(("qwen2_5_vl", "qwen3_vl"))
def merged_with_trained_head_and_embeddings(shop: Workshop, family: str) -> Arguments:
    return with_merge(shop, family, modules_to_save=["lm_head", "embed_tokens"])


@healthy(("qwen2_vl",))
def merged_with_a_trained_merger(shop: Workshop, family: str) -> Arguments:
    return with_merge(shop, family, modules_to_save=["merger"])


_WITH_BIAS = r".*language_model.*\.[qkv]_proj"


@healthy(("qwen2_5_vl", "qwen2_vl"))
def merged_biases_of_b(shop: Workshop, family: str) -> Arguments:
    return with_merge(shop, family, target_modules=_WITH_BIAS, lora_bias=True)


@broken("", "not-merged", "self_attn.q_proj.bias", ("qwen2_5_vl",))
def biases_of_b_left_out(shop: Workshop, family: str) -> Arguments:
    found = with_merge(shop, family, target_modules=_WITH_BIAS, lora_bias=True)
    _from_base(found, lambda name: name.endswith(".bias"))
    return found


@broken("", "biases-lost", "self_attn.o_proj.bias", ("qwen2_vl",))
def biases_without_a_place(shop: Workshop, family: str) -> Arguments:
    """Layers without a bias: PEFT refuses, and another tool takes A and B alone."""
    source = shop.base(family)
    adapter = shop.adapter(family, target_modules=r".*language_model.*\.o_proj", lora_bias=True)
    plain = shop.copy(adapter)
    edit(plain / CONFIG, lora_bias=False)
    retensor(plain / ADAPTER, lambda name, tensor: {} if name.endswith(".bias") else {name: tensor})
    return {"base": source, "adapter": adapter, "merged": shop.merged(source, plain)}


@healthy(("qwen2_vl",))
def merged_onto_a_tied_base(shop: Workshop, family: str) -> Arguments:
    return with_merge(shop, family, base={"tied": True})


@healthy(("qwen2_5_vl",))
def merged_embeddings_and_tokens(shop: Workshop, family: str) -> Arguments:
    return with_merge(shop, family, target_modules=["q_proj"], trainable_token_indices=[5, 7])


@healthy(("qwen3_vl", "qwen2_vl"))
def merged_tokens_trained_in_float32(shop: Workshop, family: str) -> Arguments:
    """Three rows of their own values, rounded to bfloat16 by the merge."""
    found = with_merge(shop, family, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 7, 11]})

    def trained(name: str, tensor: Any) -> dict[str, Any]:
        return {name: tensor * 1.001 + 1e-4 if "token_adapter" in name else tensor}

    retensor(found["adapter"] / ADAPTER, trained)
    return {**found, "merged": shop.merged(found["base"], found["adapter"])}


@healthy(("qwen3_vl",))
def merged_adapted_embeddings_and_head(shop: Workshop, family: str) -> Arguments:
    return with_merge(shop, family, target_modules=["q_proj", "embed_tokens", "lm_head"])


@healthy(("qwen2_vl",))
def merged_tower_and_convolution(shop: Workshop, family: str) -> Arguments:
    return with_merge(shop, family, target_modules=r".*(patch_embed\.proj|visual.*qkv|language_model.*q_proj)")


@healthy(("qwen2_5_vl",))
def merged_into_the_packed_base_that_was_given(shop: Workshop, family: str) -> Arguments:
    """The adapter was trained on the 4-bit base; its weights, unpacked, are the base."""
    from safetensors.torch import load_file, save_file

    from pytest_qvl.preflight.files.folder import Folder
    from pytest_qvl.preflight.files.headers import read_headers
    from pytest_qvl.preflight.weights import Weights

    packed = shop.packed(family, bnb_4bit_use_double_quant=True)
    adapter = shop.adapter(family, base=shop.base(family))
    merged = shop.merged(shop.base(family), adapter)
    made, added = load_file(merged / WEIGHTS), _added(adapter)
    weights = Weights(read_headers(Folder(packed)))
    for name in made:
        today = in_todays_layout(name)
        if weights.is_packed(today):
            unpacked = weights.rows(today, [(0, weights.shape(today)[0])])[0].bfloat16()
            made[name] = (unpacked.float() + added[_end(name)]).bfloat16()
    save_file(made, merged / WEIGHTS, metadata={"format": "pt"})
    return {"base": packed, "adapter": adapter, "merged": merged}


@healthy(("qwen2_5_vl", "qwen3_vl"))
def merged_into_what_the_packed_base_was_packed_from(shop: Workshop, family: str) -> Arguments:
    """As Unsloth does: the adapter names the 4-bit repository, the merge takes the 16-bit one's weights."""
    found = with_merge(shop, family, target_modules=["q_proj", "up_proj"], exclude_modules=r".*visual.*")
    return {**found, "base": shop.packed(family, bnb_4bit_use_double_quant=family == "qwen3_vl")}


@broken("huggingface/peft/issues/2586", "not-merged", "ΔW is not in them", ("qwen2_5_vl",))
def sixteen_bit_base_saved_in_place_of_the_merge(shop: Workshop, family: str) -> Arguments:
    found = with_merge(shop, family)
    _from_base(found, lambda name: True)
    return {**found, "base": shop.packed(family, bnb_4bit_use_double_quant=True)}


@broken("huggingface/peft/issues/2321", "changed-elsewhere", "does not touch", ("qwen2_5_vl",))
def another_weight_changed_below_a_packed_base(shop: Workshop, family: str) -> Arguments:
    found = with_merge(shop, family, target_modules=["q_proj"])
    retensor(found["merged"] / WEIGHTS, lambda n, t: {n: t * 1.25 if "1.mlp.down_proj" in n else t})
    return {**found, "base": shop.packed(family, bnb_4bit_use_double_quant=True)}
