"""Tests of this project's own, beside the shipped suite."""

from pytest_qvl import checks


def test_the_adapter_trains_the_text_side_only(qvl_lora_model, qvl_batch, qvl_image_samples):
    checks.frozen_vision(qvl_lora_model, qvl_batch(qvl_image_samples[:2], answers=True))


def test_the_collator_on_one_row(qvl_dataset, qvl_collator, qvl_processor, qvl_lora_model):
    checks.batch(qvl_collator(qvl_dataset[:1]), qvl_processor, qvl_lora_model, qvl_dataset[:1])


def test_the_adapter_is_as_large_as_planned(qvl_lora_model):
    assert sum(p.numel() for p in qvl_lora_model.parameters() if p.requires_grad) < 200_000
