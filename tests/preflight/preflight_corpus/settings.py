"""Artefacts whose tensors are as they were saved, and whose settings say something else; and unusual ones that are right."""

from __future__ import annotations

import json
import shutil
from typing import Any

from .broken import broken
from .healthy import healthy
from .making import (
    ADAPTER,
    CONFIG,
    WEIGHTS,
    Arguments,
    Workshop,
    drop,
    edit,
    rename,
    retensor,
    with_adapter,
    with_edits,
)

# Trained rows of embeddings


@broken("", "token-ids", "names -1, and ids start at 0", ("qwen2_vl",))
def token_ids_below_zero(shop: Workshop, family: str) -> Arguments:
    return with_edits(shop, family, {"trainable_token_indices": [5, 7]}, trainable_token_indices=[-1, 7])


@broken("", "token-ids", "names 5 twice")
def token_ids_twice(shop: Workshop, family: str) -> Arguments:
    return with_edits(
        shop, family, {"trainable_token_indices": [5, 7]}, trainable_token_indices={"embed_tokens": [5, 5]}
    )


@broken("", "token-ids", "the embedding has", ("qwen3_vl",))
def token_ids_beyond_the_embedding(shop: Workshop, family: str) -> Arguments:
    return with_edits(shop, family, {"trainable_token_indices": [5, 7]}, trainable_token_indices=[5, 100_000])


@broken("", "other-token-count", "the file has 2 trained rows, and trainable_token_indices names 3 tokens")
def one_token_more(shop: Workshop, family: str) -> Arguments:
    return with_edits(shop, family, {"trainable_token_indices": [5, 7]}, trainable_token_indices=[5, 7, 9])


@healthy(("qwen3_vl",))
def first_and_last_token_trained(shop: Workshop, family: str) -> Arguments:
    return with_adapter(shop, family, trainable_token_indices={"embed_tokens": [447, 0]})


# What is adapted, and by how much


@broken("", "no-target", "target_modules is null", ("qwen2_vl",))
def targets_lost(shop: Workshop, family: str) -> Arguments:
    return with_edits(shop, family, target_modules=None)


@broken("", "no-target", "the file has tensors for down_proj", ("qwen3_vl",))
def targets_emptied(shop: Workshop, family: str) -> Arguments:
    return with_edits(shop, family, target_modules=[])


@broken("", "alpha-negative", "subtracted from the base")
def alpha_below_zero(shop: Workshop, family: str) -> Arguments:
    return with_edits(shop, family, lora_alpha=-16)


@broken("", "alpha-negative", "alpha_pattern['q_proj'] is -4", ("qwen3_vl",))
def alpha_of_some_modules_below_zero(shop: Workshop, family: str) -> Arguments:
    return with_edits(shop, family, alpha_pattern={"q_proj": -4})


@broken("", "start-not-repeatable", "randomized SVD", ("qwen2_vl",))
def start_by_a_randomized_decomposition(shop: Workshop, family: str) -> Arguments:
    return with_adapter(shop, family, init_lora_weights="pissa_niter_4")


# A base that cannot run


def _base_with(shop: Workshop, family: str, half: str, **changes: Any) -> Arguments:
    """A base of which some fields of one half's configuration were edited after it was saved."""
    folder = shop.copy(shop.base(family))
    edit(folder / "config.json", lambda content: content[half].update(changes))
    return {"base": folder}


@broken("", "cannot-run", "mrope_section [8, 12, 12] adds up to 32, and has to be 16", ("qwen2_vl", "qwen2_5_vl"))
def sections_of_another_head_size(shop: Workshop, family: str) -> Arguments:
    rope = {"mrope_section": [8, 12, 12], "rope_type": "default", "rope_theta": 1e6}
    return _base_with(shop, family, "text_config", rope_parameters=rope, rope_scaling=rope)


