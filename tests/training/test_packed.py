"""Packed rows in a real training: the guard stops where samples see each other, and nowhere else."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from pytest_qvl.checks.support.packing import pack, samples_in_rows
from pytest_qvl.evidence import CannotJudge, CheckFailed
from pytest_qvl.faults.matrix.random_models import RANDOM_FAMILIES, random_model
from pytest_qvl.faults.tools import attribute
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.layers import language_layers
from pytest_qvl.models.mixer_kernels import PYTORCH
from pytest_qvl.models.quantized import usual_quantization
from pytest_qvl.training import Guard, GuardError
from pytest_qvl.training.packed import _AT_ONCE, _strangers, kept_apart

CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


def lengths(batch):
    """The same with lengths in place of positions that part a row, as kernels of FlashAttention read them."""
    starts = (batch["position_ids"][0, 0] == 0).nonzero().flatten()
    bounds = torch.cat([starts, torch.tensor([batch["input_ids"].shape[1]])]).int()
    return batch | {"position_ids": batch["position_ids"][1:], "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}


def blocks(batch):
    """The same with a mask of the collator's own."""
    numbers = samples_in_rows(batch)
    mask = (numbers[:, :, None] == numbers[:, None]).tril()[:, None]
    return batch | {"position_ids": batch["position_ids"][1:], "attention_mask": mask}


def without_cache(batch):
    return batch | {"use_cache": False}


def leaks(model, batch):
    """Whether another token in the first sample of the row moves a logit of the others, in the trainer's own forward."""
    others = samples_in_rows(batch | {"attention_mask": None})[0] > 0
    changed = batch["input_ids"].clone()
    changed[0, 1] = 3 if int(changed[0, 1]) != 3 else 4
    before, after = (
        model(**batch | {"input_ids": ids, "labels": None}).logits for ids in (batch["input_ids"], changed)
    )
    return bool((before != after)[0, others].any())


def as_it_is(batch):
    return batch


@pytest.mark.parametrize(
    ("change", "arguments", "text_cache", "stops"),
    [
        (as_it_is, {}, True, True),
        (as_it_is, {}, False, False),
        (as_it_is, CHECKPOINTING, True, False),
        (without_cache, {}, True, False),
        (blocks, {}, True, False),
        (lengths, {}, True, True),
    ],
    ids=["cache", "cache of the language model off", "checkpointing", "use_cache=False", "own mask", "lengths"],
)
def test_a_training_stops_where_samples_of_a_row_see_each_other(
    bench, tmp_path, monkeypatch, change, arguments, text_cache, stops
):
    with bench.model() as model:
        made = []

        def collate(samples):
            packed = pack(anatomy(model), bench.collate(samples))
            made.append(change({name: value for name, value in packed.items() if name != "use_cache"}))
            return made[-1]

        text = anatomy(model).core.language_model.config  # which is model.config.get_text_config() of a model as loaded
        monkeypatch.setattr(text, "use_cache", text_cache)
        trainer = bench.trainer(model, tmp_path, Guard(vision_gradients="spare"), collate=collate, **arguments)
        if stops:
            with pytest.raises(
                GuardError, match="packing, in the forward of batch 1 of step 1: row 0, token"
            ) as stopped:
                trainer.train()
            assert stopped.value.check == "packing"
        else:
            trainer.train()
        assert leaks(model.train(), made[0]) is stops
    record = json.loads((tmp_path / "qvl_guard.json").read_text())
    assert record["state"] == ("stopped" if stops else "finished")
    assert ("packing" in record["judged"]) is not stops


def test_rows_of_one_sample_are_not_looked_at(bench, tmp_path):
    with bench.model() as model:
        bench.trainer(model, tmp_path, Guard(), max_steps=1).train()
    record = json.loads((tmp_path / "qvl_guard.json").read_text())
    assert "packing" not in {**record["judged"], **record["not_judged"]}


