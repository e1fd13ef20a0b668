"""Set-ups on which every red finding is a false alarm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .making import (
    ADAPTER,
    CONFIG,
    FAMILIES,
    Arguments,
    Case,
    Workshop,
    edit,
    retensor,
    with_adapter,
    with_edits,
    with_processor,
)

HEALTHY: list[Case] = []
# As Unsloth's ``get_peft_regex`` writes it for the language side, and for both sides.
_UNSLOTH_TEXT = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
)
_UNSLOTH_BOTH = (
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj|qkv|proj|linear_fc1|linear_fc2).*?)"
)

_PARAMETERS = ["self_attn.q_proj.weight"]


def healthy(
    families: tuple[str, ...] = FAMILIES,
) -> Callable[[Callable[[Workshop, str], Arguments]], Callable[[Workshop, str], Arguments]]:
    """Register a healthy set-up, for each of the families."""

    def register(build: Callable[[Workshop, str], Arguments]) -> Callable[[Workshop, str], Arguments]:
        for family in families:
            HEALTHY.append(Case(build.__name__.replace("_", "-"), family, build))
        return build

    return register


@healthy()
def base_alone(shop: Workshop, family: str) -> Arguments:
    return {"base": shop.base(family)}


@healthy()
def language_backbone_by_an_expression(shop: Workshop, family: str) -> Arguments:
    return with_adapter(shop, family)


@healthy()
def saved_under_another_name(shop: Workshop, family: str) -> Arguments:
    return with_adapter(shop, family, name="captions")


@healthy()
def dora(shop: Workshop, family: str) -> Arguments:
    return with_adapter(shop, family, use_dora=True)


@healthy()
def rslora_with_patterns(shop: Workshop, family: str) -> Arguments:
    patterns = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"down_proj": 64}}
    return with_adapter(shop, family, use_rslora=True, **patterns)


@healthy()
def head_and_embeddings_trained_whole(shop: Workshop, family: str) -> Arguments:
    return with_adapter(shop, family, modules_to_save=["lm_head", "embed_tokens"])


@healthy()
def merger_trained_whole(shop: Workshop, family: str) -> Arguments:
    """Weights and biases: two tensors of one module."""
    return with_adapter(shop, family, modules_to_save=["merger"])


@healthy(("qwen2_vl", "qwen2_5_vl"))
def key_projections_trained_whole(shop: Workshop, family: str) -> Arguments:
    return with_adapter(shop, family, target_modules=r".*language_model.*\.[qv]_proj", modules_to_save=["k_proj"])


@healthy()
def matrices_with_a_bias(shop: Workshop, family: str) -> Arguments:
    return with_adapter(shop, family, lora_bias=True)


@healthy(("qwen3_vl", "qwen2_5_vl"))
def by_parameters(shop: Workshop, family: str) -> Arguments:
    return with_adapter(shop, family, target_modules=r".*language_model.*\.[kv]_proj", target_parameters=_PARAMETERS)


@healthy(("qwen2_vl",))
def by_parameters_alone(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family, target_modules=[], target_parameters=_PARAMETERS)
    return {**found, "merged": shop.merged(found["base"], found["adapter"])}


@healthy()
def some_layers_on_purpose(shop: Workshop, family: str) -> Arguments:
    return with_adapter(shop, family, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 2])


@healthy()
def unsloth_language_only(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family, target_modules=_UNSLOTH_TEXT, task_type="CAUSAL_LM")
    edit(found["adapter"] / CONFIG, base_model_name_or_path=str(found["base"]), lora_dropout=0, peft_version="0.18.1")
    return found


@healthy()
def unsloth_vision_and_language(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family, target_modules=_UNSLOTH_BOTH, task_type="CAUSAL_LM")
    edit(found["adapter"] / CONFIG, unsloth_fixed=True)
    return {**found, "runtime": "unsloth"}


@healthy()
def configuration_of_an_older_peft(shop: Workshop, family: str) -> Arguments:
    """Without the fields that later releases have added."""
    found = with_adapter(shop, family)
    kept = ("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha", "lora_dropout")
    kept += ("modules_to_save", "peft_type", "r", "target_modules", "task_type", "layers_to_transform")

    def older(content: dict[str, Any]) -> None:
        for name in [name for name in content if name not in kept]:
            del content[name]

    edit(found["adapter"] / CONFIG, older)
    return found


@healthy()
def fields_of_a_newer_peft(shop: Workshop, family: str) -> Arguments:
    return with_edits(shop, family, a_field_of_next_year={"on": True})


@healthy()
def sixteen_bit_matrices(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    retensor(found["adapter"] / ADAPTER, lambda name, tensor: {name: tensor.half()})
    return found


@healthy(("qwen3_vl", "qwen2_vl"))
def seven_names_where_the_tower_has_none_of_them(shop: Workshop, family: str) -> Arguments:
    return with_adapter(
        shop, family, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


@healthy()
def only_attention(shop: Workshop, family: str) -> Arguments:
    return with_adapter(shop, family, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])


@healthy()
def head_adapted(shop: Workshop, family: str) -> Arguments:
    return with_adapter(shop, family, target_modules=["q_proj", "lm_head"])


@healthy()
def served_by_vllm(shop: Workshop, family: str) -> Arguments:
    return {**with_adapter(shop, family), "runtime": "vllm"}


@healthy()
def a_plan(shop: Workshop, family: str) -> Arguments:
    return {"base": shop.base(family), "lora": {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}}


@healthy()
def a_list_with_entries_of_every_family(shop: Workshop, family: str) -> Arguments:
    skip = ["model.visual", "lm_head", "multi_modal_projector", "merger", "modality_projection", "router"]
    return {"base": shop.base(family), "skip": skip}


@healthy()
def base_saved_in_4_bits(shop: Workshop, family: str) -> Arguments:
    return {"base": shop.packed(family), "adapter": shop.adapter(family)}


@healthy(("qwen2_5_vl", "qwen3_vl"))
def base_saved_with_single_quantization(shop: Workshop, family: str) -> Arguments:
    return {"base": shop.packed(family, bnb_4bit_use_double_quant=False)}


@healthy()
def base_saved_with_layers_kept_by_name(shop: Workshop, family: str) -> Arguments:
    """As Unsloth's dynamic 4-bit bases: a list for every family, and layers that lose too much in 4 bits."""
    general = ("lm_head", "multi_modal_projector", "merger", "modality_projection", "model.visual")
    return {"base": shop.packed(family, skip=(*general, "model.language_model.layers.1.mlp.down_proj"))}


@healthy()
def processor_beside_the_adapter(shop: Workshop, family: str) -> Arguments:
    return with_processor(shop, family)


@healthy()
def fewer_pixels_on_purpose(shop: Workshop, family: str) -> Arguments:
    found = with_processor(shop, family)
    edit(found["adapter"] / "preprocessor_config.json", min_pixels=200704, max_pixels=1003520)
    return found


@healthy(("qwen2_vl", "qwen3_vl"))
def made_as_planned(shop: Workshop, family: str) -> Arguments:
    asked = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    return {**with_adapter(shop, family, target_modules=["q_proj", "v_proj"]), "lora": asked}
