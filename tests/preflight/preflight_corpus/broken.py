"""Ways in which artefacts are broken in public threads, each with the finding that must name it."""

from __future__ import annotations

from collections.abc import Callable

from .making import (
    ADAPTER,
    BOTH_SIDES,
    CONFIG,
    FAMILIES,
    LANGUAGE_ONLY,
    Arguments,
    Case,
    Workshop,
    drop,
    edit,
    old_names,
    rename,
    with_adapter,
    with_edits,
)

BROKEN: list[Case] = []
_GITHUB = "https://github.com/"


def broken(
    thread: str, red: str, words: str, families: tuple[str, ...] = ("qwen2_5_vl",), versions: str = ""
) -> Callable[[Callable[[Workshop, str], Arguments]], Callable[[Workshop, str], Arguments]]:
    """Register a way to be broken, for each of the families; the thread is a path on GitHub, or empty."""

    def register(build: Callable[[Workshop, str], Arguments]) -> Callable[[Workshop, str], Arguments]:
        name = build.__name__.replace("_", "-")
        for family in families:
            BROKEN.append(Case(name, family, build, tuple(red.split()), words, thread and _GITHUB + thread, versions))
        return build

    return register


# 1: what will be in 4 bits


@broken(
    "1038lab/ComfyUI-JoyCaption/issues/53",
    "idle-skip-entry vision-in-four-bits",
    "'model.visual' would",
    FAMILIES,
    versions=">=5",
)
def skip_entry_of_transformers_4(shop: Workshop, family: str) -> Arguments:
    return {"base": shop.base(family), "skip": ["visual", "lm_head"]}


@broken("huggingface/transformers/issues/45674", "lm-head-in-four-bits", "replaces the default")
def list_without_the_head(shop: Workshop, family: str) -> Arguments:
    return {"base": shop.base(family), "skip": ["model.visual"]}


@broken("huggingface/transformers/pull/45734", "lm-head-in-four-bits", "fails in its first forward", ("qwen2_vl",))
def list_without_a_tied_head(shop: Workshop, family: str) -> Arguments:
    return {"base": shop.base(family, tied=True), "skip": ["model.visual"]}


@broken("unslothai/unsloth/issues/3639", "vision-in-four-bits", "no entry of the list keeps vision", ("qwen3_vl",))
def vision_left_to_be_quantized(shop: Workshop, family: str) -> Arguments:
    return {"base": shop.base(family), "skip": ["lm_head"]}


@broken("huggingface/transformers/issues/29691", "wide-skip-entry", "layers 10-11", versions=">=5,<5.21")
def entry_that_covers_ten_layers(shop: Workshop, family: str) -> Arguments:
    entries = ["model.visual", "lm_head", "model.language_model.layers.1"]
    return {"base": shop.base(family, layers=12), "skip": entries}


@broken("vllm-project/llm-compressor/issues/1766", "idle-skip-entry vision-in-four-bits", "'model.visual' would")
def pattern_of_another_tool(shop: Workshop, family: str) -> Arguments:
    return {"base": shop.base(family), "skip": ["visual.*", "lm_head"]}


@broken("unslothai/unsloth/issues/4208", "idle-skip-entry", "'model.visual.merger' would", versions=">=5")
def merger_by_its_old_name(shop: Workshop, family: str) -> Arguments:
    return {"base": shop.base(family), "skip": ["lm_head", "model.visual.blocks", "visual.merger"]}


# 2: which modules get an adapter


@broken("yiqiao-yin/deepspeed-course/issues/31", "leak", "vision 12")
def seven_names_hit_the_tower(shop: Workshop, family: str) -> Arguments:
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return {"base": shop.base(family), "lora": {"r": 8, "target_modules": names}}


@broken("huggingface/peft/pull/2267", "leak", "merger 2", FAMILIES)
def all_linear_hits_the_merger(shop: Workshop, family: str) -> Arguments:
    return {"base": shop.base(family), "lora": {"r": 8, "target_modules": "all-linear"}}


@broken("axolotl-ai-cloud/axolotl/pull/2793", "no-target", "before Transformers 4.52", FAMILIES)
def expression_of_the_old_layout(shop: Workshop, family: str) -> Arguments:
    return {"base": shop.base(family), "lora": {"r": 8, "target_modules": r"model\.layers\.\d+\.self_attn\.q_proj"}}


