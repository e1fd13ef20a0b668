"""batch: a dummy image that no token attends to is no fault.

LLaMA-Factory appends one to a batch of text, NeMo AutoModel puts one into each row of text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLModel

from pytest_qvl import checks
from pytest_qvl.checks.batches.findings import findings_of
from pytest_qvl.checks.support.mrope import VisionIds, mrope_oracle
from pytest_qvl.evidence import CannotJudge, CheckFailed
from pytest_qvl.samples import make_batch, scenes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_qvl.samples import Sample

Batch = dict[str, torch.Tensor]
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


def test_positions_of_a_batch_of_text_with_a_dummy_image_are_judged(processor: Any, config: Any) -> None:
    made, _ = text_with_a_dummy(processor, config)
    evidence = checks.batch(made, processor, config)
    assert {figure.name: figure.value for figure in evidence.figures}["position ids"] == 3 * int(
        made["attention_mask"].sum()
    )


@pytest.mark.parametrize("filled", [False, True])
def test_a_dummy_image_is_no_image_of_a_sample(processor: Any, config: Any, filled: bool) -> None:
    """A filled buffer in its pixels harms nobody: no token sees them."""
    made, texts = text_with_a_dummy(processor, config)
    if filled:
        made["pixel_values"] = torch.zeros_like(made["pixel_values"])
    assert checks.batch(made, processor, config, texts).ok


def with_dummies_inside(
    processor: Any, config: Any, skills: Sequence[str], colour: Any = "white"
) -> tuple[Batch, list[Sample]]:
    """A batch as NeMo AutoModel makes it: each text row begins with a white image that no token attends to."""
    made = {sample.skill: sample for sample in scenes(0, 1, cell=14)}
    rows = [made[skill] for skill in skills]
    dummy = Image.new("RGB", (56, 56), colour) if isinstance(colour, str) else colour
    shown = [row if row.images else replace(row, images=(dummy,)) for row in rows]
    batch: Batch = make_batch(processor, shown, padding_side="right", answers=True)
    names = ("vision_start_token_id", "image_token_id", "vision_end_token_id")
    vision = torch.isin(batch["input_ids"], torch.tensor([getattr(config, name) for name in names]))
    texts = torch.tensor([not row.images for row in rows])
    batch["attention_mask"][vision & texts[:, None]] = 0
    return batch, rows


def found(*judged: Any) -> set[str]:
    try:
        checks.batch(*judged)
    except CheckFailed as failure:
        return {finding.kind for finding in findings_of(failure.evidence)}
    return set()


@pytest.mark.parametrize("skills", [("text", "text"), ("colour", "text")], ids=["text", "mixed"])
@pytest.mark.parametrize("compared", [False, True])
def test_a_dummy_image_inside_of_a_text_row_is_no_fault(
    processor: Any, config: Any, skills: Sequence[str], compared: bool
) -> None:
    batch, rows = with_dummies_inside(processor, config, skills)
    evidence = checks.batch(batch, processor, config, rows if compared else None)
    assert any("images that no token attends to: dummies" in note for note in evidence.notes)


def _attended(batch: Batch, place: int) -> None:
    batch["attention_mask"][0, place] = 1


def _learned(batch: Batch, place: int) -> None:
    batch["labels"][0, place] = batch["input_ids"][0, place]


@pytest.mark.parametrize(
    ("change", "where", "kinds"),
    [
        (_attended, -1, {"images-repeated", "text-not-attended"}),  # the end of the image
        (_attended, 0, {"images-repeated", "text-not-attended"}),  # its first placeholder
        (_learned, 0, {"images-repeated", "text-not-attended", "images-learned"}),
        (_learned, 1, {"images-repeated", "text-not-attended", "prompt-learned"}),  # what its hidden end predicts
    ],
)
def test_what_teaches_by_an_image_inside_of_a_row_is_no_dummy(
    processor: Any, config: Any, change: Callable[[Batch, int], None], where: int, kinds: set[str]
) -> None:
    batch, rows = with_dummies_inside(processor, config, ("text", "text"))
    places = (batch["input_ids"][0] == config.image_token_id).nonzero().flatten().tolist()
    change(batch, {-1: places[-1] + 1, 0: places[0], 1: places[-1] + 2}[where])
    assert found(batch, processor, config, rows) >= kinds


def test_an_image_with_something_in_it_is_hidden_by_a_wrong_mask(processor: Any, config: Any) -> None:
    drawn = scenes(0, 1, ["colour"], cell=14)[0].images[0]
    batch, _ = with_dummies_inside(processor, config, ("text", "text"), drawn)
    assert found(batch, processor, config) == {"text-not-attended"}


def test_a_white_image_of_its_own_is_missing_where_it_is_hidden(processor: Any, config: Any) -> None:
    batch, rows = with_dummies_inside(processor, config, ("text", "text"))
    own = [replace(row, images=(Image.new("RGB", (56, 56), "white"),)) for row in rows]
    assert found(batch, processor, config, own) == {"images-missing"}


@pytest.mark.parametrize("positions", [False, True])
def test_an_image_behind_a_dummy_has_the_positions_of_its_own_grid(
    processor: Any, config: Any, positions: bool
) -> None:
    """As ``get_rope_index`` makes them, they are those of the dummy's grid: of as many tokens here, so in silence."""
    batch, rows = with_dummies_inside(processor, config, ("text", "colour"), Image.new("RGB", (112, 28)))
    ids, merge = VisionIds(config.image_token_id, config.video_token_id), config.vision_config.spatial_merge_size
    right = mrope_oracle(batch["input_ids"], batch["attention_mask"], batch["image_grid_thw"][1:], ids, merge)
    if positions:
        assert found({**batch, "position_ids": right}, processor, config, rows) == set()
        return
    assert found(batch, processor, config, rows) == {"positions-apart"}
    with torch.device("meta"):
        made, _ = Qwen2_5_VLModel(config).get_rope_index(
            **{name: value for name, value in batch.items() if name not in ("pixel_values", "labels")}
        )
    assert not torch.equal(made[:, 1], right[:, 1])