@pytest.mark.parametrize("additive", [False, True])
def test_strangers_are_those_of_the_whole_mask(additive):
    """Rows longer than what is looked at together, padding at their ends, and one hole in the mask."""
    length = 2 * _AT_ONCE + 17
    samples = torch.zeros(2, length, dtype=torch.int64)
    samples[0, 100:], samples[0, 300:], samples[1, 400:], samples[:, -5:] = 1, 2, 1, -1
    mask = (samples[:, :, None] == samples[:, None]).tril()[:, None]
    given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask
    assert _strangers(samples, given) == (0, (0, 0, 0))
    given[1, 0, 450, 7] = 0.0 if additive else True
    assert _strangers(samples, given) == (1, (1, 450, 7))
    seen = (samples[:, :, None] != samples[:, None]) & (samples[:, :, None] >= 0) & (samples[:, None] >= 0)
    assert _strangers(samples, None) == (int(seen.tril().any(dim=-1).sum()), (0, 100, 0))
    with pytest.raises(CannotJudge, match=r"is not \(rows, 1, length, length\)"):
        _strangers(samples, given[..., :-1])


def test_a_kernel_that_is_told_otherwise_is_not_judged(bench):
    parts = anatomy(bench.base())
    with attribute(parts.config.get_text_config(), "_attn_implementation_internal", "flash_attention_2"):
        with pytest.raises(CannotJudge, match="flash_attention_2 is told of packed samples otherwise than by a mask"):
            kept_apart(SimpleNamespace(parts=parts), torch.tensor([[0, 1]]), {})


@pytest.fixture(scope="module")
def linear():
    """A model with linear attention before its first layer of full attention."""
    if "qwen3_5" not in RANDOM_FAMILIES:
        pytest.skip("Transformers has no Qwen3.5 yet")
    model = random_model("qwen3_5", seed=0, dtype=torch.float32, quantization_config=usual_quantization(torch.float32))
    return model.requires_grad_(False).eval()


def test_linear_attention_parts_no_row(bench, linear, tmp_path, monkeypatch):
    own = bench.processor.image_processor
    for name, value in {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}.items():
        monkeypatch.setattr(own, name, value)
    monkeypatch.setattr("pytest_qvl.checks.support.packing.language_layers", lambda _: [])  # pack refuses, people do it
    made = []
    with bench.model(base=linear) as model:

        def collate(samples):
            made.append(pack(anatomy(model), bench.collate(samples)))
            return made[-1]

        with pytest.raises(GuardError, match="packing, .*: the state of linear attention runs on through a packed row"):
            bench.trainer(model, tmp_path, Guard(), collate=collate).train()
        assert leaks(model.train(), made[0])


@pytest.mark.parametrize(
    ("told", "computed_by", "patched", "stops"),
    [
        (False, "fla", False, "no mask parts it"),
        (True, PYTORCH, False, "its PyTorch code reads no cu_seq_lens"),
        (True, "fla", False, ""),
        (False, PYTORCH, True, ""),
    ],
)
def test_kernels_that_are_told_where_samples_begin_are_not_judged(
    linear, monkeypatch, told, computed_by, patched, stops
):
    parts = anatomy(linear)
    monkeypatch.setattr("pytest_qvl.training.packed.mixer_kernels", lambda _: {"prompts": computed_by})
    if patched:
        mixer = next(layer.attention for layer in language_layers(parts) if not layer.attends)
        monkeypatch.setattr(mixer, "forward", lambda *_, **__: None)
    samples = torch.tensor([[0, 0, 1]])
    given = {"attention_mask": torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)[None, None]}
    given |= {"cu_seq_lens_q": torch.tensor([0, 2, 3])} if told else {}
    subject = SimpleNamespace(parts=parts)
    if stops:
        with pytest.raises(CheckFailed, match=stops):
            kept_apart(subject, samples, given)
    else:
        assert "up to its kernels: not judged" in kept_apart(subject, samples, given).notes[0]
