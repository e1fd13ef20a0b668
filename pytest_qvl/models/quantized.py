"""What bitsandbytes really did to each layer, read from module types and quant states, never from a config."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.adapters import base_modules
from pytest_qvl.models.anatomy import Group, Parts

if TYPE_CHECKING:
    import torch
    from torch import nn


# Transformers 5 matches from the start of a module's name, so that "visual" would keep nothing.
KEEP_16BIT = ("model.visual", "lm_head")


def usual_quantization(compute_dtype: torch.dtype, **overrides: Any) -> Any:
    """A ``BitsAndBytesConfig``: NF4 with double quantization; vision tower, merger and head in 16 bits.

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


class NotFourBitError(TypeError, ValueError):
    """A quantization configuration that does not ask for 4 bits, or is none."""


def asks_for_4bit(config: Any) -> None:
    """Refuse what is no ``transformers.BitsAndBytesConfig`` with ``load_in_4bit``.

    Raises:
        NotFourBitError: Says what it is instead, and the fix.
    """
    if not hasattr(config, "bnb_4bit_quant_type"):
        fix = (
            "pass its items to BitsAndBytesConfig(**...)" if isinstance(config, dict) else "give one with load_in_4bit"
        )
        raise NotFourBitError(f"expected a transformers.BitsAndBytesConfig, got {type(config).__name__}; {fix}")
    if not config.load_in_4bit:
        bits = "8 bits" if config.load_in_8bit else "no quantization"
        raise NotFourBitError(
            f"the BitsAndBytesConfig does not ask for 4 bits but for {bits}: set load_in_4bit=True, as QLoRA needs"
        )


# What decides how 4-bit weights are stored and multiplied; which layers are packed is read from the model.
_DECISIVE = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage", "bnb_4bit_compute_dtype")


def refuse_other_than_saved(config: Any, saved: dict[str, Any] | None) -> None:
    """Refuse a configuration that differs from the one that a checkpoint was saved in 4 bits with.

    ``from_pretrained`` takes the checkpoint's own and drops the one that it is given, with a warning at most.

    Args:
        config: The ``transformers.BitsAndBytesConfig`` that is asked for.
        saved: ``quantization_config`` of the checkpoint, ``None`` for one in 16 bits.

    Raises:
        NotFourBitError: Names each field with both values, and the fix.
    """
    if saved is None:
        return
    from transformers import BitsAndBytesConfig

    own = BitsAndBytesConfig.from_dict(saved)
    pairs = {name: (getattr(config, name), getattr(own, name)) for name in _DECISIVE}
    if others := [f"{name} {_said(asked)}, saved {_said(has)}" for name, (asked, has) in pairs.items() if asked != has]:
        raise NotFourBitError(
            f"the model was saved in 4 bits, and its own configuration counts, not this one ({'; '.join(others)}): "
            "leave the configuration out, or name the 16-bit model"
        )


def _said(value: Any) -> str:
    return str(value).removeprefix("torch.")


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
        double_quantized: Whether the absmax values are quantized too (bitsandbytes calls it "nested").
        repacked: Whether the CPU kernel has rewritten the weight in place, which loses its double quantization.
        quant_storage: Dtype of the tensor that holds the packed weights (4-bit layers only), mostly ``"uint8"``.
        module: Class of the layer, such as ``"Linear4bit"``.
        misfit: Why class and weight do not belong together; empty where they do. Such a layer computes nothing.
    """

    name: str
    group: Group
    storage: str
    in_features: int
    out_features: int
    compute_dtype: str | None = None
    blocksize: int | None = None
    double_quantized: bool | None = None
    repacked: bool = False
    quant_storage: str | None = None
    module: str = "Linear"
    misfit: str = ""

    @property
    def is_4bit(self) -> bool:
        """Whether the layer is stored in four bits."""
        return self.storage in ("nf4", "fp4")

    @property
    def is_quantized(self) -> bool:
        """Whether the layer is stored in fewer than 16 bits."""
        return self.is_4bit or self.storage == "int8"


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """The name of a dtype without its module: ``"bfloat16"`` for ``torch.bfloat16``."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def linear_states(parts: Parts) -> list[LinearState]:
    """How every linear layer of the model is stored, adapters left out."""
    return [_state(name, parts.group_of(name), module) for name, module in parts.named_linears()]


def _state(name: str, group: Group, module: Any) -> LinearState:
    """How one linear layer is stored, read from its class, its weight and the weight's ``quant_state``."""
    import bitsandbytes as bnb

    weight = module.weight
    quant = getattr(weight, "quant_state", None)
    state = partial(
        LinearState,
        name=name,
        group=group,
        in_features=module.in_features,
        out_features=module.out_features,
        module=type(module).__name__,
    )
    plain = dtype_name(weight.dtype) or "unknown"
    if isinstance(module, bnb.nn.Linear8bitLt):
        return state(storage="int8")
    wrapped = isinstance(module, bnb.nn.Linear4bit)
    if quant is None:
        misfit = f"its weight is {plain} and was never quantized" if wrapped else ""
        if wrapped and weight.device.type == "meta":
            misfit = "its weight has no data (meta device)"
        return state(storage=plain, misfit=misfit)
    return state(
        storage=quant.quant_type,
        compute_dtype=dtype_name(module.compute_dtype) if wrapped else None,
        blocksize=quant.blocksize,
        double_quantized=quant.nested,
        repacked=bool(getattr(quant, "packing_format_for_cpu", False)),
        quant_storage=plain,
        misfit="" if wrapped else "its weight is packed in 4 bits, which this class multiplies as it is",
    )


