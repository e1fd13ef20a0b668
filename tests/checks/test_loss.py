"""The loss against cross-entropy, and accumulated gradients against those of one batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pytest_qvl.checks.loss import loss_arithmetic
from pytest_qvl.checks.support.accumulation import compared, micro_batches
from pytest_qvl.checks.support.cross_entropy import telling_labels, token_losses
from pytest_qvl.evidence import CannotJudge, CheckFailed, InputError
from pytest_qvl.faults import apply
from pytest_qvl.faults.case import Case
from pytest_qvl.faults.subject import embedded
from pytest_qvl.models.adapters import LANGUAGE_ONLY
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.samples import make_batch, scenes

FAULTS = (
    *("loss-not-shifted", "loss-shifted-twice", "loss-summed", "loss-of-the-first-row", "loss-mean-of-rows"),
    *("loss-over-all-places", "loss-smoothed", "num-items-ignored", "accumulation-of-means"),
    "accumulation-not-divided",
)


@pytest.fixture(scope="module")
def model(fresh_model: Any) -> Any:
    return fresh_model(lora=True)


@pytest.fixture(scope="module")
def batch(processor: Any) -> dict[str, torch.Tensor]:
    rows = [sample for sample in scenes(seed=5, per_skill=1) if sample.skill in ("nth_colour", "text", "side", "list")]
    return make_batch(processor, rows, padding_side="right", answers=True)


def figures(evidence: Any) -> dict[str, Any]:
    return {figure.name: figure.value for figure in evidence.figures}


@pytest.fixture
def case(model: Any, processor: Any) -> Case:
    """As much of a case as faults of the loss look at."""
    nothing: Any = None
    return Case(model, processor, nothing, nothing, [], [], nothing, nothing, embedded("float32"))


# --- healthy ---------------------------------------------------------------------------------------------------


def test_a_healthy_loss_passes_and_says_what_the_trainer_would_do(model: Any, batch: Any) -> None:
    evidence = loss_arithmetic(model, batch)
    assert figures(evidence)["gradient of rows accumulated by their means, of one batch's"] != pytest.approx(
        1, abs=0.01
    )
    assert any("pull/40333" in note and "accepts_loss_kwargs = True" in note for note in evidence.notes)


@pytest.mark.parametrize(
    ("dtype", "lora"),
    [
        ("bfloat16", {"use_dora": True, "lora_dropout": 0.1, "target_modules": LANGUAGE_ONLY + "|lm_head"}),
        ("float16", {"modules_to_save": ["lm_head"], "init_lora_weights": False}),
    ],
    ids=["bfloat16, head adapted, dropout", "float16, copy of the head"],
)
def test_a_healthy_loss_in_16_bits(fresh_model: Any, batch: Any, dtype: str, lora: Any) -> None:
    model = fresh_model(dtype=dtype, lora=lora)
    model.get_base_model().accepts_loss_kwargs = True
    found = figures(loss_arithmetic(model, batch))
    assert found["gradient accumulated row by row, with num_items_in_batch, of one batch's"] == pytest.approx(
        1, abs=1e-3
    )


def test_the_penalty_of_adalora_is_no_part_of_the_loss(fresh_model: Any, batch: Any) -> None:
    from peft import AdaLoraConfig

    config = AdaLoraConfig(init_r=4, target_r=2, total_step=100, target_modules=LANGUAGE_ONLY, task_type="CAUSAL_LM")
    assert loss_arithmetic(fresh_model(lora=config), batch).ok


def test_a_single_row_and_rows_of_one_token(model: Any, batch: Any) -> None:
    labels = torch.full_like(batch["labels"], -100)
    labels[0, 5] = 7
    evidence = loss_arithmetic(model, {**batch, "labels": labels})
    assert "accumulation was not judged: only one row has labels" in evidence.notes
    labels[1:, 4] = 9
    assert loss_arithmetic(model, {**batch, "labels": labels}).ok


def test_gradients_that_wait_for_a_step_stay_as_they_are(model: Any, batch: Any) -> None:
    """A trainer's backward passes must not add to what a user has accumulated so far."""

    def accumulate(model: Any, batches: list[Any]) -> None:
        items = sum((each["labels"][:, 1:] != -100).sum() for each in batches)
        for each in batches:
            model(**each, num_items_in_batch=items).loss.backward()

    head = anatomy(model).lm_head.weight
    head.requires_grad_(True).grad = waiting = torch.full_like(head, 0.5)
    try:
        loss_arithmetic(model, batch, trainer=accumulate)
        assert head.grad is waiting
        assert bool((waiting == 0.5).all())
    finally:
        head.requires_grad_(False).grad = None


def test_the_model_is_left_as_it_was(model: Any, batch: Any) -> None:
    before = [(m.training, "forward" in vars(m)) for m in model.modules()]
    loss_arithmetic(model, batch)
    assert before == [(m.training, "forward" in vars(m)) for m in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())


# --- damaged ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_loss_are_named(case: Case, batch: Any, name: str) -> None:
    from pytest_qvl.faults import find

    with apply(name, case) as damaged, pytest.raises(CheckFailed) as caught:
        loss_arithmetic(damaged.model, batch, trainer=damaged.trainer)
    assert all(word in str(caught.value) for word in find(name).expected_words), str(caught.value)


@pytest.mark.parametrize("factor", [1 + 1e-5, 1 - 1e-5])
def test_a_loss_that_is_off_by_a_hundred_thousandth_is_seen(model: Any, batch: Any, factor: float) -> None:
    base = model.get_base_model()
    right = base.loss_function
    base.loss_function = lambda *args, **kwargs: right(*args, **kwargs) * factor
    try:
        with pytest.raises(CheckFailed, match="of it"):
            loss_arithmetic(model, batch)
    finally:
        del base._loss_function