@broken("", "cannot-run", "num_attention_heads 4 is no multiple of num_key_value_heads 3", ("qwen3_vl",))
def heads_that_do_not_divide(shop: Workshop, family: str) -> Arguments:
    return _base_with(shop, family, "text_config", num_key_value_heads=3)


@broken("", "cannot-run", "window_size of the vision tower is 0")
def windows_without_pixels(shop: Workshop, family: str) -> Arguments:
    return _base_with(shop, family, "vision_config", window_size=0)


@broken("", "cannot-run", "rope_theta is 0", ("qwen3_vl",))
def frequencies_of_nothing(shop: Workshop, family: str) -> Arguments:
    folder = shop.copy(shop.base(family))

    def zero(content: dict[str, Any]) -> None:
        text = content["text_config"]
        text["rope_theta"] = 0
        for name in ("rope_parameters", "rope_scaling"):
            if isinstance(text.get(name), dict):
                text[name]["rope_theta"] = 0

    edit(folder / "config.json", zero)
    return {"base": folder}


@broken("", "cannot-run", "image_token_id is 151655, and the vocabulary has", ("qwen2_vl",))
def image_token_of_another_vocabulary(shop: Workshop, family: str) -> Arguments:
    folder = shop.copy(shop.base(family))
    edit(folder / "config.json", image_token_id=151655)
    return {"base": folder}


@broken("", "bad-setting", "is 'lm_head' and no list of names", ("qwen2_5_vl",))
def skip_list_that_is_a_text(shop: Workshop, family: str) -> Arguments:
    folder = shop.copy(shop.packed(family))
    edit(folder / "config.json", lambda content: content["quantization_config"].update(llm_int8_skip_modules="lm_head"))
    return {"base": folder}


@broken("unslothai/unsloth-zoo/pull/828", "magnitude-left-out", "without DoRA's magnitudes", ("qwen2_vl",))
def dora_merged_as_plain_lora(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family, use_dora=True)
    plain = shop.copy(found["adapter"])
    edit(plain / CONFIG, use_dora=False)
    drop(plain / ADAPTER, lambda name: "magnitude" in name)
    return {**found, "merged": shop.merged(found["base"], plain)}


# A base whose values are none


@broken("", "base-not-finite", "hold NaN or infinity (language 7)", ("qwen2_5_vl",))
def norms_of_a_training_that_diverged(shop: Workshop, family: str) -> Arguments:
    folder = shop.copy(shop.base(family))
    factor = float("nan")
    retensor(
        folder / WEIGHTS, lambda n, t: {n: t * factor if "layernorm" in n or n.endswith("model.norm.weight") else t}
    )
    return {"base": folder}


@broken("", "base-zero", "are 0 wherever they were looked at (vision", ("qwen2_vl", "qwen3_vl"))
def tower_saved_without_its_values(shop: Workshop, family: str) -> Arguments:
    folder = shop.copy(shop.base(family))
    retensor(folder / WEIGHTS, lambda name, tensor: {name: tensor * 0 if "visual" in name else tensor})
    return {"base": folder}


# Templates and tokenizers


def _template_with(shop: Workshop, family: str, old: str, new: str) -> Arguments:
    """A base of whose chat template one part was replaced."""
    folder = shop.copy(shop.base(family))

    def change(content: dict[str, Any]) -> None:
        assert old in content["chat_template"]
        content["chat_template"] = content["chat_template"].replace(old, new)

    edit(folder / "chat_template.json", change)
    return {"base": folder}


@broken("", "template-syntax", "has a syntax error in line", ("qwen2_vl",))
def template_with_a_block_left_open(shop: Workshop, family: str) -> Arguments:
    return _template_with(
        shop, family, "{% if add_generation_prompt %}", "{% if add_generation_prompt %}{% for a in b %}"
    )


@broken("", "template-order", "writes <|vision_end|> before <|image_pad|>", ("qwen2_5_vl",))
def template_with_markers_exchanged(shop: Workshop, family: str) -> Arguments:
    whole, turned = "{0}<|image_pad|>{1}", ("<|vision_end|>", "<|vision_start|>")
    return _template_with(shop, family, whole.format(*turned[::-1]), whole.format(*turned))


