"""Forecasts of Qwen3.5 by what computes its linear attention: PyTorch code, or kernels that need not be installed."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from pytest_qvl.cli import main
from pytest_qvl.models.families import FAMILIES
from pytest_qvl.models.mixer_kernels import FUNCTIONS
from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.vram.forecast import forecast, phases
from pytest_qvl.vram.forecast.engine import linear_attention

if not FAMILIES["qwen3_5"].installed:
    pytest.skip("this Transformers has no Qwen3.5", allow_module_level=True)

import transformers.models.qwen3_5.modeling_qwen3_5 as qwen3_5

if not all(hasattr(getattr(qwen3_5, name, None), "__wrapped__") for name in FUNCTIONS.values()):
    pytest.skip("this Transformers does not wrap the kernels of linear attention", allow_module_level=True)

MODEL = str(embedded_model_dir("qwen3.5"))
USUAL: dict[str, Any] = {"image": (112, 112), "tokens": 200, "lora_r": 4, "gradient_checkpointing": False}


@pytest.mark.parametrize(("heads", "of_values"), [(2, 4), (4, 4)])
def test_what_flas_function_keeps_for_backward(heads: int, of_values: int) -> None:
    """Normed queries and keys with their norms, values, gates, steps, and the inverse of each chunk's system."""
    batch, length, width = 2, 130, 32
    query, key = (
        torch.randn(batch, length, heads, width, dtype=torch.bfloat16).repeat_interleave(of_values // heads, 2)
        for _ in range(2)
    )
    value = torch.randn(batch, length, of_values, width, dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(batch, length, of_values)
    beta = g.bfloat16()
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out, state = linear_attention._chunk_gated_delta_rule(128, query, key, value, g, beta)
    per_head = 3 * 2 * width + 2 * 4 + 4 + 2 + 2 * linear_attention.CHUNK
    assert sum(kept.values()) == batch * length * of_values * per_head
    assert (out.dtype, out.shape, state) == (value.dtype, value.shape, None)
    out.sum().backward()
    assert value.grad is not None


def test_causal_conv1d_keeps_what_it_was_given_and_no_more() -> None:
    given = torch.randn(2, 30, 8, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
    weight = torch.randn(8, 4, dtype=torch.bfloat16)
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = linear_attention._causal_conv1d(given, weight)
    assert kept == [given.data_ptr(), weight.data_ptr()]
    assert out.stride() == given.stride()
    out.sum().backward()
    assert given.grad is not None


def test_kernels_keep_less_than_pytorch_code() -> None:
    found = {
        asked: forecast(MODEL, linear_attention=asked, **USUAL).phase(phases.LOSS).start_allocated
        for asked in ("torch", "fla", "fla+causal-conv1d")
    }
    assert found["torch"] > found["fla"] > found["fla+causal-conv1d"]


def test_installed_kernels_are_not_called_and_are_there_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel_in_place_of(own: Any) -> Any:
        @functools.wraps(own)
        def calls_triton(*_: Any, **__: Any) -> None:
            raise RuntimeError("a Triton kernel on a tensor without data")

        return calls_triton

    usual = forecast(MODEL, **USUAL)
    for name in FUNCTIONS.values():
        monkeypatch.setattr(qwen3_5, name, kernel_in_place_of(getattr(qwen3_5, name).__wrapped__))
    before = {name: getattr(qwen3_5, name) for name in FUNCTIONS.values()}
    assert forecast(MODEL, **USUAL).phases == usual.phases
    assert forecast(MODEL, linear_attention="fla+causal-conv1d", **USUAL).phases != usual.phases
    assert {name: getattr(qwen3_5, name) for name in FUNCTIONS.values()} == before


def test_kernels_are_refused_where_it_is_not_known_how_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    name = FUNCTIONS["prompts"]
    monkeypatch.setattr(qwen3_5, name, getattr(qwen3_5, name).__wrapped__)
    forecast(MODEL, **USUAL)
    with pytest.raises(
        ValueError, match=r"linear_attention is 'fla': how Transformers .* calls these kernels is not foll"
    ):
        forecast(MODEL, linear_attention="fla", **USUAL)


def test_unknown_code_is_refused_with_the_known() -> None:
    with pytest.raises(ValueError, match=r"linear_attention is 'triton': known are torch, fla, fla\+causal-conv1d"):
        forecast(MODEL, linear_attention="triton")


def test_the_command_says_which_code_is_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["forecast", "--image", "112x112", "--model", MODEL]
    assert main(options) == 0
    said = capsys.readouterr().out
    assert "\nlinear attention by Transformers' PyTorch code\n" in said
    assert "paged_adamw_8bit --linear-attention torch\n" in said
    assert main([*options, "--linear-attention", "fla+causal-conv1d"]) == 0
    said = capsys.readouterr().out
    assert "\nlinear attention by the kernels of fla and causal-conv1d\n" in said
    assert "--linear-attention" not in said
    assert main(["forecast", "--image", "112x112", "--model", str(embedded_model_dir())]) == 0
    assert "linear" not in capsys.readouterr().out.replace("language linears", "")
