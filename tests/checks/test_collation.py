"""training_collation: each row is taught its own answer, and its mask is 0 exactly on padding."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from pytest_qvl.checks import training_collation
from pytest_qvl.evidence import CannotJudge, CheckFailed
from pytest_qvl.samples import Sample, make_batch

if TYPE_CHECKING:
    from collections.abc import Iterator

Batch = dict[str, torch.Tensor]


def sample(name: str, answer: str, *, images: int = 1, question: str = "What is it?") -> Sample:
    return Sample(
        tuple(Image.new("RGB", (56, 56), (n * 60, 90, 120)) for n in range(images)), question, answer, "s", name
    )


SAMPLES = (
    sample("two", "red circle", images=2, question="Which of the shapes is the first one?"),
    sample("none", "blue", images=0, question="Say blue."),
    sample("one", "red"),
    sample("again", "red"),
)


@contextmanager
def padded_with(processor: Any, token: str | None) -> Iterator[None]:
    tokenizer = processor.tokenizer
    before, tokenizer.pad_token = tokenizer.pad_token, token
    try:
        yield
    finally:
        tokenizer.pad_token = before


@pytest.fixture(params=["left", "right"])
def side(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def batch(processor: Any, side: Any) -> Batch:
    return make_batch(processor, SAMPLES, padding_side=side, answers=True)


def taught(batch: Batch, row: int) -> torch.Tensor:
    return (batch["labels"][row] != -100).nonzero().flatten()


def says(processor: Any, batch: Batch, samples: Any = SAMPLES) -> str:
    with pytest.raises(CheckFailed) as caught:
        training_collation(processor, samples, batch)
    return str(caught.value)


def test_a_healthy_collator(processor: Any, batch: Batch) -> None:
    evidence = training_collation(processor, SAMPLES, batch)
    assert evidence.ok
    assert not evidence.notes
    assert {figure.name: figure.value for figure in evidence.figures}["pad tokens"] > 0


def test_rows_padded_with_the_end_of_the_turn(processor: Any, batch: Batch) -> None:
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, end)
    with padded_with(processor, "<|im_end|>"):
        assert training_collation(processor, SAMPLES, {**batch, "input_ids": ids}).ok
        bare = {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert "padding is attended to, since the attention_mask is 1 there" in says(processor, bare)


def test_one_row_needs_no_mask(processor: Any) -> None:
    batch = make_batch(processor, SAMPLES[:1], answers=True)
    del batch["attention_mask"]
    assert training_collation(processor, SAMPLES[:1], batch).ok


def test_a_longer_text_that_holds_the_answer_is_noted(processor: Any) -> None:
    longer = [sample("json", '{"answer": "red"}'), SAMPLES[1]]
    batch = make_batch(processor, longer, answers=True)
    evidence = training_collation(processor, [SAMPLES[2], SAMPLES[1]], batch)
    assert evidence.notes == ("1 rows are taught a longer text that holds their answer, first row 0",)


def test_an_end_of_text_that_is_taught_is_no_padding(processor: Any) -> None:
    """As template and tokenizer of a base model end an answer: with the token that pads."""
    batch = make_batch(processor, SAMPLES, padding_side="right", answers=True)
    for row in range(len(SAMPLES)):
        end = int(taught(batch, row)[-1])
        for name in ("input_ids", "labels"):
            batch[name][row, end] = processor.tokenizer.pad_token_id
    assert training_collation(processor, SAMPLES, batch).ok


def test_answers_of_two_rows_exchanged(processor: Any) -> None:
    """Into the other prompt with other images; the row of whose answer it is is named."""
    two = [SAMPLES[1], SAMPLES[2]]
    exchanged = [sample("none", "red", images=0, question="Say blue."), sample("one", "blue")]
    said = says(processor, make_batch(processor, exchanged, answers=True), two)
    assert "row 0 (sample 'none') is taught 'red' (of row 1, sample 'one') where its answer is 'blue'" in said
    assert "row 1 (sample 'one') is taught 'blue' (of row 0, sample 'none') where its answer is 'red'" in said


def test_an_answer_of_nobody(processor: Any, batch: Batch) -> None:
    batch["labels"][1, taught(batch, 1)[0]] = batch["labels"][2, taught(batch, 2)[0]]
    assert "row 1 (sample 'none') is taught 'red' (of row 2, sample 'one') where its answer is 'blue'" in says(
        processor, batch
    )
    batch["labels"][1, taught(batch, 1)[0]] = processor.tokenizer("seven")["input_ids"][0]
    assert "where its answer is 'blue'" in says(processor, batch)


@pytest.mark.parametrize("damage", ["dropped", "all ones"])
def test_padding_that_is_attended_to(processor: Any, batch: Batch, damage: str) -> None:
    mask = batch.pop("attention_mask")
    if damage == "all ones":
        batch["attention_mask"] = torch.ones_like(mask)
    why = "the batch has no attention_mask" if damage == "dropped" else "the attention_mask is 1 there"
    padding = int((mask[1] == 0).sum())
    said = says(processor, batch)
    assert said.startswith(f"padding is attended to, since {why}: tokens of row 1: {padding}, row 2: ")
    assert f"[pad tokens attended to {int((mask == 0).sum())} (== 0)]" in said


def test_tokens_that_are_masked_out(processor: Any, batch: Batch) -> None:
    batch["attention_mask"][0, :3] = 0
    if batch["input_ids"][0, 0] == processor.tokenizer.pad_token_id:
        batch["attention_mask"][0, -3:] = 0
    assert "tokens of samples are not attended to, the attention_mask is 0 there: tokens of row 0: 3" in says(
        processor, batch
    )


def test_what_cannot_be_judged(processor: Any) -> None:
    batch = make_batch(processor, SAMPLES, padding_side="right", answers=True)
    rows, length = batch["input_ids"].shape
    positions = torch.arange(length).expand(rows, length).clone()
    positions[0] %= 20
    with pytest.raises(CannotJudge, match="several samples are packed into a row, so which answer belongs"):
        training_collation(processor, SAMPLES, {**batch, "position_ids": positions})
    square = batch["attention_mask"][:, None, None].expand(rows, 1, length, length)
    with pytest.raises(CannotJudge, match=r"the attention_mask is \(4, 1, "):
        training_collation(processor, SAMPLES, {**batch, "attention_mask": square})
    with pytest.raises(CannotJudge, match="no row has a supervised token"):
        training_collation(processor, SAMPLES, {**batch, "labels": torch.full_like(batch["labels"], -100)})
    with pytest.raises(ValueError, match="needs the sample of each row: 3 samples, 4 rows"):
        training_collation(processor, SAMPLES[:3], batch)
    with pytest.raises(ValueError, match="labels are"):
        training_collation(processor, SAMPLES, {**batch, "labels": batch["labels"][:, 1:]})
    del batch["labels"]
    with pytest.raises(ValueError, match="training_collation: the batch needs labels"):
        training_collation(processor, SAMPLES, batch)


def test_without_a_pad_token_the_mask_is_not_judged(processor: Any, batch: Batch) -> None:
    with padded_with(processor, None):
        (note,) = training_collation(processor, SAMPLES, batch).notes
    assert "no pad token" in note
