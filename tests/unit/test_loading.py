"""What a checkpoint lacks, holds too much or in another shape is said by name, whichever way it is found out."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pytest_qvl.faults.case import load as load_case
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.backends import LoadRequest, ModelLoadError
from pytest_qvl.models.backends.transformers import TransformersBackend
from pytest_qvl.models.owner import ModelOwner
from pytest_qvl.models.quantized import linear_states, usual_quantization
from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.models.sources.loading import LoadingReport, compared_with, kept_report, refuse_unfit, why_not_loaded
from pytest_qvl.models.sources.model_source import parameter_count, parse_model, stored_tensors

TRANSFORMERS_5 = not transformers.__version__.startswith("4.")
ROWS = 8


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def in_4bit(tmp_path_factory):
    """The embedded checkpoint as ``save_pretrained`` of the 4-bit model writes it."""
    folder = shutil.copytree(embedded_model_dir(), tmp_path_factory.mktemp("saved") / "in-4-bits")
    load_case(lora=None).save_pretrained(folder)
    return folder


def changed(tmp_path, change, source=None, config=None):
    folder = shutil.copytree(source or embedded_model_dir(), tmp_path / "checkpoint")
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    if config is not None:
        content = json.loads((folder / "config.json").read_text())
        config(content)
        (folder / "config.json").write_text(json.dumps(content))
    return folder


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def load(folder, quantized=True):
    config = usual_quantization(torch.float32) if quantized else None
    return TransformersBackend().load(LoadRequest(parse_model(str(folder)), config, "cpu", "float32"))


def refused(folder, quantized=True):
    with pytest.raises(ModelLoadError) as caught:
        refuse_unfit(load(folder, quantized))
    return str(caught.value)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("lm_head", 'lacks 1 tensor (lm_head.weight) of the model, .* random values.*"tie_word_embeddings": true'),
        ("merger", r"lacks 5 tensors \(model.visual.merger.ln_q.weight, .*, \.\.\.\) .* not complete"),
        (".layers.1.", r"lacks 12 tensors \(model.language_model.layers.1.input_layernorm.weight"),
    ],
)
def test_missing_tensors_are_named_before_anything_is_judged(tmp_path, part, says):
    folder = changed(tmp_path, without(part))
    pattern = says if r"\(" in says else says.replace("(", r"\(").replace(")", r"\)")
    owner = ModelOwner(lambda _: None)
    request = LoadRequest(parse_model(str(folder)), usual_quantization(torch.float32), "cpu", "float32")
    with pytest.raises(ModelLoadError, match=pattern), owner.full_precision(request, "transformers"):
        pass
    with pytest.raises(ModelLoadError, match=pattern) as caught:
        owner.base(request, "transformers")
    assert "cannot compute" not in str(caught.value)  # one cause, one sentence


def test_the_files_headers_tell_what_transformers_reports(tmp_path):
    def change(tensors):
        rows = {"lm_head.weight": tensors["lm_head.weight"][:-ROWS].clone()}
        return {**without("blocks.2.")(tensors), **rows, "model.layers.9.self_attn.q_proj.weight": torch.ones(2)}

    folder = changed(tmp_path, change)
    model = load(folder, quantized=False)
    reported = kept_report(model)
    assert reported == compared_with(model, folder, reported.checkpoint)
    assert len(reported.missing) == 12
    assert reported.unexpected == ("model.language_model.layers.9.self_attn.q_proj.weight",)
    assert [name for name, *_ in reported.mismatched] == ["lm_head.weight"]


def test_a_healthy_checkpoint_fits_in_any_form(in_4bit, tmp_path):
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2), "visual.position_ids": torch.ones(2)}
    harmless = changed(tmp_path, lambda tensors: {**tensors, **buffers})
    for folder, quantized in ((embedded_model_dir(), True), (in_4bit, True), (in_4bit, False), (harmless, False)):
        model = load(folder, quantized)
        refuse_unfit(model)
        assert kept_report(model).problems == compared_with(model, folder).problems == ()


def test_a_tied_head_is_not_missing(tmp_path):
    def tie(config):
        config["tie_word_embeddings"] = True

    folder = changed(tmp_path, without("lm_head"), config=tie)
    model = load(folder, quantized=False)
    assert kept_report(model).problems == compared_with(model, folder).problems == ()


def test_a_vocabulary_that_was_cut_in_the_file_only(tmp_path):
    def cut(tensors):
        return {
            n: t[:-ROWS].clone() if n in ("lm_head.weight", "model.embed_tokens.weight") else t
            for n, t in tensors.items()
        }

    rows = load_file(embedded_model_dir() / "model.safetensors")["lm_head.weight"].shape[0] - ROWS
    folder = changed(tmp_path, cut)
    for quantized in (True, False):
        assert f'the vocabulary was changed; set "vocab_size" to {rows}' in refused(folder, quantized)


@pytest.mark.parametrize(
    ("missing", "unexpected", "says"),
    [
        (
            ("model.visual.blocks.0.attn.qkv.weight",),
            ("thinker.visual.blocks.0.attn.qkv.weight",),
            r"it holds them under other names \(thinker.visual",
        ),
        (("lm_head.weight",), (), "in text_config alone it does not tie"),
        ((), ("model.layers.0.q_proj.lora_A.default.weight",), "these are an adapter's"),
        ((), ("v_head.weight",), "config.json describes a smaller or another model"),
    ],
)
def test_the_usual_causes(missing, unexpected, says):
    import re

    assert re.search(says, LoadingReport("it", missing, unexpected).problems[-1 if not missing else 0])


def test_a_load_that_crashes_on_what_is_missing_says_what_is_missing(in_4bit, tmp_path):
    folder = changed(tmp_path, without(".layers.1."), in_4bit)
    with pytest.raises(ModelLoadError, match=r"could not be loaded: the checkpoint lacks 12 tensors \(model.language"):
        load(folder)
    assert why_not_loaded(parse_model("embedded"), ValueError("its own words\nand more")) == "ValueError: its own words"


def test_a_folder_saved_in_4_bits_is_dequantized_for_the_reference(in_4bit):
    four, full = load(in_4bit), load(in_4bit, quantized=False)
    name = "model.language_model.layers.0.mlp.down_proj"
    packed, plain = four.get_submodule(name).weight, full.get_submodule(name).weight
    from bitsandbytes.functional import dequantize_4bit

    assert torch.equal(plain, dequantize_4bit(packed.data, packed.quant_state).float())
    assert not any(state.is_quantized for state in linear_states(anatomy(full)))
    # Transformers 5.17 would leave the vision tower in the dtype that it has on disk.
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    assert {p.dtype for p in four.parameters() if getattr(p, "quant_state", None) is None} == {torch.float32}


def test_the_values_of_4_bit_files_are_counted_and_not_their_bytes(in_4bit):
    assert parameter_count(in_4bit) == parameter_count(embedded_model_dir())
    assert sum(tensor.is_4bit for tensor in stored_tensors(in_4bit).values()) == 28


@pytest.mark.skipif(not TRANSFORMERS_5, reason="Transformers 4 matches 'visual' anywhere in a name")
def test_a_skip_list_of_transformers_4_over_16_bit_weights(in_4bit, tmp_path):
    def old(config):
        config["quantization_config"]["llm_int8_skip_modules"] = ["visual", "lm_head"]

    message = refused(changed(tmp_path, dict, in_4bit, old))
    assert message.startswith("vision: 20 linears (model.visual.blocks.0.attn.qkv, ...), merger: 2 linears")
    assert "'visual' (write 'model.visual') in its config.json" in message


@pytest.mark.skipif(not TRANSFORMERS_5, reason="Transformers 4 matches 'mlp' anywhere in a name")
@pytest.mark.parametrize("entry", ["mlp", "self_attn"])
def test_advice_for_a_skip_list_of_transformers_4_keeps_every_layer_of_that_name(entry, tmp_path):
    """What was advised named one module, the one with the shortest path."""
    kept, folder = ["model.visual", "lm_head"], shutil.copytree(embedded_model_dir(), tmp_path / "in-4-bits")
    case = load_case(lora=None, skip=[*kept, f".*[.]{entry}"])
    case.save_pretrained(folder)

    def with_entries(*entries):
        content = json.loads((folder / "config.json").read_text())
        content["quantization_config"]["llm_int8_skip_modules"] = [*kept, *entries]
        (folder / "config.json").write_text(json.dumps(content))
        return folder

    message = refused(with_entries(entry))
    (advice,) = re.findall(rf"'{entry}' \(write ([^)]*)\)", message)
    model = load(with_entries(*re.findall(r"'([^']+)'", advice)))
    refuse_unfit(model)
    wide = [state.name for state in linear_states(anatomy(model)) if not state.is_quantized]
    language = [name for name in wide if anatomy(model).group_of(name) == "language"]
    assert language == [
        name for name, _ in anatomy(model).named_linears() if f".{entry}." in name and ".layers." in name
    ]
