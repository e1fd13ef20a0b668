"""The one owner of the model, on the embedded model: what it loads, shows, restores, and gives back."""

from __future__ import annotations

import gc
import json
import struct
import weakref

import pytest

from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.adapter_versions import FRESH
from pytest_qvl.models.attaching import adapter_folder, saved_lora_config
from pytest_qvl.models.backends import LoadRequest, ModelLoadError, one_line
from pytest_qvl.models.memory import refuse_if_too_big
from pytest_qvl.models.owner import ModelOwner, value_key
from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.models.sources.model_source import ModelSource, parse_model

LANGUAGE = r".*language_model.*\.q_proj"


@pytest.fixture(scope="module")
def said():
    """Lines of progress."""
    return []


@pytest.fixture(scope="module")
def owner(said):
    import torch

    torch.set_num_threads(1)
    owner = ModelOwner(said.append)
    yield owner
    owner.release()


@pytest.fixture
def request_for():
    def make(**overrides):
        import torch
        from transformers import BitsAndBytesConfig

        dtype = overrides.pop("dtype", "bfloat16")
        quantization = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.bfloat16,
            "llm_int8_skip_modules": ["model.visual", "lm_head"],
            **overrides,
        }
        return LoadRequest(parse_model("embedded"), BitsAndBytesConfig(**quantization), "cpu", dtype)

    return make


@pytest.fixture
def lora():
    def make(**overrides):
        from peft import LoraConfig

        return LoraConfig(**{"r": 4, "target_modules": LANGUAGE, **overrides})

    return make


@pytest.fixture
def base(owner, request_for):
    """A clean base model, as the owner shows it."""
    owner.drop_adapter()
    return owner.base(request_for(), "transformers")


@pytest.fixture
def adapted(owner, base, lora):
    """The base model with a fresh adapter on it."""
    return owner.adapted(base, "transformers", lora(), None, 0)


def lora_b(model):
    return [p for name, p in model.named_parameters() if "lora_B" in name]


def fill(model, value):
    import torch

    with torch.no_grad():
        for parameter in lora_b(model):
            parameter.fill_(value)


def holds(model, value):
    return bool(lora_b(model)) and all((p == value).all() for p in lora_b(model))


def has_lora(model):
    return any("lora" in name for name, _ in model.named_modules())


def norm(model):
    return model.model.language_model.norm.weight


def test_a_key_is_equal_exactly_when_values_are(lora):
    assert value_key(lora(), None, 0) == value_key(lora(), None, 0)
    assert value_key(lora(target_modules={"a", "b"})) == value_key(lora(target_modules={"b", "a"}))
    different = [value_key(lora(), None, 0), value_key(lora(r=5), None, 0), value_key(lora(), "folder", 0)]
    different += [value_key(lora(), None, 1), value_key(lora(rank_pattern={"q_proj": 2}), None, 0)]
    assert len(set(different)) == len(different)


def test_equal_values_are_loaded_once_and_other_values_replace_the_model(owner, request_for, said):
    first = owner.base(request_for(), "transformers")
    loads = len(said)
    assert owner.base(request_for(), "transformers") is first
    assert len(said) == loads
    gone = weakref.ref(first)
    del first
    second = owner.base(request_for(bnb_4bit_use_double_quant=True), "transformers")
    gc.collect()
    assert gone() is None
    assert said[loads:] == ["loading embedded on cpu"]
    assert not second.training
    assert not any(parameter.requires_grad for parameter in second.parameters())


def test_the_adapter_goes_on_and_off_in_place(owner, base, lora):
    adapted = owner.adapted(base, "transformers", lora(), None, 0)
    assert adapted.get_base_model() is base
    assert owner.resident is adapted
    assert has_lora(base)
    assert owner.show_base()
    assert owner.resident is base
    assert not has_lora(base)
    assert owner.show_adapted(FRESH)
    assert owner.resident is adapted
    assert has_lora(base)


def test_the_same_configuration_keeps_the_adapter_and_another_replaces_it(owner, base, adapted, lora):
    fill(adapted, 3)
    owner.snapshot_trained("somebody")
    assert owner.adapted(base, "transformers", lora(), None, 0) is adapted
    assert holds(adapted, 0)
    other = owner.adapted(base, "transformers", lora(r=2), None, 0)
    assert other is not adapted
    assert other.peft_config["default"].r == 2
    assert owner.latest(frozenset({"somebody"})) is FRESH


