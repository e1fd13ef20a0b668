"""The adapter in the file and the one in the model: every kind survives, what is lost on the way is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pytest_qvl.checks.roundtrip import adapter_roundtrip
from pytest_qvl.evidence import CheckFailed
from pytest_qvl.models.adapters import ADAPTER_FILE, adapter_parameters
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.fingerprint import digests
from pytest_qvl.models.weights import ModelSourceError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def state(model: Any) -> Any:
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    asks = {name: p.requires_grad for name, p in model.named_parameters()}
    return digests(tensors.items()), asks, list(model.peft_config), model.active_adapters, model.training


def refused(*args: Any) -> str:
    with pytest.raises(CheckFailed) as caught:
        adapter_roundtrip(*args)
    return str(caught.value).splitlines()[0]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 4}},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"lora_bias": True},
        {"trainable_token_indices": [3, 4]},
    ],
    ids=lambda overrides: " ".join(overrides) or "plain",
)
def test_a_fresh_adapter_comes_back_and_the_model_is_left_alone(fresh_model: Any, overrides: Any) -> None:
    model = fresh_model(lora=overrides)
    before = state(model)
    evidence = adapter_roundtrip(model)
    compared = {f.name: f.value for f in evidence.figures if f.name.endswith("tensors compared")}
    assert len(compared) == 2
    assert set(compared.values()) == {sum(p.requires_grad for p in model.parameters())}
    assert state(model) == before


def test_an_adapter_that_rewrites_the_base_is_not_attached_twice(fresh_model: Any) -> None:
    model = fresh_model(lora={"init_lora_weights": "olora"})
    before = state(model)
    assert "not loaded back" in adapter_roundtrip(model).notes[0]
    assert state(model) == before


@pytest.fixture
def trained(fresh_model: Any, tmp_path: Any) -> Any:
    """A model whose adapter has learned something, and the folder it was saved in."""
    model = fresh_model(lora=True)
    with torch.no_grad():
        for name, parameter in adapter_parameters(anatomy(model)).items():
            if ".lora_B." in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_what_was_loaded_is_what_is_in_the_folder(fresh_model: Any, trained: Any) -> None:
    from peft import PeftModel

    model, folder = trained
    assert adapter_roundtrip(model, folder).ok
    assert adapter_roundtrip(PeftModel.from_pretrained(fresh_model(), folder), str(folder)).ok
    model.disable_adapter_layers()
    assert adapter_roundtrip(model, folder).ok


def test_an_adapter_kept_in_another_dtype_is_the_same_adapter(trained: Any) -> None:
    model, folder = trained
    for parameter in adapter_parameters(anatomy(model)).values():
        parameter.data = parameter.data.to(torch.bfloat16)
    assert adapter_roundtrip(model, folder).ok


def test_another_prefix_is_no_loss_if_it_was_mapped(trained: Any) -> None:
    model, folder = trained
    rename(folder, ".language_model.", ".")
    assert adapter_roundtrip(model, folder).ok


def rename(folder: Any, old: str, new: str) -> None:
    file = folder / ADAPTER_FILE
    save_file({name.replace(old, new): value for name, value in load_file(file).items()}, file)


def test_an_adapter_that_was_never_loaded(fresh_model: Any, trained: Any) -> None:
    from peft import PeftModel

    _, folder = trained
    rename(folder, ".language_model.", ".old.")
    model = PeftModel.from_pretrained(fresh_model(), folder)
    said = refused(model, folder)
    assert said.startswith("56 of 56 adapter tensors are not bitwise those of ")
    assert " there and 0 in the model)" in said
    assert "the model calls it model.language_model.layers.0." in said
    assert said.partition(" [")[0].endswith("the adapter was never loaded")


def test_one_bit(trained: Any) -> None:
    model, folder = trained
    with torch.no_grad():
        name, parameter = list(adapter_parameters(anatomy(model)).items())[7]
        parameter.view(torch.int32).view(-1)[3] ^= 1
    assert refused(model, folder).startswith("1 of 56 adapter tensors are not bitwise those of ")
    assert name.replace(".default.weight", "") in refused(model, folder)


def test_another_rank_and_missing_or_surplus_tensors(fresh_model: Any, trained: Any) -> None:
    _, folder = trained
    assert " is (8, 256) there and (4, 256) in the model)" in refused(fresh_model(lora={"r": 4}), folder)
    fewer = fresh_model(lora={"target_modules": r".*language_model.*\.q_proj"})
    assert refused(fewer, folder).startswith("48 of 56 tensors of ")
    more = fresh_model(lora={"target_modules": r".*(language_model.*\.(q|k|v|o|gate|up|down)_proj|merger\.mlp\.2)"})
    assert refused(more, folder).startswith("2 of 58 adapter tensors of the model are not in ")


def test_bad_input_is_one_clear_error(fresh_model: Any, lora_model: Any, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="the model carries no adapter"):
        adapter_roundtrip(fresh_model())
    with pytest.raises(ModelSourceError, match="does not exist"):
        adapter_roundtrip(lora_model, tmp_path / "nowhere")
