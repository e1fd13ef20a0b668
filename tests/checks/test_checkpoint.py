"""The check of a checkpoint's completeness, on a user's own model and folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pytest_qvl.checks import checkpoint_complete
from pytest_qvl.evidence import CannotJudge, CheckFailed
from pytest_qvl.faults.matrix.random_models import random_config
from pytest_qvl.models.sources.synthetic_checkpoint import write_checkpoint


@pytest.fixture(scope="module")
def model(fresh_model: Any) -> Any:
    return fresh_model(lora={"target_modules": "all-linear", "modules_to_save": ["lm_head"]})


def test_healthy(model: Any, tiny_dir: Path) -> None:
    evidence = checkpoint_complete(model, tiny_dir)
    assert {figure.value for figure in evidence.figures} == {0}
    assert checkpoint_complete(model).ok  # by the folder that the model names


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_packed_bits_that_read_as_nan_are_no_numbers(fresh_model: Any, tiny_dir: Path, storage: str) -> None:
    """FSDP needs packed weights stored in the dtype of all others (``bnb_4bit_quant_storage``)."""
    model = fresh_model(bnb_4bit_quant_storage=storage)
    packed = [p for p in model.parameters() if getattr(p, "quant_state", None) is not None and p.is_floating_point()]
    assert not all(bool(p.isfinite().all()) for p in packed)
    assert checkpoint_complete(model, tiny_dir).ok


@pytest.mark.parametrize(
    "adapter", [{"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [1, 2]}], ids=str
)
def test_adapted_embeddings_are_those_of_the_checkpoint(fresh_model: Any, tiny_dir: Path, adapter: Any) -> None:
    assert checkpoint_complete(fresh_model(lora=adapter), tiny_dir).ok


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning:peft")
def test_a_tied_head_of_which_a_copy_is_trained_is_not_missing(tmp_path: Path, lora_config: Any) -> None:
    from peft import get_peft_model
    from transformers import AutoModelForImageTextToText

    folder = tmp_path / "model"
    config = random_config("qwen2_5_vl", layers=1, blocks=2, tied=True)
    write_checkpoint(config, folder, lambda _: None, device="cpu", dtype="float32")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert checkpoint_complete(get_peft_model(model, lora_config(modules_to_save=["lm_head"]))).ok


def test_what_is_missing_is_named(model: Any, tiny_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_dir, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    tensors["v_head.summary.weight"] = torch.ones(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckFailed, match=r"lacks 1 tensor \(lm_head.weight\)") as caught:
        checkpoint_complete(model, folder)
    assert "holds 1 tensor (v_head.summary.weight) that the model has no place for" in str(caught.value)


def test_tensors_without_data(fresh_model: Any, tiny_dir: Path) -> None:
    model = fresh_model()
    model.lm_head.to("meta")
    with pytest.raises(CheckFailed, match="1 tensors are on the meta device .*lm_head.weight"):
        checkpoint_complete(model, tiny_dir)


def test_nobody_knows_the_checkpoint(fresh_model: Any, tmp_path: Path) -> None:
    model = fresh_model()
    model.name_or_path = ""
    with pytest.raises(CannotJudge, match="pass the checkpoint's folder"):
        checkpoint_complete(model)
    with pytest.raises(ValueError, match=r"is no folder with \*.safetensors"):
        checkpoint_complete(model, tmp_path)