@broken("axolotl-ai-cloud/axolotl/issues/2735", "bare-layers", "layers 1-2 get none")
def expression_of_one_digit(shop: Workshop, family: str) -> Arguments:
    return {"base": shop.base(family), "lora": {"r": 8, "target_modules": r".*language_model\.layers\.0\..*_proj"}}


@broken("modelscope/ms-swift/issues/7318", "text-side-bare", "match nothing in the language backbone", ("qwen3_vl",))
def only_the_tower_is_adapted(shop: Workshop, family: str) -> Arguments:
    return {"base": shop.base(family), "lora": {"r": 8, "target_modules": ["qkv", "linear_fc1"]}}


@broken("ruimalheiro/gradient-garden/issues/31", "idle-target", "passes over entries", ("qwen2_vl",))
def names_of_another_architecture(shop: Workshop, family: str) -> Arguments:
    return {"base": shop.base(family), "lora": {"r": 8, "target_modules": ["q_proj", "c_attn"]}}


@broken("unslothai/unsloth/issues/9326", "unlike-the-plan", "2 modules asked for are not adapted", ("qwen3_vl",))
def targets_filtered_by_the_trainer(shop: Workshop, family: str) -> Arguments:
    """The adapter and its own configuration agree; only the wish tells."""
    asked = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "lm_head", "embed_tokens"]}
    return {**with_adapter(shop, family, target_modules=["q_proj"]), "lora": asked}


@broken("hiyouga/LlamaFactory/issues/6754", "idle-target", "modules_to_save names 'multi_modal_projector'")
def merger_by_another_familys_name(shop: Workshop, family: str) -> Arguments:
    lora = {"r": 8, "target_modules": LANGUAGE_ONLY, "modules_to_save": ["multi_modal_projector"]}
    return {"base": shop.base(family), "lora": lora}


@broken("", "leak", "target_parameters ['mlp.gate_proj.weight']", ("qwen2_5_vl",))
def parameter_of_the_tower_too(shop: Workshop, family: str) -> Arguments:
    return with_adapter(shop, family, target_modules=["q_proj"], target_parameters=["mlp.gate_proj.weight"])


# 3: what becomes of each key


