"""Ways in which artefacts are broken in public threads, each with the finding that must name it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .making import (
    ADAPTER,
    CONFIG,
    FAMILIES,
    LANGUAGE_ONLY,
    PROCESSOR,
    WEIGHTS,
    Arguments,
    Case,
    Workshop,
    drop,
    edit,
    in_shards,
    old_names,
    rename,
    retensor,
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
    found = with_adapter(shop, family, target_modules=r".*(visual|language_model).*\.(q_proj|v_proj|qkv)")
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


@broken("", "alpha-zero", "multiplied by zero", ("qwen2_vl",))
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
    targets = r".*(visual|language_model).*\.(q_proj|v_proj|qkv)"
    return {**with_adapter(shop, family, target_modules=targets), "runtime": "vllm"}


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


# 5: the base's files


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


@broken("", "incomplete", "lacks", FAMILIES)
def shard_not_uploaded(shop: Workshop, family: str) -> Arguments:
    folder = shop.copy(shop.base(family))
    drop(folder / WEIGHTS, lambda name: ".layers.2.mlp." in name)
    return {"base": folder}


@broken("", "incomplete", "lm_head", ("qwen2_5_vl",))
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


# 6: processor, tokenizer, template


def _beside(shop: Workshop, family: str, **lora: Any) -> dict[str, Any]:
    """An adapter with the base's processor beside it."""
    found = with_adapter(shop, family, **lora)
    for name in PROCESSOR:
        shutil.copy(found["base"] / name, found["adapter"])
    return found


@broken("unslothai/unsloth/issues/4671", "no-image-processor", "only the tokenizer was saved", FAMILIES)
def only_the_tokenizer_saved(shop: Workshop, family: str) -> Arguments:
    processor = shop.copy(shop.base(family))
    (processor / "preprocessor_config.json").unlink()
    return {**with_adapter(shop, family), "processor": processor}


@broken("QwenLM/Qwen3-VL/issues/1715", "no-template", "was not saved")
def template_not_saved(shop: Workshop, family: str) -> Arguments:
    found = _beside(shop, family)
    (found["adapter"] / "chat_template.json").unlink()
    edit(found["adapter"] / "tokenizer_config.json", chat_template=None)
    return found


@broken("sgl-project/sglang/issues/12390", "other-patches", "patch_size 14 instead of 16", ("qwen3_vl",))
def patches_of_another_family(shop: Workshop, family: str) -> Arguments:
    found = _beside(shop, family)
    edit(found["adapter"] / "preprocessor_config.json", patch_size=14)
    return found


@broken("unslothai/unsloth/issues/1747", "other-scale other-processor", "shifted", ("qwen3_vl",))
def processor_of_another_family(shop: Workshop, family: str) -> Arguments:
    found = _beside(shop, family)
    shutil.copy(shop.base("qwen2_5_vl") / "preprocessor_config.json", found["adapter"])
    edit(found["adapter"] / "preprocessor_config.json", patch_size=16)
    return found


@broken("huggingface/transformers/issues/41955", "limits-contradict", "given twice", ("qwen2_vl",))
def limit_that_does_nothing(shop: Workshop, family: str) -> Arguments:
    found = _beside(shop, family)
    size = {"shortest_edge": 3136, "longest_edge": 12845056}
    edit(found["adapter"] / "preprocessor_config.json", max_pixels=1003520, size=size)
    return found


@broken("", "limits-impossible", "least must not be above most")
def limits_swapped(shop: Workshop, family: str) -> Arguments:
    found = _beside(shop, family)
    edit(found["adapter"] / "preprocessor_config.json", min_pixels=12845056, max_pixels=3136)
    return found


@broken("hiyouga/LlamaFactory/issues/8823", "beyond-embeddings", "resize_token_embeddings", ("qwen2_5_vl",))
def tokens_without_rows(shop: Workshop, family: str) -> Arguments:
    found = _beside(shop, family)
    (found["adapter"] / "added_tokens.json").write_text('{"<|box|>": 100000}')
    return found


@broken("QwenLM/Qwen3-VL/issues/1582", "untrained-tokens", "nobody trained their rows", ("qwen2_vl",))
def tokens_that_nobody_trained(shop: Workshop, family: str) -> Arguments:
    found = _beside(shop, family)
    (found["adapter"] / "added_tokens.json").write_text('{"<|box|>": 7}')
    return found


