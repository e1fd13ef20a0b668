"""What bitsandbytes really did to each layer, read from module types and quant states, never from a config."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.anatomy import Group, Parts

if TYPE_CHECKING:
    import torch
    from torch import nn


# Transformers 5 matches from the start of a module's name, so that "visual" would keep nothing.
KEEP_16BIT = ("model.visual", "lm_head")


def usual_quantization(compute_dtype: torch.dtype, **overrides: Any) -> Any:
    """A ``BitsAndBytesConfig``: NF4, nested statistics; vision tower, merger and head in 16 bits.

    Args:
        compute_dtype: Dtype of the 4-bit matrix products.
        overrides: Other fields, or other values.
    """
    from transformers import BitsAndBytesConfig

    settings = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": compute_dtype,
        "llm_int8_skip_modules": list(KEEP_16BIT),
    }
    return BitsAndBytesConfig(**{**settings, **overrides})


@dataclass(frozen=True)
class LinearState:
    """How one linear layer is stored.

    Attributes:
        name: Dotted name in the base model.
        group: The part of the model it belongs to.
        storage: ``"nf4"``, ``"fp4"``, ``"int8"`` or the dtype of a layer that is not quantized (``"bfloat16"``).
        in_features: Input width.
        out_features: Output width.
        compute_dtype: Dtype of the matrix product (4-bit layers only), such as ``"bfloat16"``.
        blocksize: Weights per absmax (4-bit layers only).
        nested: Whether the absmax values are quantized too ("double quantization").
        nested_blocksize: absmax values per nested block.
        repacked: Whether the CPU kernel has rewritten the weight in place, which loses the nested statistics.
    """

    name: str
    group: Group
    storage: str
    in_features: int
    out_features: int
    compute_dtype: str | None = None
    blocksize: int | None = None
    nested: bool | None = None
    nested_blocksize: int | None = None
    repacked: bool = False

    @property
    def is_4bit(self) -> bool:
        """Whether the layer is stored in four bits."""
        return self.storage in ("nf4", "fp4")

    @property
    def is_quantized(self) -> bool:
        """Whether the layer is stored in fewer than 16 bits."""
        return self.is_4bit or self.storage == "int8"


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """``torch.bfloat16`` as ``"bfloat16"``."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def linear_states(parts: Parts) -> list[LinearState]:
    """How every linear layer of the model is stored, adapters left out."""
    return [_state(name, parts.group_of(name), module) for name, module in parts.named_linears()]


def _state(name: str, group: Group, module: Any) -> LinearState:
    import bitsandbytes as bnb

    common = {
        "name": name,
        "group": group,
        "in_features": module.in_features,
        "out_features": module.out_features,
    }
    if isinstance(module, bnb.nn.Linear4bit):
        quant = module.weight.quant_state
        if quant is None:  # declared 4-bit, but the weight was never moved through the quantizer
            return LinearState(**common, storage=dtype_name(module.weight.dtype) or "unknown")
        repacked = bool(getattr(quant, "packing_format_for_cpu", False))
        return LinearState(
            **common,
            storage=quant.quant_type,
            compute_dtype=dtype_name(module.compute_dtype),
            blocksize=quant.blocksize,
            nested=quant.nested,
            nested_blocksize=quant.state2.blocksize if quant.nested else None,
            repacked=repacked,
        )
    if isinstance(module, bnb.nn.Linear8bitLt):
        return LinearState(**common, storage="int8")
    return LinearState(**common, storage=dtype_name(module.weight.dtype) or "unknown")


def keep_quantized_weights_in_place(model: nn.Module) -> None:
    """Forbid bitsandbytes to rewrite quantized weights for CPU kernels.

    On CPUs with AVX512-BF16, an eval-mode forward of ``Linear4bit`` repacks the weight in place and casts the
    statistics (``bitsandbytes/nn/modules.py``, ``_convert_weight_packed_for_cpu``): logits then depend on whether an
    eval forward came first, double quantization reads as off, and training fails. Call this right after loading,
    before any forward. Without effect on CUDA.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def base_tensors(parts: Parts) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the base model that training must leave alone, by dotted name in the base model.

    Parameters, buffers, and the quant state of each 4-bit weight: packed data, absmax, code book, offset and the
    nested statistics. Base layers under adapters are included under the name they have without the adapter;
    adapter tensors are not.
    """
    for name, module in parts.base.named_modules():
        if any(part.startswith("lora_") for part in name.split(".")):
            continue
        clean = name.replace(".base_layer", "")
        prefix = f"{clean}." if clean else ""
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if key.startswith("lora_"):
                continue
            yield f"{prefix}{key}", tensor
            quant = getattr(tensor, "quant_state", None)
            if quant is not None:
                yield from _quant_state_tensors(f"{prefix}{key}", quant)


def _quant_state_tensors(prefix: str, quant: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{prefix}.absmax", quant.absmax
    yield f"{prefix}.code", quant.code
    if quant.nested:
        yield f"{prefix}.offset", quant.offset
        yield f"{prefix}.nested_absmax", quant.state2.absmax
        yield f"{prefix}.nested_code", quant.state2.code