# A table computed in another order differs by roundings of float32 at magnitudes up to 1, four at most: one for each
# bound of an interval, their mean, and the division by the largest. A table cast to bfloat16 differs by up to 2**-9.
_TABLE_ROUNDINGS = 4 * 2.0**-24


def with_foreign_tables(parts: Parts) -> list[str]:
    """Names of the 4-bit linears whose codes stand for other values than those of their type.

    bitsandbytes looks values up in the tables that a file holds (``quant_map``, and ``nested_quant_map`` of double
    quantization), whatever name of a type stands beside them.
    """
    states = ((name, getattr(module.weight, "quant_state", None)) for name, module in parts.named_linears())
    return [name for name, quant in states if quant is not None and not _has_own_tables(quant)]


def _has_own_tables(quant: Any) -> bool:
    import torch

    tables = [(quant.code, quant.quant_type), *([(quant.state2.code, "dynamic")] if quant.nested else [])]
    for code, kind in tables:
        held, usual = code.detach().cpu().float(), _table(kind)
        if held.shape != usual.shape or float((held - usual).abs().max()) > _TABLE_ROUNDINGS:
            left = _left_by_quantizing() if kind == "dynamic" else None
            if left is None or not torch.equal(held, left):
                return False
    return True


@cache
def _table(kind: str) -> torch.Tensor:
    """What the codes of ``"nf4"``, ``"fp4"`` or ``"dynamic"`` (8 bits, of absmax values) stand for, on the CPU."""
    from bitsandbytes import functional

    table: torch.Tensor = (
        functional.create_dynamic_map() if kind == "dynamic" else functional.get_4bit_type(kind, device="cpu")
    )
    return table.float()


@cache
def _left_by_quantizing() -> torch.Tensor | None:
    """The table of 8 bits that the installed release leaves after it quantized on the CPU, if it is 0.49's.

    Before it looks for the nearest values, ``cquantize_blockwise_cpu_fp32`` of bitsandbytes 0.49.0 to 0.49.2 writes -1
    over the first entry (-0.993) of the table that it is given, which is the one that all later states are copies of.
    What it quantizes fits the table that it leaves. ``None`` from 0.50 on, which leaves the table as it is.
    """
    import torch
    from bitsandbytes import functional

    left, known = _table("dynamic").clone(), _table("dynamic").clone()
    known[0] = -1.0
    functional.quantize_blockwise(torch.ones(1, device="cpu"), code=left, blocksize=256)
    return left if torch.equal(left, known) else None


def dequantize(model: nn.Module, dtype: torch.dtype) -> int:
    """Put an ordinary linear layer in the place of each 4-bit one, with the values that it stands for.

    The model then computes in one dtype throughout; the rounding to four bits stays in its weights.

    Args:
        model: A 4-bit model without adapters, changed in place.
        dtype: Of the new weights.

    Returns:
        Number of layers.
    """
    import bitsandbytes as bnb
    import torch
    from torch import nn

    packed = [(n, m) for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    for name, old in packed:
        quant = getattr(old.weight, "quant_state", None)
        values = old.weight.data if quant is None else bnb.functional.dequantize_4bit(old.weight.data, quant)
        with torch.device("meta"):
            new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
        new.weight = nn.Parameter(values.to(dtype), requires_grad=False)
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.data.to(dtype), requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new.train(old.training))
    return len(packed)


def finish_saved_in_4bit(model: nn.Module, dtype: torch.dtype, *, full_precision: bool) -> None:
    """What a model from a checkpoint saved in 4 bits needs after ``from_pretrained`` to be as it was asked for.

    Everything that is not quantized gets its dtype: Transformers 5.17 keeps what such a checkpoint holds in 16 bits as
    it is on disk (the vision tower, but not the head), whatever ``dtype`` it was given.

    Args:
        model: The model, changed in place.
        dtype: Of what is not quantized.
        full_precision: Dequantize it: the nearest to full precision that such a checkpoint can give.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and getattr(parameter, "quant_state", None) is None:
            parameter.data = parameter.data.to(dtype)
    if full_precision:
        dequantize(model, dtype)


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
    statistics of double quantization. What PEFT has wrapped is included under the name it has without PEFT; what PEFT
    added is not.
    """
    for name, module in base_modules(parts).items():
        prefix = f"{name}." if name else ""
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            yield f"{prefix}{key}", tensor
            quant = getattr(tensor, "quant_state", None)
            if quant is not None:
                yield from quant_state_tensors(f"{prefix}{key}", quant)


def quant_state_tensors(prefix: str, quant: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Statistics and tables of one 4-bit weight, by name after `prefix`."""
    yield f"{prefix}.absmax", quant.absmax
    yield f"{prefix}.code", quant.code
    if quant.nested:
        yield f"{prefix}.offset", quant.offset
        yield f"{prefix}.nested_absmax", quant.state2.absmax
        yield f"{prefix}.nested_code", quant.state2.code
