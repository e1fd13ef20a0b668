"""What CUDA kernels do with memory that the operations' results do not show.

Three things: which attention kernel torch picks, how much scratch memory some kernels take while they run,
and the workspaces that the matrix libraries keep. Everything is read from public source code; nothing is
fitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import bitsandbytes  # noqa: F401  (registers its operators with torch)
import torch

from pytest_qvl.vram.units import KiB, MiB

aten = torch.ops.aten


@dataclass(frozen=True)
class Device:
    """What the kernels of a card depend on.

    Args:
        capability: CUDA compute capability, such as ``(7, 5)``.
    """

    capability: tuple[int, int]

    @property
    def workspaces(self) -> dict[str, int]:
        """Bytes that a handle of each matrix library keeps from the caching allocator for good.

        Source: ``aten/src/ATen/cuda/CublasHandlePool.cpp`` (``:4096:2:16:8``, on sm_90 eight times 4 MiB;
        cuBLASLt 1 MiB).
        """
        cublas = 8 * 4096 * KiB if self.capability == (9, 0) else 2 * 4096 * KiB + 8 * 16 * KiB
        return {"cublas": cublas, "cublaslt": 1 * MiB}

    @property
    def has_flash(self) -> bool:
        """Whether torch's flash (or cuDNN) attention runs: compute capability 8.0 and above."""
        return self.capability >= (8, 0)


# ``addmm`` takes its bias through cuBLASLt, whose handle is a cuBLAS handle with a workspace of its own.
WORKSPACES_OF: dict[Any, tuple[str, ...]] = {
    aten.mm.default: ("cublas",),
    aten.mm.out: ("cublas",),
    aten.bmm.default: ("cublas",),
    aten.baddbmm.default: ("cublas",),
    aten.addmm.default: ("cublas", "cublaslt"),
    torch.ops.bitsandbytes.gemm_4bit.default: ("cublas",),
}

# CUDA kernels that allocate their results in the opposite order; it decides which cached blocks they reuse.
LAST_RESULT_FIRST = {
    torch.ops.bitsandbytes.quantize_4bit.default,
    torch.ops.bitsandbytes.quantize_blockwise.default,
}

# Above this many rows bitsandbytes unpacks the weight instead of multiplying the packed one. The exact
# crossover is tuned per card and shape between 4 and 1,536 rows (``bitsandbytes/backends/cuda/ops.py``);
# prompts are longer, decoding is shorter, and assuming "unpacked" in between errs on the safe side by at most
# one weight matrix.
PACKED_MATMUL_ROWS = 4

_FLASH_TILE = 128
# Elements that a row of an additive mask is padded to a multiple of (``preprocess_mask`` in
# ``aten/src/ATen/native/transformers/attention.cpp``).
_MASK_ALIGNMENT = 16


def scratch(func: Any, args: Any) -> list[int]:
    """Bytes that the CUDA kernel of ``func`` allocates for itself while it runs, in order of allocation."""
    rule = _SCRATCH.get(func)
    return rule(*args) if rule is not None else []


def _gemm_4bit(x: torch.Tensor, _packed: Any, shape: Any, _absmax: Any, blocksize: int, *_: Any) -> list[int]:
    """``_dequant_linear_fallback`` of bitsandbytes: fp32 statistics twice, then the weight in 16 bit."""
    rows = x.numel() // x.shape[-1]
    if rows <= PACKED_MATMUL_ROWS and shape[1] % blocksize == 0:
        return []
    statistics = 4 * (prod(shape) // blocksize)
    return [statistics, statistics, prod(shape) * x.element_size()]


def _masked_scatter(target: torch.Tensor, *_: Any) -> list[int]:
    """An int64 prefix sum over the mask, and the mask written out, both of the target's shape."""
    return [target.numel() * 8, target.numel()]


def _masked_scatter_backward(grad: torch.Tensor, _mask: Any, sizes: Any) -> list[int]:
    """``masked_select``: the mask written out and the int64 coordinates of every selected element."""
    return [grad.numel(), prod(sizes) * grad.dim() * 8]


def _flash_backward(_grad_out: Any, q: torch.Tensor, k: torch.Tensor, *_: Any) -> list[int]:
    """``mha_bwd``: row sums and the gradient of q in fp32; per-head gradients of grouped k and v."""
    batch, heads, length, width = q.shape
    padded = -(-length // _FLASH_TILE) * _FLASH_TILE
    sizes = [4 * batch * heads * padded, 4 * batch * heads * padded * (-(-width // 32) * 32)]
    if k.shape[1] != heads:
        sizes += 2 * [batch * heads * k.shape[2] * width * k.element_size()]
    return sizes


def _efficient_backward(_grad_out: Any, q: torch.Tensor, *_: Any) -> list[int]:
    """Row sums in fp32, and for 16-bit inputs a fp32 accumulator of the gradient of q."""
    batch, heads, length, width = q.shape
    sizes = [4 * batch * heads * length]
    if q.element_size() < 4:
        sizes.append(4 * batch * heads * length * width)
    return sizes


_SCRATCH: dict[Any, Any] = {
    torch.ops.bitsandbytes.gemm_4bit.default: _gemm_4bit,
    aten.masked_scatter.default: _masked_scatter,
    aten.masked_scatter_.default: _masked_scatter,
    aten.masked_scatter_backward.default: _masked_scatter_backward,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
}


def attention(  # noqa: PLR0917  (torch's own signature)
    device: Device,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """``scaled_dot_product_attention`` with the kernel that torch picks on ``device``.

    Flash (or on Hopper cuDNN, which keeps the same tensors) for 16-bit inputs without a mask from compute
    capability 8.0; memory-efficient where heads are not grouped; else the math kernel with its full fp32
    score matrix. The last is what a T4 gets for grouped heads: torch up to 2.13 has no memory-efficient
    kernel for them (pytorch PR 191085).

    Source: ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``.
    """
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (t.to(dtype) if t.is_floating_point() else t for t in (query, key, value))
    half = query.element_size() == 2
    if device.has_flash and half and attn_mask is None:
        out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)
        return out[0]  # type: ignore[no-any-return]
    if not enable_gqa:
        keep_lse = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        bias = _additive(attn_mask, query)
        out = aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, keep_lse, dropout_p, is_causal, scale=scale
        )
        return out[0]  # type: ignore[no-any-return]
    out = aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return out[0]  # type: ignore[no-any-return]


def in_float32(args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of an operation that CUDA's autocast runs in fp32 and the CPU's does not: ``layer_norm``.

    The others of CUDA's list either do not occur in these models under autocast (``exp``, ``softmax``), or get fp32.

    Source: ``aten/src/ATen/autocast_mode.h``, ``AT_FORALL_FP32``.
    """

    def cast(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return [cast(value) for value in args], {name: cast(value) for name, value in kwargs.items()}


def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """``torch.nn.functional.dropout`` as on CUDA: one kernel that keeps a mask of one byte per element.

    Source: ``aten/src/ATen/native/Dropout.cpp``.
    """
    if not training or p == 0 or inplace:
        return torch.nn.functional.dropout(input, p, training, inplace)
    return aten.native_dropout(input, p, training)[0]  # type: ignore[no-any-return]


def _additive(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    if bias.shape[-1] % _MASK_ALIGNMENT:
        padding = _MASK_ALIGNMENT - bias.shape[-1] % _MASK_ALIGNMENT
        bias = torch.nn.functional.pad(bias, (0, padding))[..., : mask.shape[-1]]
    return bias.expand(query.shape[0], query.shape[1], query.shape[2], bias.shape[-1])