def test_adapters_of_one_seed_are_equal_and_leave_the_users_random_numbers_alone(owner, base, lora):
    import torch

    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    weights = []
    for seed in (1, 1, 2):
        model = owner.adapted(base, "transformers", lora(), None, seed)
        weights.append(next(p for name, p in model.named_parameters() if "lora_A" in name).detach().clone())
        owner.drop_adapter()
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.rand(1), expected)


def test_peft_does_not_write_into_the_users_configuration(owner, base, lora):
    config = lora(target_modules="all-linear", exclude_modules=r".*visual.*")
    before = value_key(config)
    owner.adapted(base, "transformers", config, None, 0)
    assert value_key(config) == before


def test_who_trained_gets_back_what_they_trained(owner, adapted):
    fill(adapted, 1)
    owner.snapshot_trained("first")
    fill(adapted, 2)
    owner.snapshot_trained("second")
    assert owner.adapter_changes() == []
    assert owner.latest(frozenset({"first", "second", "nobody"})) == "second"
    for version, value in (("first", 1), (FRESH, 0), ("second", 2)):
        assert owner.show_adapted(version)
        assert holds(adapted, value)
    owner.forget("second")
    assert owner.adapter_changes() == []
    assert owner.show_adapted("first")
    assert holds(adapted, 1)
    assert not owner.show_adapted("second")


def test_changes_of_an_adapter_are_named_and_undone(owner, adapted):
    assert owner.adapter_changes() == []
    lora_b(adapted)[1].data[0, 0] = float("nan")
    assert owner.adapter_changes() == ["model.language_model.layers.1.self_attn.q_proj.lora_B.default.weight"]
    assert owner.restore_adapter()
    assert owner.adapter_changes() == []
    assert holds(adapted, 0)


def test_an_added_adapter_is_named_and_cannot_be_undone_in_place(owner, adapted, lora):
    adapted.add_adapter("second", lora())
    assert all(".second." in name for name in owner.adapter_changes())
    assert owner.adapter_changes()
    assert not owner.restore_adapter()


def test_changes_of_the_base_are_named(owner, base):
    import torch

    assert owner.base_changes() == []
    before = norm(base).detach().clone()
    with torch.no_grad():
        norm(base)[3] += 1
    assert owner.base_changes() == ["model.language_model.norm.weight"]
    with torch.no_grad():
        norm(base).copy_(before)
    assert owner.base_changes() == []


def test_a_first_forward_is_not_a_change_although_dtypes_differ(owner, request_for):
    """bitsandbytes casts the biases of its layers to the compute dtype, in place, when they first run."""
    import torch

    from pytest_qvl.models.sources.processors import load_processor
    from pytest_qvl.samples import make_batch, scenes

    base = owner.base(request_for(bnb_4bit_compute_dtype=torch.float16, dtype="bfloat16"), "transformers")
    batch = make_batch(load_processor(embedded_model_dir()), scenes(0, 1)[:1])
    with torch.no_grad():
        base(**batch)
    assert owner.base_changes() == []


def test_a_first_forward_of_a_model_that_somebody_else_loaded_is_no_change(owner, request_for):
    """On CPUs with AVX512-BF16, bitsandbytes repacks quantized weights in place when they first run."""
    import torch
    from transformers import AutoModelForImageTextToText

    from pytest_qvl.models.sources.processors import load_processor
    from pytest_qvl.samples import make_batch, scenes

    model = AutoModelForImageTextToText.from_pretrained(
        embedded_model_dir(), quantization_config=request_for().quantization_config, dtype=torch.float32
    )
    assert owner.track_external(model, "somebody")
    assert owner.resident is model
    with torch.no_grad():
        model.eval()(**make_batch(load_processor(embedded_model_dir()), scenes(0, 1)[:1]))
    assert owner.base_changes() == []


def test_every_show_starts_from_rest(owner, adapted):
    adapted.train()
    lora_b(adapted)[0].grad = lora_b(adapted)[0].detach().clone()
    adapted.get_base_model().model.rope_deltas = 1
    owner.show_adapted(FRESH)
    assert not any(module.training for module in adapted.modules())
    assert lora_b(adapted)[0].grad is None
    assert adapted.get_base_model().model.rope_deltas is None