# --- trainers --------------------------------------------------------------------------------------------------


def trainer_of(model: Any, folder: Any, steps: int) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder), gradient_accumulation_steps=steps, per_device_train_batch_size=1, report_to=[], use_cpu=True
    )
    return Trainer(model, arguments, train_dataset=[0])


def test_the_real_trainer_accumulates_one_batch_where_the_model_counts_tokens(
    model: Any, batch: Any, tmp_path: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(model.get_base_model(), "accepts_loss_kwargs", True)
    found = figures(loss_arithmetic(model, batch, trainer=trainer_of(model, tmp_path, 3)))
    assert found["gradient accumulated by your Trainer, of one batch's"] == pytest.approx(1, abs=1e-6)


def test_an_accelerator_that_divides_a_second_time_is_named(
    model: Any, batch: Any, tmp_path: Any, monkeypatch: Any
) -> None:
    """As in Transformers 5.2 to 5.5.3: beside one batch that is divided as well, the gradient looks right."""
    monkeypatch.setattr(model.get_base_model(), "accepts_loss_kwargs", True)
    trainer = trainer_of(model, tmp_path, 3)
    trainer.accelerator.gradient_accumulation_steps = 3
    with pytest.raises(CheckFailed, match=r"the gradient is 0\.333 of one batch's; its accelerator divides by 3 once"):
        loss_arithmetic(model, batch, trainer=trainer)
    assert trainer.accelerator.gradient_accumulation_steps == 3
    trainer.accelerator.gradient_accumulation_steps = 1  # Accelerate keeps it for the whole process


def test_a_trainer_that_does_not_accumulate_has_nothing_to_answer_for(model: Any, batch: Any, tmp_path: Any) -> None:
    assert any("= 1)" in note for note in loss_arithmetic(model, batch, trainer=trainer_of(model, tmp_path, 1)).notes)


def test_a_loop_of_ones_own_that_weighs_by_tokens_passes(model: Any, batch: Any) -> None:
    def accumulate(model: Any, batches: Any) -> None:
        items = sum((each["labels"][:, 1:] != -100).sum() for each in batches)
        for each in batches:
            model(**each, num_items_in_batch=items).loss.backward()

    assert loss_arithmetic(model, batch, trainer=accumulate).ok


def test_what_is_no_trainer_or_anothers_is_refused(model: Any, batch: Any, fresh_model: Any, tmp_path: Any) -> None:
    with pytest.raises(InputError, match="got a value of type str"):
        loss_arithmetic(model, batch, trainer="sft")
    with pytest.raises(InputError, match="left no gradient"):
        loss_arithmetic(model, batch, trainer=lambda _model, _batches: None)
    trainer = trainer_of(model, tmp_path, 2)
    trainer.model = model.get_base_model()
    with pytest.raises(InputError, match="over another model"):
        loss_arithmetic(model, batch, trainer=trainer)


def test_a_batch_without_labels_is_refused(model: Any, batch: Any) -> None:
    with pytest.raises(InputError, match="needs labels"):
        loss_arithmetic(model, {name: value for name, value in batch.items() if name != "labels"})
    with pytest.raises(InputError, match="no supervised token"):
        loss_arithmetic(model, {**batch, "labels": torch.full_like(batch["labels"], -100)})


# --- arithmetic ------------------------------------------------------------------------------------------------


def test_token_losses_are_cross_entropy_in_float64() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 7, 11)
    labels = torch.randint(11, (3, 7)).masked_fill(torch.rand(3, 7) < 0.3, -100)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten())
    assert token_losses(logits, labels).mean == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(("dtype", "columns"), [(torch.float32, 600), (torch.float32, 152_064), (torch.bfloat16, 600)])
def test_the_limit_of_a_loss_holds_what_torch_makes_of_it(dtype: torch.dtype, columns: int) -> None:
    """Of logits as large as trained models have: twenty seeds, and not one beyond half of the limit."""
    for seed in range(20 if columns < 1000 else 3):
        torch.manual_seed(seed)
        logits = (8 * torch.randn(2, 6, columns)).to(dtype)
        labels = torch.randint(columns, (2, 6))
        right = token_losses(logits, labels)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        assert abs(float(loss) - right.mean) < right.limit(torch.float32) / 2


def test_labels_that_tell_rows_apart() -> None:
    labels = torch.full((4, 9), -100)
    labels[:, 6:8] = 5
    made = telling_labels(labels, [1, 2, 3], seed=0)
    assert (made != -100).sum(dim=1).tolist() == [2, 1, 2, 1]
    labels[:, 6] = -100
    assert (telling_labels(labels, [1, 2, 3], seed=0) != -100).sum(dim=1).tolist() == [1, 2, 1, 2]


def test_micro_batches_hold_every_row_once() -> None:
    labels = torch.arange(20).reshape(5, 4)
    labels[2] = -100
    micro = micro_batches(labels, 3)
    assert [sorted((each != -100).any(dim=1).nonzero().flatten().tolist()) for each in micro] == [[0], [1], [3, 4]]


def test_how_accumulated_gradients_compare() -> None:
    one = torch.randn(2, 3, 4)
    half = compared(one / 2, one, None)
    assert (half.factor, str(half)) == (pytest.approx(0.5), "the gradient is 0.5 of one batch's")
    uneven = compared(one * torch.tensor([0.5, 2.0])[:, None, None], one, None)
    assert str(uneven).startswith("tokens of row 0 count 0.5 times and those of row 1 2 times")
    with pytest.raises(CannotJudge, match="no gradient"):
        compared(one, torch.zeros_like(one), None)
    assert math.isclose(half.apart, 0.5, rel_tol=1e-6)
