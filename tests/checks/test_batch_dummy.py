"""batch: a dummy image that no row attends to, as LLaMA-Factory appends it to a batch of text, is no fault."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoConfig

from pytest_qvl import checks
from pytest_qvl.samples import make_batch, scenes

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_qvl.samples import Sample

IMAGE = 2  # a row of placeholders and its two ends


def text_with_a_dummy(processor: Any, config: Any) -> tuple[Any, list[Sample]]:
    """Two rows of text, an image that nothing attends to behind the first; and their samples."""
    texts = scenes(0, 2, ["text"], cell=14)
    batch = make_batch(processor, texts, padding_side="right", answers=True)
    pictured = make_batch(processor, scenes(0, 1, ["colour"], cell=14), padding_side="right")
    ids = pictured["input_ids"][0]
    places = (ids == config.image_token_id).nonzero().flatten()
    dummy = ids[int(places[0]) - 1 : int(places[-1]) + IMAGE]
    fill = {"input_ids": processor.tokenizer.pad_token_id, "attention_mask": 0, "labels": -100, "mm_token_type_ids": 0}
    for name in fill.keys() & batch.keys():
        rows = [row[batch["attention_mask"][number] == 1] for number, row in enumerate(batch[name])]
        rows[0] = torch.cat((rows[0], dummy if name == "input_ids" else torch.full_like(dummy, fill[name])))
        batch[name + "'"] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill[name])
    made = {name: batch[name + "'"] for name in fill if name + "'" in batch}
    made |= {name: pictured[name] for name in ("pixel_values", "image_grid_thw")}
    made.pop("mm_token_type_ids", None)  # positions are given, so nobody needs them
    made["position_ids"] = (made["attention_mask"].cumsum(dim=1) - 1).clamp(min=0).expand(4, -1, -1)
    return made, texts


def test_positions_of_a_batch_of_text_with_a_dummy_image_are_judged(processor: Any, tiny_dir: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_dir)
    made, _ = text_with_a_dummy(processor, config)
    evidence = checks.batch(made, processor, config)
    assert {figure.name: figure.value for figure in evidence.figures}["position ids"] == 3 * int(
        made["attention_mask"].sum()
    )


@pytest.mark.parametrize("filled", [False, True])
def test_a_dummy_image_is_no_image_of_a_sample(processor: Any, tiny_dir: Path, filled: bool) -> None:
    """A filled buffer in its pixels harms nobody: no token sees them."""
    config = AutoConfig.from_pretrained(tiny_dir)
    made, texts = text_with_a_dummy(processor, config)
    if filled:
        made["pixel_values"] = torch.zeros_like(made["pixel_values"])
    assert checks.batch(made, processor, config, texts).ok
