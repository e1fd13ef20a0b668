"""What is wrong with processor, tokenizer and template (question 6), each with the finding that must name it."""

from __future__ import annotations

import shutil
from typing import Any

from .broken import broken
from .making import FAMILIES, Arguments, Workshop, edit, with_adapter, with_processor


@broken("unslothai/unsloth/issues/4671", "no-image-processor", "only the tokenizer was saved", FAMILIES)
def only_the_tokenizer_saved(shop: Workshop, family: str) -> Arguments:
    processor = shop.copy(shop.base(family))
    (processor / "preprocessor_config.json").unlink()
    return {**with_adapter(shop, family), "processor": processor}


@broken("QwenLM/Qwen3-VL/issues/1715", "no-template", "was not saved")
def template_not_saved(shop: Workshop, family: str) -> Arguments:
    found = with_processor(shop, family)
    (found["adapter"] / "chat_template.json").unlink()
    edit(found["adapter"] / "tokenizer_config.json", chat_template=None)
    return found


@broken("sgl-project/sglang/issues/12390", "other-patches", "patch_size 14 instead of 16", ("qwen3_vl",))
def patches_of_another_family(shop: Workshop, family: str) -> Arguments:
    found = with_processor(shop, family)
    edit(found["adapter"] / "preprocessor_config.json", patch_size=14)
    return found


@broken("unslothai/unsloth/issues/1747", "other-scale other-processor", "shifted", ("qwen3_vl",))
def processor_of_another_family(shop: Workshop, family: str) -> Arguments:
    found = with_processor(shop, family)
    shutil.copy(shop.base("qwen2_5_vl") / "preprocessor_config.json", found["adapter"])
    edit(found["adapter"] / "preprocessor_config.json", patch_size=16)
    return found


@broken("huggingface/transformers/issues/41955", "limits-contradict", "given twice", ("qwen2_vl",))
def limit_that_does_nothing(shop: Workshop, family: str) -> Arguments:
    found = with_processor(shop, family)
    size = {"shortest_edge": 3136, "longest_edge": 12845056}
    edit(found["adapter"] / "preprocessor_config.json", max_pixels=1003520, size=size)
    return found


@broken("QwenLM/Qwen3-VL/issues/1083", "limits-impossible", "least must not be above most")
def limits_swapped(shop: Workshop, family: str) -> Arguments:
    found = with_processor(shop, family)
    edit(found["adapter"] / "preprocessor_config.json", min_pixels=12845056, max_pixels=3136)
    return found


@broken("hiyouga/LlamaFactory/issues/8823", "beyond-embeddings", "resize_token_embeddings", ("qwen2_5_vl",))
def tokens_without_rows(shop: Workshop, family: str) -> Arguments:
    found = with_processor(shop, family)
    (found["adapter"] / "added_tokens.json").write_text('{"<|box|>": 100000}')
    return found


@broken("QwenLM/Qwen3-VL/issues/1582", "untrained-tokens", "nobody trained their rows", ("qwen2_vl",))
def tokens_that_nobody_trained(shop: Workshop, family: str) -> Arguments:
    found = with_processor(shop, family)
    (found["adapter"] / "added_tokens.json").write_text('{"<|box|>": 7}')
    return found


@broken("", "pad-is-image", "have no pixels")
def padding_with_places_of_images(shop: Workshop, family: str) -> Arguments:
    found = with_processor(shop, family)
    edit(found["adapter"] / "tokenizer_config.json", pad_token="<|image_pad|>")
    return found


@broken("mlabonne/llm-course/issues/33", "pad-is-eos", "end of replies", ("qwen3_vl",))
def padding_is_the_end(shop: Workshop, family: str) -> Arguments:
    found = with_processor(shop, family)
    edit(found["adapter"] / "tokenizer_config.json", pad_token="<|im_end|>")
    return found


@broken("taco-group/OpenEMMA/issues/4", "blind-template", "text model's template")
def template_of_a_text_model(shop: Workshop, family: str) -> Arguments:
    found = with_processor(shop, family)
    text = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    (found["adapter"] / "chat_template.jinja").write_text(text)
    return found


@broken("meta-llama/llama-cookbook/issues/640", "never-ends", "does not stop at it", ("qwen2_vl",))
def end_of_replies_forgotten(shop: Workshop, family: str) -> Arguments:
    found = with_processor(shop, family)
    edit(found["adapter"] / "generation_config.json", eos_token_id=396)
    return found


@broken("QwenLM/Qwen-VL/issues/43", "drawn-replies", "differ from run to run")
def replies_drawn_at_random(shop: Workshop, family: str) -> Arguments:
    found = with_processor(shop, family)
    edit(found["adapter"] / "generation_config.json", temperature=0.7)
    return found


@broken("", "other-ids", "another model's tokenizer", ("qwen3_vl",))
def tokenizer_of_another_model(shop: Workshop, family: str) -> Arguments:
    found = with_processor(shop, family)

    def shift(content: dict[str, Any]) -> None:
        tokens = content["added_tokens_decoder"]
        content["added_tokens_decoder"] = {str(int(index) - 100): token for index, token in tokens.items()}

    edit(found["adapter"] / "tokenizer_config.json", shift)
    (found["adapter"] / "tokenizer.json").write_text("{}")
    return found
