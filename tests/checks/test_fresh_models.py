"""Models of these tests are copies of one that was loaded: in nothing different from it, and apart from each other."""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear4bit

from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.quantized import base_tensors


def tensors(model):
    return dict(base_tensors(anatomy(model)))


def test_a_copy_is_what_the_loader_gives(fresh_model, tiny_dir):
    copy = fresh_model(dtype="bfloat16")
    loaded = type(copy).from_pretrained(
        tiny_dir, quantization_config=copy.config.quantization_config, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    found, wanted = tensors(copy), tensors(loaded)
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        same = found[name]
        assert (type(same), same.dtype, same.is_contiguous()) == (type(tensor), tensor.dtype, tensor.is_contiguous())
        assert torch.equal(same, tensor), name
    marks = [{name: vars(one).keys() for name, one in model.named_parameters()} for model in (copy, loaded)]
    assert marks[0] == marks[1]
    assert copy.config.to_dict() == loaded.config.to_dict()


def test_two_share_nothing(fresh_model):
    one, other = (tensors(fresh_model()) for _ in range(2))
    assert not {tensor.data_ptr() for tensor in one.values()} & {tensor.data_ptr() for tensor in other.values()}
    for module in fresh_model().modules():
        if isinstance(module, Linear4bit):
            assert module.weight.module is module
            assert module.weight.quant_state is module.quant_state
