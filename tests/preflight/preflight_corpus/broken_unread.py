"""Files that are not read (question 0), each with the finding that must name it."""

from __future__ import annotations

from pathlib import Path

from .broken import broken
from .making import ADAPTER, CONFIG, FAMILIES, WEIGHTS, Arguments, Workshop, in_shards, with_adapter, with_edits


@broken("cactus-compute/needle/pull/122", "adapter-unsafe", "is a pickle", FAMILIES)
def pickled_adapter(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    (found["adapter"] / ADAPTER).rename(found["adapter"] / "adapter_model.bin")
    return found


@broken("replicate/cog-comfyui/issues/329", "adapter-unreadable", "is corrupt", ("qwen2_5_vl",))
def download_cut_off(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    file = found["adapter"] / ADAPTER
    file.write_bytes(file.read_bytes()[:-1000])
    return found


@broken("mymusise/ChatGLM-Tuning/issues/250", "adapter-unreadable", "without adapter_config.json", ("qwen2_vl",))
def copied_without_its_configuration(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    (found["adapter"] / CONFIG).unlink()
    return found


@broken("lyogavin/airllm/issues/137", "base-unreadable", "is corrupt", ("qwen2_vl",))
def base_cut_off(shop: Workshop, family: str) -> Arguments:
    folder = shop.copy(shop.base(family))
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1000])
    return {"base": folder}


@broken("hiyouga/LlamaFactory/issues/3340", "base-unreadable", "model-00002-of-00002.safetensors", ("qwen2_5_vl",))
def base_without_a_shard(shop: Workshop, family: str) -> Arguments:
    return {"base": _without_a_shard(shop.copy(shop.base(family)))}


@broken("sgl-project/sglang/pull/32279", "merged-unreadable", "model-00002-of-00002.safetensors", ("qwen3_vl",))
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


@broken("microsoft/OmniParser/issues/34", "adapter-unreadable", "git lfs pull", ("qwen3_vl",))
def cloned_without_lfs(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (found["adapter"] / ADAPTER).write_text(pointer)
    return found