@pytest.mark.parametrize("target", [["no_such_layer"], r".*(language_model.*q_proj|norm)"], ids=["none", "half way"])
def test_an_attachment_that_fails_leaves_the_base_as_it_was(owner, base, lora, target):
    with pytest.raises(ModelLoadError, match="^no adapter on Qwen2_5_VLForConditionalGeneration: .*Target module"):
        owner.adapted(base, "transformers", lora(target_modules=target), None, 0)
    assert not has_lora(base)
    assert owner.show_base()
    assert owner.base_changes() == []
    assert has_lora(owner.adapted(base, "transformers", lora(), None, 0))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"r": "8"}, r"r of the LoRA config is '8'; expected a whole number of at least 1"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] of the LoRA config is 0; expected"),
        ({"lora_alpha": "16"}, "lora_alpha of the LoRA config is '16'; expected a number"),
        ({"target_modules": "(q_proj"}, r"'\(q_proj', which is no regular expression: missing \), unterminated"),
        ({"init_lora_weights": "pissa"}, "'pissa' starts from the singular values of the base weights, which 4-bit"),
        (
            {"init_lora_weights": "orthogonal"},
            "'orthogonal' makes A and B in the dtype of the base .*: use init_lora_we",
        ),
        ({"init_lora_weights": "orthogonal", "r": 7}, "so the rank has to be even: r=7"),
        (
            {"init_lora_weights": "ortogonal"},
            "'ortogonal' is none that the installed PEFT knows: use init_lora_weights",
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_configuration_that_peft_stumbles_over_is_one_sentence(owner, base, lora, overrides, words):
    with pytest.raises((ValueError, ModelLoadError), match=words) as caught:
        owner.adapted(base, "transformers", lora(**overrides), None, 0)
    assert len(str(caught.value).splitlines()) == 1
    assert owner.show_base()


def test_what_is_no_lora_configuration_is_named(owner, base):
    from peft import IA3Config

    for config, words in (
        ({"r": 8}, r"gives a dict; .*write peft\.LoraConfig\("),
        (IA3Config(), "gives a IA3Config; "),
    ):
        with pytest.raises(ValueError, match=words):
            owner.adapted(base, "transformers", config, None, 0)


def test_an_adapter_that_does_not_fit_says_why(owner, base, lora, tmp_path):
    from peft import LoraConfig

    folder = str(tmp_path)
    owner.adapted(base, "transformers", lora(modules_to_save=["lm_head"]), None, 0).save_pretrained(folder)
    with pytest.raises(ModelLoadError, match=r"is \(4, 128\) in its file and \(2, 128\).*rank 4, .* asks for r=2"):
        owner.adapted(base, "transformers", lora(r=2), folder, 0)
    with pytest.raises(ModelLoadError, match=r"lacks 'base_model\..*embed_tokens\.weight', which its adapter_config"):
        owner.adapted(base, "transformers", lora(modules_to_save=["embed_tokens"]), folder, 0)
    moved = lora(target_modules=r".*language_model.*\.(q|v)_proj", modules_to_save=["lm_head"])
    rename(tmp_path, ".q_proj.", ".v_proj.")
    with pytest.raises(ModelLoadError, match=r"is \(128, 4\) in its file and \(64, 4\).*trained for '.*', which is of"):
        owner.adapted(base, "transformers", moved, folder, 0)
    owner.drop_adapter()
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}')
    assert isinstance(saved_lora_config(tmp_path), LoraConfig)


def rename(folder, old, new):
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file({name.replace(old, new): value for name, value in load_file(file).items()}, file)


def test_a_value_that_is_no_adapter_folder():
    assert adapter_folder(None) is None
    for value, said in ((5, "qvl_adapter gives 5; expected the folder"), ("/nope", "folder '/nope' does not exist")):
        with pytest.raises(ValueError, match=said):
            adapter_folder(value)


TOKENS = {"trainable_token_indices": [5, 6]}


@pytest.mark.parametrize(
    "beside", [{"modules_to_save": ["lm_head"]}, TOKENS, {"bias": "lora_only"}], ids=lambda beside: next(iter(beside))
)
def test_what_peft_trains_besides_adapters_comes_off_and_back_too(owner, base, lora, beside):
    from pytest_qvl.models.adapters import peft_layers
    from pytest_qvl.models.anatomy import anatomy

    names, head = [name for name, _ in base.named_parameters()], base.lm_head
    model = owner.adapted(base, "transformers", lora(**beside), None, 0)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert owner.base_changes() == []
    assert owner.adapter_changes() == []
    assert owner.show_base()
    assert not peft_layers(anatomy(base))
    assert base.lm_head is head
    assert [name for name, _ in base.named_parameters()] == names
    assert not any(p.requires_grad for p in base.parameters())
    assert owner.base_changes() == []
    assert owner.show_adapted(FRESH)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert owner.base_changes() == owner.adapter_changes() == []
    owner.drop_adapter()


