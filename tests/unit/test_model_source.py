"""A model's name becomes a checked source, or one sentence that says what is wrong and how to mend it."""

from __future__ import annotations

import json
import shutil
import struct

import pytest

from pytest_qvl.models.sources import embedded
from pytest_qvl.models.sources.digests import known_digest
from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.models.sources.model_source import (
    ModelSource,
    ModelSourceError,
    check_adapter,
    check_safetensors,
    parameter_count,
    parse_model,
)


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the embedded checkpoint that a test may damage."""
    return shutil.copytree(embedded_model_dir(), tmp_path / "out" / "merged")


def safetensors(header, data=b""):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def test_the_embedded_model():
    source = parse_model(" embedded ")
    assert source == ModelSource("embedded", str(embedded_model_dir()))
    assert (str(source), source.label, source.pretrained) == ("embedded", "embedded", str(embedded_model_dir()))
    assert source.has_knowledge


def test_the_first_embedded_model_by_its_name():
    assert parse_model("embedded:qwen2.5-vl") == parse_model("embedded")


def test_another_embedded_model(tmp_path, monkeypatch):
    shutil.copytree(embedded_model_dir(), tmp_path / "fixtures" / "embedded-qwen9-vl")
    monkeypatch.setattr(embedded, "_PACKAGE", tmp_path / "pytest_qvl")
    monkeypatch.setattr(embedded, "EMBEDDED_SHA256", {"qwen9-vl": "0" * 64})
    source = parse_model("embedded:qwen9-vl")
    assert source == ModelSource("embedded", str(tmp_path / "fixtures" / "embedded-qwen9-vl"))
    assert (str(source), source.label) == ("embedded:qwen9-vl", "embedded-qwen9-vl")
    assert parse_model(str(source)) == source
    assert known_digest(tmp_path / "fixtures" / "embedded-qwen9-vl" / "model.safetensors") == "0" * 64


def test_an_embedded_model_that_does_not_exist():
    with pytest.raises(ModelSourceError, match=r"no embedded model is called 'qwen9-vl'; known: qwen2\.5-vl"):
        parse_model("embedded:qwen9-vl")


@pytest.mark.parametrize("text", ["out/merged", "./out/merged", "local:out/merged"])
def test_a_folder(checkpoint, tmp_path, monkeypatch, text):
    assert parse_model(text, tmp_path) == ModelSource("local", str(checkpoint))
    monkeypatch.chdir(tmp_path)
    source = parse_model(text)
    assert str(source) == f"local:{checkpoint}"
    assert source.label == "merged"
    assert parse_model(str(source)) == source


@pytest.mark.parametrize("text", ["Qwen/Qwen2.5-VL-7B-Instruct", "hub:Qwen/Qwen2.5-VL-7B-Instruct"])
def test_a_hub_id(tmp_path, text):
    source = parse_model(text, tmp_path)
    assert source == ModelSource("hub", "Qwen/Qwen2.5-VL-7B-Instruct")
    assert (source.label, source.pretrained) == ("Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct")


def test_synthetic_weights_know_nothing_and_have_no_folder():
    source = parse_model("synthetic:qwen2.5-vl-7b")
    assert (str(source), source.label, source.has_knowledge) == ("synthetic:qwen2.5-vl-7b", "qwen2.5-vl-7b", False)
    with pytest.raises(ModelSourceError, match="built on the device and have no folder"):
        _ = source.pretrained


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "model '' is unknown; give 'embedded', a folder"),
        ("qwen", "model 'qwen' is unknown; give 'embedded', a folder"),
        ("local:qwen", "the folder '.*qwen' does not exist; give"),
        ("./qwen", "the folder '.*qwen' does not exist; give"),
        ("/no/such/folder", "the folder '/no/such/folder' does not exist; give"),
        ("out/mergd", "the folder '.*out/mergd' does not exist; for a hub id of that name write 'hub:out/mergd'; give"),
        ("hub:qwen", "a hub id has the form owner/name; give"),
        ("synthetic:qwen", "no released configuration 'qwen'; known: .*qwen2.5-vl-7b"),
    ],
)
def test_a_name_that_cannot_be(checkpoint, tmp_path, text, says):
    with pytest.raises(ModelSourceError, match=says):
        parse_model(text, tmp_path)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3758096\n"


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", None, "has no config.json; give the folder that save_pretrained wrote"),
        ("config.json", b"{", r"config.json is not readable JSON \(.*\); give the folder"),
        ("config.json", b"\xff", "config.json is not readable JSON"),
        ("config.json", b"[]", "config.json is not a JSON object"),
        ("config.json", b'{"model_type": "qwen2_5_vl"}', "has no vision_config, so it describes no vision tower"),
        (
            "config.json",
            b'{"model_type": "qwen2_vl", "vision_config": {}, "quantization_config": {"load_in_8bit": true}}',
            r"is saved in 8 bits \(load_in_8bit\); this package tests 4-bit",
        ),
        (
            "config.json",
            b'{"model_type": "qwen2_vl", "vision_config": {}, "quantization_config": {"quant_method": "gptq"}}',
            "is saved in 'gptq'; this package tests 4-bit",
        ),
        ("config.json", b'{"model_type": "llama"}', "says model_type 'llama'; this package tests qwen2_vl, qwen2_5_vl"),
        ("preprocessor_config.json", None, r"has no processor \(preprocessor_config.json\); save it beside the model"),
        ("model.safetensors", None, r"has no \*.safetensors; other formats are not read because they can run code"),
        ("model.safetensors", b"", "is corrupt: 0 bytes cannot hold its header"),
        (
            "model.safetensors",
            LFS,
            r"model.safetensors' is a Git LFS pointer of \d+ bytes .*run `git lfs install` and `g",
        ),
        ("tokenizer.json", LFS, "tokenizer.json' is a Git LFS pointer"),
        ("config.json", LFS, "config.json' is a Git LFS pointer"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"}}',
            r"2 of 3 files named in model.safetensors.index.json are missing \(first: model-2.safetensors\)",
        ),
    ],
)
def test_a_folder_that_cannot_be(checkpoint, file, content, says):
    if content is None:
        (checkpoint / file).unlink()
    else:
        (checkpoint / file).write_bytes(content)
    with pytest.raises(ModelSourceError, match=says) as caught:
        parse_model(str(checkpoint))
    assert str(checkpoint) in str(caught.value)


def test_shards_without_their_index(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    with pytest.raises(
        ModelSourceError, match=r"has neither model.safetensors nor model.safetensors.index.json, .*00001"
    ):
        parse_model(str(checkpoint))


@pytest.mark.parametrize("value", [5, None, ["embedded"]])
def test_what_is_no_name(value):
    with pytest.raises(ModelSourceError, match=r"is of type \w+, not a name or folder; give 'embedded'"):
        parse_model(value)


def test_a_path_is_a_folder(checkpoint):
    assert parse_model(checkpoint) == ModelSource("local", str(checkpoint))


def test_a_folder_without_a_tokenizer(checkpoint):
    for name in ("tokenizer.json", "vocab.json"):
        (checkpoint / name).unlink(missing_ok=True)
    with pytest.raises(ModelSourceError, match=r"has no tokenizer \(tokenizer.json\)"):
        parse_model(str(checkpoint))


@pytest.mark.parametrize("cut", [1, 1000, -1])
def test_weights_that_are_a_byte_short_or_long_are_corrupt(checkpoint, cut):
    file = checkpoint / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-cut] if cut > 0 else content + b"\0")
    with pytest.raises(ModelSourceError, match=r"is corrupt: [\d,]+ bytes on disk, [\d,]+ by its header"):
        check_safetensors(file)


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        [],
        {"a": 1},
        {"a": {"shape": [1]}},
        {"a": {**ENTRY, "data_offsets": [0]}},
        {"a": {**ENTRY, "data_offsets": [0, "x"]}},
        {"a": {**ENTRY, "shape": None}},
    ],
    ids=str,
)
def test_a_header_that_says_nothing_is_corrupt(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors(header, bytes(24)))
    with pytest.raises(ModelSourceError, match="its header is not readable; download or save it again"):
        check_safetensors(file)


def test_a_healthy_header_and_its_values_are_read(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors({"__metadata__": {"format": "pt"}, "a": ENTRY}, bytes(24)))
    check_safetensors(file)
    assert parameter_count(tmp_path) == 6


def test_the_embedded_weights_are_counted_as_they_are():
    from safetensors import safe_open

    with safe_open(embedded_model_dir() / "model.safetensors", "numpy") as weights:
        sizes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118 - not a dictionary
    total = 0
    for size in sizes:
        count = 1
        for side in size:
            count *= side
        total += count
    assert parameter_count(embedded_model_dir()) == total


@pytest.mark.parametrize(
    ("config", "weights", "says"),
    [
        (None, safetensors({}), "has no adapter_config.json; give the folder that PeftModel.save_pretrained wrote"),
        (b"{}", safetensors({}), "says peft_type None; this package tests 'LORA'"),
        (b'{"peft_type": "LORA"}', None, "has no adapter_model.safetensors; other formats are not read"),
        (b'{"peft_type": "LORA"}', b"pickle", "is corrupt: 6 bytes cannot hold its header"),
    ],
)
def test_an_adapter_folder_that_cannot_be(tmp_path, config, weights, says):
    for name, content in (("adapter_config.json", config), ("adapter_model.safetensors", weights)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelSourceError, match=says):
        check_adapter(tmp_path)


def test_a_missing_adapter_folder(tmp_path):
    with pytest.raises(ModelSourceError, match="the adapter folder '.*/gone' does not exist; give the folder"):
        check_adapter(tmp_path / "gone")


def test_a_folder_above_adapters_says_which_one_to_give(tmp_path):
    for name in ("checkpoint-40", "checkpoint-200", "vlm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ModelSourceError, match=r"has no adapter_config.json; give '.*/checkpoint-200', the newest of 3"
    ):
        check_adapter(tmp_path)
    for name in ("checkpoint-40", "checkpoint-200"):
        (tmp_path / name / "adapter_config.json").unlink()
    with pytest.raises(ModelSourceError, match=r"give '.*/vlm', one level down"):
        check_adapter(tmp_path)
