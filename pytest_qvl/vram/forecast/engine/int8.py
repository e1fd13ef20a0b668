"""Linears of an 8-bit base (LLM.int8(), bitsandbytes 0.50), without data.

bitsandbytes' layer is there as it is; only its product is written anew, since on the CPU, where tensors without data
say they are, bitsandbytes takes another. Columns of the input with a value above the layer's threshold would be
multiplied in 16 bits, which depends on values: none is taken to be one.

Source: ``bitsandbytes/autograd/_functions.py`` (``MatMul8bitLt``), ``bitsandbytes/backends/cuda/ops.py`` and
``bitsandbytes/backends/default/ops.py`` (``int8_vectorwise_quant``, ``int8_scaled_mm``, ``int8_mm_dequant``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import bitsandbytes as bnb
import torch
from torch import nn

if TYPE_CHECKING:
    from pytest_qvl.vram.forecast.engine.recorder import Recorder

# ``llm_int8_threshold`` of ``BitsAndBytesConfig``.
THRESHOLD = 6.0


class Packed(NamedTuple):
    """A weight of (rows, columns) in 8 bits.

    Attributes:
        weight: The layer's parameter.
        values: The int8 values in it.
        scales: Of each row, float32.
    """

    weight: nn.Parameter
    values: torch.Tensor
    scales: torch.Tensor


class Linear8bit(bnb.nn.Linear8bitLt):  # type: ignore[misc]
    """bitsandbytes' layer, made by :func:`layer_of`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product with the 8-bit weight."""
        out: torch.Tensor = _Product.apply(x, self.state.CB, self.state.SCB, self.bias)  # type: ignore[no-untyped-call]
        return out


def pack(parameter: torch.Tensor, recorder: Recorder) -> tuple[torch.Tensor, Packed]:
    """A weight as it arrived in 16 bits, and its values and scales in 8 (``Int8Params._quantize``)."""
    whole = recorder.dataless(tuple(parameter.shape), parameter.dtype)
    return whole, packed(whole)


def packed(whole: torch.Tensor) -> Packed:
    """A weight in 16 bits in 8."""
    values, scales, _ = _quantized(whole.to(torch.float16), threshold=0.0)
    return Packed(nn.Parameter(values, requires_grad=False), values, scales)


def layer_of(linear: Any, packed: Packed) -> Linear8bit:
    """The layer in place of a 16-bit one, with what :func:`pack` made of its weight."""
    rows, columns = packed.values.shape
    layer = Linear8bit(columns, rows, bias=False, has_fp16_weights=False, threshold=THRESHOLD, device="meta")
    layer.weight, layer.bias = packed.weight, linear.bias
    layer.state.CB, layer.state.SCB = packed.values, packed.scales
    return layer


def _quantized(x: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Rows in 8 bits, their scales, and the mask of outliers that is looked for where there is a threshold."""
    scales = x.new_empty(x.shape[0], dtype=torch.float32)
    values = x.new_empty(x.shape, dtype=torch.int8)
    outliers = None
    if threshold > 0:
        outliers = x.abs().new_empty(x.shape, dtype=torch.bool)
    return values, scales, outliers


class _Product(torch.autograd.Function):
    """``MatMul8bitLt``, which keeps its input where no checkpoint finds it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: Any) -> torch.Tensor:  # noqa: ARG004
        """In int32, then in float16, then in the dtype of the input."""
        rows = x.reshape(-1, x.shape[-1])
        values, own_scales, outliers = _quantized(rows.to(torch.float16), THRESHOLD)
        del outliers
        sums = rows.new_empty((rows.shape[0], weight.shape[0]), dtype=torch.int32)
        half = rows.new_empty(sums.shape, dtype=torch.float16)
        out = half.to(x.dtype)
        del sums, half
        ctx.weight = weight
        ctx.kept = rows if any(ctx.needs_input_grad[:2]) else None
        ctx.shape, ctx.dtype = x.shape, x.dtype
        del values, own_scales
        return out.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """The weight unpacked, and its product with the gradient."""
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        rows = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        unpacked = ctx.weight.to(ctx.dtype, copy=True)
        return torch.matmul(rows.to(ctx.dtype), unpacked).view(ctx.shape), None, None, None