@broken(
    "huggingface/transformers/pull/38627", "old-layout", "before 4.52", ("qwen2_vl", "qwen2_5_vl"), versions=">=5.4"
)
def saved_before_4_52(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    rename(found["adapter"] / ADAPTER, old_names)
    return found


@broken("illuin-tech/colpali/issues/424", "old-layout", "vision", ("qwen2_vl", "qwen2_5_vl"), versions=">=5.4")
def saved_before_4_52_with_vision(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family, target_modules=BOTH_SIDES)
    rename(found["adapter"] / ADAPTER, old_names)
    return found


@broken("huggingface/peft/issues/2699", "adapter-name-in-keys", "'captions'", FAMILIES)
def saved_by_torch_save(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    rename(found["adapter"] / ADAPTER, lambda name: name.replace(".weight", ".captions.weight"))
    return found


@broken("huggingface/peft/issues/1579", "prefix-missing", "lack the prefix")
def saved_without_the_prefix(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    rename(found["adapter"] / ADAPTER, lambda name: name.removeprefix("base_model.model."))
    return found


@broken("", "prefix-doubled", "twice", ("qwen3_vl",))
def wrapped_twice(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    rename(found["adapter"] / ADAPTER, lambda name: f"base_model.model.{name}")
    return found


@broken("MakazhanAlpamys/Soup/issues/335", "wrapper-in-keys", "'_orig_mod'")
def saved_from_a_compiled_model(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    rename(found["adapter"] / ADAPTER, lambda name: f"_orig_mod.{name}")
    return found


@broken("vllm-project/vllm/issues/34186", "vllm-layout", "as vLLM names them", ("qwen3_vl",))
def renamed_for_a_server(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    rename(found["adapter"] / ADAPTER, lambda name: name.replace("model.language_model.", "language_model.model."))
    return found


@broken("unslothai/unsloth/issues/9326", "keys-missing", "every embed_tokens, every lm_head")
def head_and_embeddings_dropped(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family, target_modules=["q_proj", "lm_head", "embed_tokens"])
    drop(found["adapter"] / ADAPTER, lambda name: "lm_head" in name or "embed_tokens" in name)
    return found


@broken(
    "huggingface/transformers/issues/42701", "keys-missing", "modules that adapter_config.json asks for", ("qwen3_vl",)
)
def layers_lost_on_the_way(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    drop(found["adapter"] / ADAPTER, lambda name: ".layers.2." in name)
    return found


@broken("", "keys-beyond-targets", "does not ask for")
def configuration_of_another_training(shop: Workshop, family: str) -> Arguments:
    return with_edits(shop, family, target_modules=["q_proj", "v_proj"])


@broken("", "half-pairs", "only one of the two matrices", ("qwen2_vl",))
def file_cut_off(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    drop(found["adapter"] / ADAPTER, lambda name: ".layers.2.mlp" in name and "lora_B" in name)
    return found


@broken("ymcui/Chinese-LLaMA-Alpaca/issues/302", "other-rank", "says 16", FAMILIES)
def rank_edited(shop: Workshop, family: str) -> Arguments:
    return with_edits(shop, family, r=16)


@broken("huggingface/autotrain-advanced/issues/487", "other-size", "another size")
def base_of_another_size(shop: Workshop, family: str) -> Arguments:
    return {"base": "qwen2.5-vl-7b", "adapter": shop.adapter(family)}


@broken("2U1/Qwen-VL-Series-Finetune/issues/37", "other-family", "Qwen2.5-VL")
def adapter_of_another_family(shop: Workshop, family: str) -> Arguments:
    adapter = shop.adapter(family, target_modules=r".*(visual|language_model).*\.(q_proj|gate_proj)")
    return {"base": shop.base("qwen3_vl"), "adapter": adapter}


@broken("", "other-base", "which is qwen2_5_vl")
def base_of_another_generation(shop: Workshop, family: str) -> Arguments:
    return with_edits(shop, family, base_model_name_or_path="Qwen/Qwen2-VL-7B-Instruct")


@broken("invergent-ai/surogate/issues/173", "alpha-zero", "multiplied by zero", ("qwen2_vl",))
def alpha_is_zero(shop: Workshop, family: str) -> Arguments:
    return with_edits(shop, family, lora_alpha=0)


@broken("", "dora-differs", "use_dora=False", ("qwen3_vl",))
def dora_switched_on_afterwards(shop: Workshop, family: str) -> Arguments:
    return with_edits(shop, family, use_dora=True)


@broken("", "lora-bias-differs", "put back lora_bias=True", ("qwen2_vl",))
def biases_switched_off_afterwards(shop: Workshop, family: str) -> Arguments:
    return with_edits(shop, family, {"lora_bias": True}, lora_bias=False)


@broken("vllm-project/vllm/issues/23796", "vllm-tower", "leaves out")
def tower_served_by_vllm(shop: Workshop, family: str) -> Arguments:
    return {**with_adapter(shop, family, target_modules=BOTH_SIDES), "runtime": "vllm"}


@broken("vllm-project/vllm/issues/55193", "vllm-no-module", "serves the base where it finds none", ("qwen3_vl",))
def old_names_served_by_vllm(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    rename(found["adapter"] / ADAPTER, old_names)
    return {**found, "runtime": "vllm"}


@broken("vllm-project/vllm/issues/6983", "vllm-unsupported", "use_dora", ("qwen2_vl",))
def dora_served_by_vllm(shop: Workshop, family: str) -> Arguments:
    return {**with_adapter(shop, family, use_dora=True), "runtime": "vllm"}


@broken("", "unsloth-base", "is no folder here", ("qwen2_vl",))
def folder_of_another_machine(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    edit(found["adapter"] / CONFIG, base_model_name_or_path="/mnt/disks/data/base")
    return {**found, "runtime": "unsloth"}


@broken("vllm-project/vllm/issues/9280", "vllm-unsupported", "modules_to_save", ("qwen2_5_vl",))
def head_trained_whole_served_by_vllm(shop: Workshop, family: str) -> Arguments:
    return {**with_adapter(shop, family, modules_to_save=["lm_head"]), "runtime": "vllm"}


@broken("vllm-project/vllm/issues/2847", "vllm-rank", "--max-lora-rank 32", ("qwen3_vl",))
def rank_that_vllm_refuses(shop: Workshop, family: str) -> Arguments:
    return {**with_adapter(shop, family, r=32), "runtime": "vllm"}
