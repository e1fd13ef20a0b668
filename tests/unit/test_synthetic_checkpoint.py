"""Synthetic weights on disk: read back by ``from_pretrained``, they are the tensors of the synthetic build."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

from pytest_qvl.cli import main
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.backends import LoadRequest, backend
from pytest_qvl.models.fingerprint.digests import digests
from pytest_qvl.models.quantized import base_tensors, linear_states
from pytest_qvl.models.sources import released
from pytest_qvl.models.sources.model_source import parse_model
from pytest_qvl.models.sources.processors import load_processor
from pytest_qvl.models.sources.released import released_config
from pytest_qvl.models.sources.synthetic import build_synthetic
from pytest_qvl.models.sources.synthetic_checkpoint import write_checkpoint
from pytest_qvl.samples import make_batch, scenes

SEED = 3


def small(name: str) -> Any:
    """Fewer and narrower layers; vocabulary, special ids and patches as released."""
    config = released_config(name)
    text, vision = config.get_text_config(), config.vision_config
    text.num_hidden_layers, text.hidden_size, text.intermediate_size = 2, 128, 256
    text.num_attention_heads, text.num_key_value_heads = 1, 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:2]
    vision.depth, vision.fullatt_block_indexes, vision.out_hidden_size = 2, [1], 128
    vision.hidden_size, vision.num_heads, vision.intermediate_size = 160, 2, 320
    return config


tied = pytest.mark.parametrize("written", ["qwen2.5-vl-3b"], indirect=True, ids=["tied"])
both = pytest.mark.parametrize("written", ["qwen2.5-vl-3b", "qwen2.5-vl-7b"], indirect=True, ids=["tied", "untied"])


@pytest.fixture(scope="module")
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name and folder of what the command wrote."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(released, "released_config", small)
        patch.setitem(write_checkpoint.__kwdefaults__, "shard_bytes", 2**20)
        assert main(["synthesize", request.param, str(folder), "--seed", str(SEED), "--device", "cpu"]) == 0
    yield request.param, folder
    shutil.rmtree(folder)


def load(folder: Path, quantization: Any = None) -> Any:
    return backend("transformers").load(LoadRequest(parse_model(str(folder)), quantization, "cpu", "bfloat16"))


@both
def test_what_is_loaded_is_bitwise_the_synthetic_build(written: tuple[str, Path]) -> None:
    name, folder = written
    built = build_synthetic(small(name), None, "cpu", torch.bfloat16, SEED)
    assert digests(base_tensors(anatomy(load(folder)))) == digests(base_tensors(anatomy(built)))


@tied
def test_it_loads_in_four_bits_and_takes_pictures(written: tuple[str, Path]) -> None:
    _, folder = written
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["model.visual", "lm_head"]
    )
    model = load(folder, quantization)
    assert sum(state.is_4bit for state in linear_states(anatomy(model))) == 14
    with torch.no_grad():
        logits = model(**make_batch(load_processor(folder), scenes(0, 1)[:2])).logits
    assert torch.isfinite(logits).all()


@tied
def test_it_is_cut_into_shards_as_the_index_says(written: tuple[str, Path]) -> None:
    _, folder = written
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert sum(file.stat().st_size for file in files) >= index["metadata"]["total_size"]
    assert not list(folder.parent.glob(".*")), "nothing is left beside it"


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["synthesize", *arguments]) == 2
    return capsys.readouterr().err


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    assert f"{tmp_path} exists and is not an empty folder" in said(capsys, "qwen2.5-vl-7b", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_unknown_names_are_refused_with_the_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'qwen9'; known: qwen2-vl-2b" in said(capsys, "qwen9", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_disk_too_small_is_told_before_anything_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 3 * 2**30))
    told = said(capsys, "qwen2.5-vl-7b", str(tmp_path / "new"))
    assert "needs 15.5 GiB, 3.0 GiB are free" in told
    assert not list(tmp_path.iterdir())


def test_what_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(small("qwen2.5-vl-3b"), tmp_path / "new", lambda _: None, device="cpu", dtype="bfloat16")
    assert not list(tmp_path.iterdir())