def test_positions_of_rows_that_attend_to_nothing_are_not_judged(processor: Any, config: Any) -> None:
    batch: Batch = make_batch(processor, scenes(0, 2, ["text"], cell=14), padding_side="right", answers=True)
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    batch["position_ids"] = torch.zeros_like(batch["input_ids"]).expand(3, -1, -1)
    assert "text-not-attended" in found(batch, processor, config)


@pytest.mark.parametrize("skills", [("text", "text"), ("colour", "text")], ids=["text", "mixed"])
def test_a_dummy_image_is_no_fault_of_placeholders_either(
    fresh_model: Any, processor: Any, config: Any, skills: Sequence[str]
) -> None:
    model = fresh_model(quantized=False)
    batch, _ = with_dummies_inside(processor, config, skills)
    assert checks.validate_batch(model, batch) == []
    assert checks.placeholder_counts(model, batch).ok
    with pytest.raises(CannotJudge, match="is a dummy that the attention_mask hides"):
        checks.causality(model, batch)
    assert checks.validate_batch(model, text_with_a_dummy(processor, config)[0]) == []


@pytest.mark.parametrize(("change", "where"), [(_attended, -1), (_attended, 0), (_learned, 0), (_learned, 1)])
def test_a_hidden_image_that_is_no_dummy_is_a_fault_of_placeholders_too(
    fresh_model: Any, processor: Any, config: Any, change: Callable[[Batch, int], None], where: int
) -> None:
    batch, _ = with_dummies_inside(processor, config, ("text", "text"))
    places = (batch["input_ids"][0] == config.image_token_id).nonzero().flatten().tolist()
    change(batch, {-1: places[-1] + 1, 0: places[0], 1: places[-1] + 2}[where])
    problems = checks.validate_batch(fresh_model(quantized=False), batch)
    assert any("a placeholder that the attention_mask hides" in problem for problem in problems)
    drawn, _ = with_dummies_inside(processor, config, ("text", "text"), scenes(0, 1, ["colour"], cell=14)[0].images[0])
    assert (
        "a placeholder that the attention_mask hides" in checks.validate_batch(fresh_model(quantized=False), drawn)[0]
    )