@pytest.mark.usefixtures("transformers_takes_peft")
def test_an_adapter_that_transformers_added_is_taken_over(owner, request_for, lora):
    base = owner.base(request_for(), "transformers")
    base.add_adapter(lora(r=3), adapter_name="vlm")
    fill(base, 5)
    assert owner.track_external(base, "somebody")
    assert owner.adapter_changes() == owner.base_changes() == []
    fill(base, 6)
    assert owner.restore_adapter()
    assert holds(base, 5)
    assert owner.show_base()
    assert not has_lora(base)
    owner.release()


def test_a_model_wrapped_by_somebody_else_is_taken_over(owner, base, lora):
    from peft import get_peft_model

    model = get_peft_model(base, lora(r=3))
    fill(model, 5)
    assert owner.track_external(model, "somebody")
    assert owner.resident is model
    assert owner.usable_by(frozenset())
    assert owner.adapter_changes() == owner.base_changes() == []
    fill(model, 6)
    assert owner.restore_adapter()
    assert holds(model, 5)
    assert owner.show_base()
    assert not has_lora(base)


def test_whoever_changes_the_base_while_wrapping_it_is_the_only_one_it_fits(owner, request_for, lora):
    from peft import get_peft_model, prepare_model_for_kbit_training

    base = owner.base(request_for(), "transformers")
    model = get_peft_model(prepare_model_for_kbit_training(base, use_gradient_checkpointing=False), lora())
    assert owner.track_external(model, "somebody")
    assert owner.usable_by(frozenset({"somebody", "else"}))
    assert not owner.usable_by(frozenset({"else"}))
    owner.forget("somebody")
    assert not owner.usable_by(frozenset({"somebody"}))
    assert owner.base(request_for(), "transformers") is not base
    assert owner.usable_by(frozenset())


def test_what_is_no_model_is_not_taken(owner, base, lora):
    assert not owner.track_external(object(), "somebody")
    assert owner.resident is base
    with pytest.raises(ModelLoadError, match="no adapter on object: not a model that this package knows"):
        owner.adapted(object(), "transformers", lora(), None, 0)


def test_release_gives_everything_back(owner, request_for, lora):
    gone = weakref.ref(owner.adapted(owner.base(request_for(), "transformers"), "transformers", lora(), None, 0))
    base = weakref.ref(gone().get_base_model())
    owner.release()
    assert gone() is None
    assert base() is None
    assert owner.resident is None
    owner.release()


def test_a_backend_that_nobody_knows(owner, request_for):
    with pytest.raises(ValueError, match="'vllm'"):
        owner.base(request_for(), "vllm")


def test_full_precision_is_alone_in_memory(owner, request_for):
    import torch

    gone = weakref.ref(owner.base(request_for(), "transformers"))
    with owner.full_precision(request_for(), "transformers") as model:
        assert owner.resident is None
        assert gone() is None
        assert type(model.model.language_model.layers[0].self_attn.q_proj) is torch.nn.Linear
        assert next(model.parameters()).dtype == torch.bfloat16


def test_a_reference_that_cannot_fit_says_how_much_it_needs(tmp_path, request_for):
    header = json.dumps({"a": {"dtype": "BF16", "shape": [2**20, 2**20], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    request = LoadRequest(ModelSource("local", str(tmp_path)), None, "cpu", "bfloat16")
    with pytest.raises(CannotJudge, match=r"needs 2048\.0 GiB for its weights alone, [\d.]+ GiB are free on cpu"):
        refuse_if_too_big(request)
    refuse_if_too_big(request_for())


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("first\nsecond"), "ValueError: first"),
        (RuntimeError("Errors in loading:\n\tsize mismatch\nmore"), "RuntimeError: Errors in loading: size mismatch"),
        (KeyError(), "KeyError"),
    ],
)
def test_an_error_in_one_line(error, line):
    assert one_line(error) == line
