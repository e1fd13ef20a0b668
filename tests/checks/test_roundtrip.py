"""The adapter in the file and the one in the model: every kind survives, what is lost on the way is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from pytest_qvl.checks.adapter import adapter_census
from pytest_qvl.checks.roundtrip import adapter_roundtrip
from pytest_qvl.evidence import CannotJudge, CheckFailed
from pytest_qvl.models.adapters import ADAPTER_FILE, adapted_layers, adapter_parameters, remove_peft_layers
from pytest_qvl.models.anatomy import UnknownModelError, anatomy
from pytest_qvl.models.fingerprint.digests import digests
from pytest_qvl.models.sources.model_source import ModelSourceError

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
        {"bias": "lora_only"},
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


@pytest.fixture(scope="module")
def base(fresh_model: Any) -> Any:
    """A base model that tests adapt in turn; what they attach is taken off again."""
    return fresh_model()


@pytest.fixture
def bare(base: Any) -> Any:
    yield base
    remove_peft_layers(base)


@pytest.mark.parametrize("name", ["vlm", "step-500", "a b", "lora_A", "weight", "q_proj"])
def test_an_adapter_may_have_any_name(bare: Any, lora_config: Any, name: str) -> None:
    model = get_peft_model(bare, lora_config(target_modules=["q_proj"]), adapter_name=name)
    before = state(model)
    evidence = adapter_roundtrip(model)
    assert [f.value for f in evidence.figures if f.name.endswith("tensors compared")] == [8, 8]
    assert state(model) == before


def test_the_active_one_of_several_adapters_is_judged(bare: Any, lora_config: Any) -> None:
    model = get_peft_model(bare, lora_config(target_modules=["q_proj"]))
    model.add_adapter("second", lora_config(target_modules=["q_proj", "v_proj"], r=2))
    model.set_adapter("second")
    before = state(model)
    evidence = adapter_roundtrip(model)
    assert [f.value for f in evidence.figures if f.name.endswith("tensors compared")] == [16, 16]
    assert state(model) == before


@pytest.mark.usefixtures("transformers_takes_peft")
@pytest.mark.parametrize("name", ["default", "vlm"])
def test_an_adapter_that_transformers_added(bare: Any, lora_config: Any, name: str) -> None:
    bare.add_adapter(lora_config(target_modules=["q_proj"]), adapter_name=name)
    asks = {n: p.requires_grad for n, p in bare.named_parameters()}
    evidence = adapter_roundtrip(bare)
    assert [f.value for f in evidence.figures if f.name.endswith("tensors compared")] == [8, 8]
    assert {n: p.requires_grad for n, p in bare.named_parameters()} == asks
    assert bare.active_adapters() == [name]


def test_a_base_that_was_adapted_twice(bare: Any, lora_config: Any) -> None:
    get_peft_model(bare, lora_config(target_modules=["q_proj"]))
    assert adapter_roundtrip(get_peft_model(bare, lora_config(target_modules=["q_proj"]))).ok


def test_a_merged_adapter_stays_merged(fresh_model: Any) -> None:
    model = fresh_model(lora={"init_lora_weights": False})
    model.merge_adapter()
    before = state(model)
    assert adapter_roundtrip(model).notes == ("the adapter is merged into the base weights, and stayed merged",)
    assert all(layer.merged for layer in adapted_layers(anatomy(model)).values())
    assert state(model) == before


def test_other_kinds_of_adapters_are_not_judged(bare: Any, lora_config: Any) -> None:
    from peft import IA3Config, PromptTuningConfig

    prompts = get_peft_model(bare, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="the model's adapter is PROMPT_TUNING, which has no layers of its own"):
        adapter_roundtrip(prompts)
    ia3 = get_peft_model(bare, IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    with pytest.raises(CannotJudge, match="the adapter on the model is IA3"):
        adapter_roundtrip(ia3)


def test_a_wrapper_inside_a_wrapper_is_one_sentence(bare: Any, lora_config: Any) -> None:
    config = lora_config(target_modules=["q_proj"])
    with pytest.raises(UnknownModelError, match="PeftModel holds a PeftModel: wrap the base model once"):
        adapter_roundtrip(get_peft_model(get_peft_model(bare, config), config))


@pytest.fixture(scope="module")
def tied(fresh_model: Any) -> Any:
    """Head and embeddings are one tensor, as in Qwen2.5-VL-3B."""
    model = fresh_model()
    for config in (model.config, model.config.text_config):
        config.tie_word_embeddings = True
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    return model


@pytest.mark.parametrize("ensure", [False, True], ids=["left", "ensured"])
@pytest.mark.parametrize(
    ("lora", "lost"),
    [
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, "lm_head"),
        ({"modules_to_save": ["embed_tokens"]}, "lm_head"),
        ({"trainable_token_indices": [5, 6]}, ""),
        ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, "lm_head.lora_A, lm_head.lora_B"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lm_head.lora_A, lm_head.lora_B"),
    ],
    ids=["both saved", "one saved", "tokens", "both adapted", "one adapted"],
)
def test_tied_heads_come_back_on_a_fresh_base(tied: Any, lora_config: Any, lora: Any, lost: str, ensure: bool) -> None:
    config = lora_config(**{"target_modules": ["q_proj"], **lora, "ensure_weight_tying": ensure})
    model = get_peft_model(tied, config)
    try:
        before = state(model)
        evidence = adapter_roundtrip(model)
        assert adapter_census(model, config).ok
        assert state(model) == before
        # Transformers 4 lists the names of tied weights, and PEFT then ties the second adapter too; 5 has a mapping.
        loses = ensure and lost and isinstance(tied._tied_weights_keys, dict)
        assert [f"loses {lost}: embeddings and head are tied" in note for note in evidence.notes] == (
            [True] if loses else []
        )
    finally:
        remove_peft_layers(tied)
        tied.requires_grad_(False)


def test_base_weights_that_a_trainer_saves_along_are_no_loss(fresh_model: Any, tmp_path: Any) -> None:
    model = fresh_model(lora={"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": False})
    model.save_pretrained(tmp_path)  # as Trainer does: embeddings that are adapted are saved too
    assert any("base_layer" in name for name in load_file(tmp_path / ADAPTER_FILE))
    evidence = adapter_roundtrip(model, tmp_path)
    assert {f.name: f.value for f in evidence.figures}[f"{tmp_path}: base weights beside the adapter, compared"] == 1
    with torch.no_grad():
        model.base_model.model.model.language_model.embed_tokens.base_layer.weight[3] += 1
    assert "1 of 1 are not bitwise those of this base model: " in refused(model, tmp_path)


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


def rewrite(folder: Any, change: Any) -> None:
    file = folder / ADAPTER_FILE
    save_file({name: change(name, value) for name, value in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name, v: v * 0 if "lora_B" in name else v, "the adapter does nothing: 28 of 28 adapted layers of "),
        (lambda name, v: v * 0 if "lora_A" in name else v, "whatever goes in (A is all zero in 28, first model."),
        (lambda _, v: v.view(-1).index_fill(0, torch.tensor([3]), float("nan")).view_as(v), "56 of 56 adapter tensors"),
        (lambda _, v: (v * 100).to(torch.int8), "56 of 56 tensors of "),
    ],
    ids=["B", "A", "nan", "int8"],
)
def test_an_adapter_that_is_not_worth_loading(bare: Any, trained: Any, change: Any, said: str) -> None:
    from peft import PeftModel

    folder = trained[1]
    rewrite(folder, change)
    assert said in refused(PeftModel.from_pretrained(bare, folder), folder)


def test_layers_without_effect_beside_others_are_a_note(trained: Any) -> None:
    model, folder = trained
    with torch.no_grad():
        next(p for n, p in adapter_parameters(anatomy(model)).items() if ".lora_B." in n).zero_()
    model.save_pretrained(folder)
    (note,) = adapter_roundtrip(model, folder).notes
    assert note.startswith("1 of 28 adapted layers of ")
    assert "self_attn.q_proj (B is all zero)" in note


def test_an_alpha_of_zero(bare: Any, lora_config: Any, trained: Any) -> None:
    from peft import PeftModel

    folder = trained[1]
    retell(folder, lora_alpha=0)
    model = PeftModel.from_pretrained(bare, folder, is_trainable=True)
    said = refused(model, folder)
    assert "(lora_alpha is 0 in 28, first model." in said
    assert said.endswith("put back the lora_alpha of the training (alpha_pattern too) into adapter_config.json")
    assert "before its training" not in said
    with pytest.raises(CheckFailed, match="lora_alpha is 0 for 28 adapted layers"):
        adapter_census(model, lora_config(lora_alpha=0))


def test_a_training_with_an_alpha_of_zero(bare: Any, lora_config: Any, tmp_path: Any) -> None:
    """Its gradients are zero, so that B is what it was: no other alpha brings back what was never learned."""
    model = get_peft_model(bare, lora_config(lora_alpha=0))
    model.save_pretrained(tmp_path)
    assert refused(model, tmp_path).endswith("learns nothing: train again with a lora_alpha above 0")


def test_a_scaling_that_was_set_to_zero(bare: Any, trained: Any) -> None:
    from peft import PeftModel

    model = PeftModel.from_pretrained(bare, trained[1])
    for layer in adapted_layers(anatomy(model)).values():
        layer.set_scale("default", 0)
    said = refused(model, trained[1])
    assert "(its scaling is 0 in 28, first model." in said
    assert said.endswith("as by set_scale(): load it again")


def test_layers_that_do_nothing_each_for_its_own_reason(bare: Any, trained: Any) -> None:
    from peft import PeftModel

    folder = trained[1]
    rewrite(folder, lambda name, v: v * 0 if "q_proj.lora_B" in name else v * 0 if "k_proj.lora_A" in name else v)
    retell(folder, alpha_pattern={"(v|o|gate|up|down)_proj": 0})
    said = refused(PeftModel.from_pretrained(bare, folder), folder)
    for words in (
        "(B is all zero in 4, first model.",
        "; A is all zero in 4, first model.",
        "; lora_alpha is 0 in 20, first model.",
        "; it was saved before its training, or its matrices were lost on the way; its matrices were lost on the way, "
        "since training does not make them so; put back the lora_alpha of the training",
    ):
        assert words in said


def retell(folder: Any, **changed: Any) -> None:
    """Change fields of the saved configuration."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


def test_an_adapter_of_another_base_model_names_both(trained: Any) -> None:
    model, folder = trained
    retell(folder, base_model_name_or_path="Qwen/Qwen2-VL-2B-Instruct")
    said = refused(model, folder)
    assert said.startswith("the adapter was trained for 'Qwen/Qwen2-VL-2B-Instruct' (base_model_name_or_path ")
    assert "embedded', which is qwen2_5_vl: load it on the model it was trained for" in said
    retell(folder, base_model_name_or_path="/elsewhere/sft-3")
    (note,) = adapter_roundtrip(model, folder).notes
    assert "'/elsewhere/sft-3'" in note
    retell(folder, base_model_name_or_path="/moved/embedded/")
    assert not adapter_roundtrip(model, folder).notes


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