@broken("", "template-order", "writes <|im_end|> before <|im_start|>", ("qwen3_vl",))
def template_with_turns_exchanged(shop: Workshop, family: str) -> Arguments:
    return _template_with(shop, family, "{% for message in messages %}", "{% for message in messages %}<|im_end|>")


@broken("instructlab/training/pull/232", "no-generation-prompt", "which the model then has to write", ("qwen2_vl",))
def template_without_a_generation_prompt(shop: Workshop, family: str) -> Arguments:
    return _template_with(shop, family, "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "")


@broken("", "no-pad", "pad_token is null")
def padding_switched_off(shop: Workshop, family: str) -> Arguments:
    folder = shop.copy(shop.base(family))
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, "pad_token": None}), encoding="utf-8")
    return {"base": folder}


@healthy(("qwen2_5_vl", "qwen3_vl"))
def checkpoint_of_a_trainer_with_the_tokenizer_only(shop: Workshop, family: str) -> Arguments:
    """What ``Trainer(processing_class=tokenizer)`` leaves in checkpoint-N; the processor is the base's."""
    found = with_adapter(shop, family)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(found["base"] / name, found["adapter"])
    template = json.loads((found["base"] / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
    (found["adapter"] / "chat_template.jinja").write_text(template, encoding="utf-8")
    (found["adapter"] / "trainer_state.json").write_text("{}", encoding="utf-8")
    return found


@healthy(("qwen2_vl",))
def template_that_marks_what_is_trained(shop: Workshop, family: str) -> Arguments:
    """``{% generation %}`` is Transformers' own block."""
    text = "{% if part['type'] == 'text' %}{% generation %}{{ part['text'] }}{% endgeneration %}{% endif %}"
    return _template_with(shop, family, "{% if part['type']", f"{text}{{% if part['type']")


# Tensors of other shapes


@broken("", "swapped-pair", "A and B of a module are swapped")
def matrices_swapped(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    swapped = {"lora_A": "lora_B", "lora_B": "lora_A"}

    def swap(name: str) -> str:
        here = next((part for part in swapped if part in name and "layers.0.self_attn.o_proj" in name), "")
        return name.replace(here, swapped[here]) if here else name

    rename(found["adapter"] / ADAPTER, swap)
    return found


@broken("osaurus-ai/vmlx-swift/pull/320", "swapped-pair", "transposed", ("qwen2_vl",))
def matrices_transposed(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    retensor(found["adapter"] / ADAPTER, lambda name, tensor: {name: tensor.T.contiguous()})
    return found


@broken(
    "huggingface/peft/issues/1457",
    "other-rows",
    "the vocabulary was resized for the training",
    ("qwen2_5_vl", "qwen3_vl"),
)
def vocabulary_resized_for_the_training(shop: Workshop, family: str) -> Arguments:
    lora = {"modules_to_save": ["lm_head"]} if family == "qwen3_vl" else {"target_modules": ["q_proj", "embed_tokens"]}
    trained_on = shop.base(family, vocabulary=464)
    return {"base": shop.base(family), "adapter": shop.adapter(family, base=trained_on, **lora)}


@broken("", "bias-differs", "bias='all'", ("qwen2_vl",))
def biases_asked_for_afterwards(shop: Workshop, family: str) -> Arguments:
    return with_edits(shop, family, bias="all")


@broken("", "prefix-doubled", "three times", ("qwen2_5_vl",))
def wrapped_three_times(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    rename(found["adapter"] / ADAPTER, lambda name: "base_model.model." * 2 + name)
    return found


@broken("", "keys-missing", "1 of the 22 modules that adapter_config.json asks for (every lm_head)")
def head_asked_for_afterwards(shop: Workshop, family: str) -> Arguments:
    return with_edits(shop, family, modules_to_save=["lm_head"])
