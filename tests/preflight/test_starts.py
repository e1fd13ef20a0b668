"""What PEFT's PiSSA and OLoRA take out of a base weight, held to PEFT's own layers."""

from __future__ import annotations

import pytest
import torch

from pytest_qvl.preflight.files.folder import Folder
from pytest_qvl.preflight.files.headers import read_header
from pytest_qvl.preflight.rounding import half_step
from pytest_qvl.preflight.starts import SMALL, Start, start_of, taking
from pytest_qvl.preflight.weights import Weights

ALPHA, RANK = 12, 8


def weights_of(folder, **tensors):
    from safetensors.torch import save_file

    save_file(tensors, folder / "w.safetensors")
    return Weights(read_header(Folder(folder), "w.safetensors"))


@pytest.mark.parametrize("kind", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96, 64), (64, 200)])
def test_what_is_taken_out_is_what_peft_takes_out(tmp_path, kind, dtype, shape):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], bias=False, dtype=dtype))
    before = model[0].weight.detach().clone()
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights=kind)
    after = get_peft_model(model, config).get_base_model()[0].get_base_layer().weight.detach()
    start = start_of(kind, (weights_of(tmp_path, w=before), "w"), torch.nn.Linear(*shape[::-1]), RANK, ALPHA / RANK)
    assert isinstance(start, Start)
    taken = start.taken
    rest = before.double() - taken.left.double() @ taken.right.double()
    off = (after.double() - rest).abs()
    assert (off <= half_step(rest.to(dtype)).double() * 1.01 + taken.error).all()
    assert taken.error < 1e-2 * float(before.float().abs().max())
    assert float((taken.left @ taken.right).norm()) > 0.1 * float(before.float().norm())


def test_other_starts_leave_the_base_alone():
    for init in (True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_ga", 3):
        assert taking(init) is None
    for init in ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq"):
        assert taking(init)


def test_what_cannot_be_worked_out_says_why(tmp_path):
    linear = torch.nn.Linear(64, 64)
    weights = weights_of(tmp_path, w=torch.randn(64, 64), i=torch.ones(64, 64, dtype=torch.int8))
    reasons = {
        "at random": ("pissa_niter_4", (weights, "w"), linear, 8, 1.0),
        "preprocess_corda": ("corda", (weights, "w"), linear, 8, 1.0),
        "PEFT quantizes": ("loftq", (weights, "w"), linear, 8, 1.0),
        "base weights are not here": ("pissa", (weights, ""), linear, 8, 1.0),
        "is quantized": ("olora", (weights, "i"), linear, 8, 1.0),
        "linear layers": ("pissa", (weights, "w"), torch.nn.Embedding(64, 64), 8, 1.0),
        "above zero": ("pissa", (weights, "w"), linear, 65, 1.0),
    }
    for words, asked in reasons.items():
        assert words in start_of(*asked)
    side = int(SMALL**0.5) + 1
    large = weights_of(tmp_path, w=torch.zeros(side, side))
    assert "take hours" in start_of("pissa", (large, "w"), torch.nn.Linear(side, side), 8, 1.0)
    assert not start_of("olora", (large, "w"), torch.nn.Linear(side, side), 8, 1.0).is_small


def test_equal_singular_values_leave_what_pissa_takes_out_open(tmp_path):
    start = Start("pissa", weights_of(tmp_path, w=torch.eye(16)), "w", 8, 1.0)
    assert start.taken.error > 1e3