@broken("", "pad-is-image", "have no pixels")
def padding_with_places_of_images(shop: Workshop, family: str) -> Arguments:
    found = _beside(shop, family)
    edit(found["adapter"] / "tokenizer_config.json", pad_token="<|image_pad|>")
    return found


@broken("mlabonne/llm-course/issues/33", "pad-is-eos", "end of replies", ("qwen3_vl",))
def padding_is_the_end(shop: Workshop, family: str) -> Arguments:
    found = _beside(shop, family)
    edit(found["adapter"] / "tokenizer_config.json", pad_token="<|im_end|>")
    return found


@broken("taco-group/OpenEMMA/issues/4", "blind-template", "text model's template")
def template_of_a_text_model(shop: Workshop, family: str) -> Arguments:
    found = _beside(shop, family)
    text = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    (found["adapter"] / "chat_template.jinja").write_text(text)
    return found


@broken("meta-llama/llama-cookbook/issues/640", "never-ends", "does not stop at it", ("qwen2_vl",))
def end_of_replies_forgotten(shop: Workshop, family: str) -> Arguments:
    found = _beside(shop, family)
    edit(found["adapter"] / "generation_config.json", eos_token_id=396)
    return found


@broken("", "drawn-replies", "differ from run to run")
def replies_drawn_at_random(shop: Workshop, family: str) -> Arguments:
    found = _beside(shop, family)
    edit(found["adapter"] / "generation_config.json", temperature=0.7)
    return found


@broken("", "other-ids", "another model's tokenizer", ("qwen3_vl",))
def tokenizer_of_another_model(shop: Workshop, family: str) -> Arguments:
    found = _beside(shop, family)

    def shift(content: dict[str, Any]) -> None:
        tokens = content["added_tokens_decoder"]
        content["added_tokens_decoder"] = {str(int(index) - 100): token for index, token in tokens.items()}

    edit(found["adapter"] / "tokenizer_config.json", shift)
    (found["adapter"] / "tokenizer.json").write_text("{}")
    return found


# 0: what is not read


@broken("", "adapter-unsafe", "is a pickle", FAMILIES)
def pickled_adapter(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    (found["adapter"] / ADAPTER).rename(found["adapter"] / "adapter_model.bin")
    return found


@broken("", "adapter-unreadable", "is corrupt", ("qwen2_5_vl",))
def download_cut_off(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    file = found["adapter"] / ADAPTER
    file.write_bytes(file.read_bytes()[:-1000])
    return found


@broken("", "adapter-unreadable", "without adapter_config.json", ("qwen2_vl",))
def copied_without_its_configuration(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    (found["adapter"] / CONFIG).unlink()
    return found


@broken("", "base-unreadable", "is corrupt", ("qwen2_vl",))
def base_cut_off(shop: Workshop, family: str) -> Arguments:
    folder = shop.copy(shop.base(family))
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1000])
    return {"base": folder}


@broken("", "base-unreadable", "model-00002-of-00002.safetensors", ("qwen2_5_vl",))
def base_without_a_shard(shop: Workshop, family: str) -> Arguments:
    return {"base": _without_a_shard(shop.copy(shop.base(family)))}


@broken("", "merged-unreadable", "model-00002-of-00002.safetensors", ("qwen3_vl",))
def merged_checkpoint_without_a_shard(shop: Workshop, family: str) -> Arguments:
    return {**with_adapter(shop, family), "merged": _without_a_shard(shop.copy(shop.base(family)))}


def _without_a_shard(folder: Path) -> Path:
    in_shards(folder, index=True)
    (folder / "model-00002-of-00002.safetensors").unlink()
    return folder


@broken("", "bad-setting", "expected a number")
def alpha_written_as_text(shop: Workshop, family: str) -> Arguments:
    return with_edits(shop, family, lora_alpha="16")


@broken("", "bad-setting", "no regular expression", ("qwen3_vl",))
def targets_that_are_no_expression(shop: Workshop, family: str) -> Arguments:
    return with_edits(shop, family, target_modules="([")


@broken("", "adapter-unreadable", "git lfs pull", ("qwen3_vl",))
def cloned_without_lfs(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (found["adapter"] / ADAPTER).write_text(pointer)
    return found
