"""LLaMA-Factory: its data processor and its collator for supervised fine-tuning, as its command line uses them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from collating.parts import Asked, Parts, Row

if TYPE_CHECKING:
    from collections.abc import Callable

SET_UPS = {"stage: sft": "`template: qwen2_vl` or `qwen3_vl_nothink`; packed rows with `neat_packing: true`"}
LONGEST = 1024  # cutoff_len where no limit is asked for; packed rows are filled up to it


def collator(asked: Asked, parts: Parts) -> Callable[[list[Row]], Any]:
    """What ``run_sft`` makes."""
    from llamafactory.data.collator import SFTDataCollatorWith4DAttentionMask
    from llamafactory.data.processor import PackedSupervisedDatasetProcessor, SupervisedDatasetProcessor
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments, ModelArguments
    from llamafactory.model.patcher import patch_processor

    processor = parts.processor(asked.side)
    tokenizer = processor.tokenizer
    data = DataArguments(
        template="qwen3_vl_nothink" if parts.model_type == "qwen3_vl" else "qwen2_vl",
        cutoff_len=asked.limit or LONGEST,
        packing=asked.packed,
        neat_packing=asked.packed,
    )
    model_arguments = ModelArguments(model_name_or_path=str(parts.folder))
    patch_processor(processor, tokenizer, model_arguments)
    template = get_template_and_fix_tokenizer(tokenizer, data)
    kind = PackedSupervisedDatasetProcessor if asked.packed else SupervisedDatasetProcessor
    encode = kind(template=template, tokenizer=tokenizer, processor=processor, data_args=data)
    collate = SFTDataCollatorWith4DAttentionMask(
        template=template,
        model=parts.model,
        pad_to_multiple_of=8,
        neat_packing=asked.packed,
        block_diag_attn=asked.packed,
        attn_implementation="sdpa",
        tokenizer=tokenizer,
        processor=processor,
    )

    def made(rows: list[Row]) -> Any:
        encoded = encode.preprocess_dataset(_columns(rows))
        names = list(encoded)
        return collate([dict(zip(names, values, strict=True)) for values in zip(*encoded.values(), strict=True)])

    return made


def _columns(rows: list[Row]) -> dict[str, list[Any]]:
    """The columns into which LLaMA-Factory aligns every data set."""
    columns: dict[str, list[Any]] = {
        name: [] for name in ("_prompt", "_response", "_system", "_tools", "_images", "_videos", "_audios")
    }
    for row in rows:
        turns = row.tagged()
        columns["_prompt"].append(turns[:-1])
        columns["_response"].append(turns[-1:])
        columns["_system"].append("")
        columns["_tools"].append("")
        columns["_images"].append(row.images)
        columns["_videos"].append([[frame.copy() for frame in row.frames]] if row.frames else [])
        columns["_audios"].append([])
    return columns
