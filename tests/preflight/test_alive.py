"""Question 4 and what it reads: every value of the adapter, a sample of the base's, within limits."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from preflight_corpus import Workshop
from preflight_corpus.making import ADAPTER, CONFIG, edit, retensor

from pytest_qvl.models.sources.model_source import ModelSourceError
from pytest_qvl.preflight import preflight
from pytest_qvl.preflight.files import values
from pytest_qvl.preflight.files.folder import Folder, UnsafeFileError
from pytest_qvl.preflight.files.headers import read_header
from pytest_qvl.preflight.questions.alive import vitals
from pytest_qvl.preflight.run import _read
from pytest_qvl.preflight.subject import Asked
from pytest_qvl.preflight.updates import Factors

FAMILY = "qwen2_5_vl"


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("alive"))


def saved(path, **tensors):
    from safetensors.torch import save_file

    save_file(tensors, path / "a.safetensors")
    return read_header(Folder(path), "a.safetensors")


def subject_of(base, adapter):
    return _read(Asked(str(base), adapter))[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_values_are_read_as_they_are_stored(tmp_path, dtype):
    value = torch.randn(7, 5, dtype=dtype)
    tensor = saved(tmp_path, other=torch.ones(3), w=value)["w"]
    assert torch.equal(values.read_whole(tensor), value)
    assert torch.equal(values.read_runs(tensor, [(3, 9)])[0], value.flatten()[3:9])
    found = [(start, part.clone()) for start, part in values.pieces(tensor, 10 * dtype.itemsize)]  # one buffer
    assert [start for start, _ in found] == [0, 2, 4, 6]
    assert torch.equal(torch.cat([part for _, part in found]), value)


def test_what_is_too_large_or_cut_off_meanwhile_is_not_read(tmp_path, monkeypatch):
    tensor = saved(tmp_path, w=torch.ones(64, 64))["w"]
    monkeypatch.setattr(values, "WHOLE_LIMIT", 2**13)
    with pytest.raises(UnsafeFileError, match="no matrix of an adapter has"):
        values.read_whole(tensor)
    monkeypatch.undo()
    tensor.file.write_bytes(tensor.file.read_bytes()[:-8])
    with pytest.raises(ModelSourceError, match="become shorter"):
        values.read_whole(tensor)
    with pytest.raises(ModelSourceError, match="not read here"):
        values.dtype_of(replace(tensor, dtype="F6_E2M3"))


def test_vitals_of_every_kind(tmp_path):
    tensors = {
        "bad": torch.tensor([1.0, math.nan, math.inf]),
        "zero": torch.zeros(4),
        "same": torch.full((2, 2), 0.5),
        "faint": torch.tensor([1e-6, 0.0]).half(),
        "sound": torch.tensor([1e-6, 1e-3]).half(),
        "empty": torch.zeros(0, 4),
    }
    found = {name: vitals(tensor) for name, tensor in saved(tmp_path, **tensors).items()}
    assert {name: each.bad for name, each in found.items() if each.bad} == {"bad": 2}
    assert [name for name, each in found.items() if each.is_zero] == ["empty", "zero"]
    assert [name for name, each in found.items() if each.is_constant] == ["same"]
    assert [name for name, each in found.items() if each.is_subnormal] == ["faint"]


def test_numbers_of_a_product_are_those_of_the_product():
    torch.manual_seed(0)
    factors = Factors(torch.randn(40, 4), torch.randn(4, 30), 0.25)
    product = 0.25 * (factors.left @ factors.right).double()
    assert factors.squared_norm == pytest.approx(float(product.square().sum()), rel=1e-6)
    assert torch.allclose(factors.singular_values(), torch.linalg.svdvals(product)[:4], rtol=1e-5)


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {r"layers\.1\..*k_proj": 64}},
        {"use_dora": True},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"target_modules": r".*(patch_embed\.proj|visual.*qkv)"},
    ],
    ids=["lora", "patterns", "dora", "embeddings", "convolution"],
)
def test_updates_are_what_peft_merges(shop, lora):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base, adapter = shop.base(FAMILY), shop.adapter(FAMILY, **lora)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    updates = subject_of(base, adapter).updates
    assert updates.pairs
    assert not updates.beyond
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed == {f"{module}.weight" for module in updates.pairs}
    for module, update in updates.pairs.items():
        weight = before[f"{module}.weight"].flatten(1)
        added = update.factors().rows(weight[3:9], 3)
        assert torch.allclose(added, merged[f"{module}.weight"].flatten(1)[3:9] - weight[3:9], atol=2e-6)


def test_weights_in_four_bits_are_those_of_bitsandbytes(shop):
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForImageTextToText

    for double in (True, False):
        folder = shop.packed(FAMILY, bnb_4bit_use_double_quant=double)
        model = AutoModelForImageTextToText.from_pretrained(folder)
        weights = subject_of(folder, None).weights
        packed = [name for name in weights.names() if weights.is_packed(name)]
        assert len(packed) == 21
        for name in packed[::5]:
            parameter = model.get_parameter(name)
            real = dequantize_4bit(parameter.data, parameter.quant_state).float()
            assert weights.shape(name) == tuple(real.shape)
            first, second = weights.rows(name, [(0, 3), (5, real.shape[0])])
            # The scales of double quantization are rounded once more or less than here.
            assert torch.allclose(torch.cat((first, second)), torch.cat((real[:3], real[5:])), rtol=2**-8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state | {"shape": [2**30, 2**30]}, "does not fit its data"),
        (lambda state: state | {"blocksize": 0}, "does not fit its data"),
        (lambda state: state | {"quant_type": "\x1b[31mfp4"}, "says"),
        (lambda state: state | {"nested_blocksize": 7}, "does not fit its data"),
        (lambda state: {}, "not readable"),
        (lambda state: {"x": "y" * 5000}, "not what bitsandbytes writes"),
    ],
    ids=["shape", "block", "kind", "nested", "empty", "large"],
)
def test_states_that_cannot_be_are_refused(shop, change, words):
    folder = shop.copy(shop.packed(FAMILY, bnb_4bit_use_double_quant=True))
    mark = ".quant_state.bitsandbytes__"

    def broken(name, tensor):
        if mark not in name:
            return {name: tensor}
        return {
            name: torch.tensor(list(json.dumps(change(json.loads(bytes(tensor.tolist())))).encode()), dtype=torch.uint8)
        }

    retensor(folder / "model.safetensors", broken)
    weights = subject_of(folder, None).weights
    name = next(name for name in weights.names() if weights.is_packed(name))
    with pytest.raises(ModelSourceError, match=words) as caught:
        weights.rows(name, [(0, 2)])
    assert "\x1b" not in str(caught.value)


def test_matrices_that_belong_to_nothing_are_counted(shop):
    adapter = shop.adapter(FAMILY)
    retensor(adapter / ADAPTER, lambda name, tensor: {name: tensor[:1] if "0.mlp.up_proj.lora_A" in name else tensor})
    found = {finding.name: finding for finding in preflight(shop.base(FAMILY), adapter).of(4)}
    assert "cannot be multiplied" in found["not-looked-at"].line


def test_without_the_bases_weights_the_adapter_itself_is_judged():
    shop_less = {"r": 4, "target_modules": ["q_proj"]}
    found = preflight("qwen2.5-vl-7b", lora=shop_less).of(4)
    assert [finding.state for finding in found] == ["not judged"]


def test_a_huge_scaling_is_named_as_such(shop):
    adapter = shop.adapter(FAMILY)
    edit(adapter / CONFIG, lora_alpha=1e9)
    names = {finding.name: finding for finding in preflight(shop.base(FAMILY), adapter).of(4)}
    assert names["overflow"].state == names["exploded"].state == "red"
    assert "1.25e+08" in names["exploded"].cause
