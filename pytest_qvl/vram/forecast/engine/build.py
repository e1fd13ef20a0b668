"""A model, its adapter and its optimizer without data, built as loading and PEFT build them on a device.

The classes are the real ones: Transformers' model, ``bitsandbytes.nn.Linear4bit``, PEFT's LoRA layers,
bitsandbytes' and torch's optimizers. Only the tensors in them have no data (see :mod:`.recorder`).
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
from torch import nn

from pytest_qvl.models.anatomy import Parts, anatomy
from pytest_qvl.models.quantized import keep_quantized_weights_in_place
from pytest_qvl.vram.forecast.engine import int8
from pytest_qvl.vram.forecast.engine.dataless import DatalessTensor
from pytest_qvl.vram.forecast.engine.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_qvl.vram.forecast.request import Checkpoint, Optimizer, Request

# ``get_state_buffer`` in ``bitsandbytes/optim/optimizer.py``: smaller states of a paged optimizer are not
# paged.
PAGED_ELEMENTS = 100_000


# Any gives the same memory.
LEARNING_RATE = 1e-4
# As ``Trainer`` makes them; where nothing is asked for, torch takes the kernels over lists on CUDA.
_TORCH_OPTIMIZERS: dict[str, Any] = {
    "adamw_torch": partial(torch.optim.AdamW, foreach=True),
    "adamw_torch_fused": partial(torch.optim.AdamW, fused=True),
    "sgd": partial(torch.optim.SGD, lr=LEARNING_RATE, foreach=True),
}


# PEFT knows a packed weight by the name of its class alone.
_NAMED = type("Params4bit", (), {})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is quantized and adapted.

    Attributes:
        quantized: Names of the linears in few bits; ``None`` for every one of the language backbone.
        nested: Whether the statistics of 4-bit blocks are quantized too.
        bits: 4 for NF4, 8 for ``LLM.int8()``.
        lora: A ``peft.LoraConfig``; ``None`` for the rank that is asked for on every language linear.
        adapter_in_float32: Whether PEFT keeps the adapter in float32 (its default) or in the base model's dtype.
    """

    quantized: frozenset[str] | None = None
    nested: bool = True
    bits: int = 4
    lora: Any = None
    adapter_in_float32: bool = True


def build_base(config: Any, dtype: torch.dtype, checkpoint: Checkpoint, recorder: Recorder, recipe: Recipe) -> Any:
    """The frozen base model in eval mode: linears in few bits as the recipe wants them, the rest in ``dtype``.

    From a checkpoint, memory is used as ``from_pretrained`` uses it: one allocation of the expected total, given back
    at once (``caching_allocator_warmup``), then the tensors in natural order of their names
    (``convert_and_load_state_dict_in_model``). From a 16-bit checkpoint, a 4-bit weight first arrives whole.
    ``"synthetic"`` is the order of :func:`pytest_qvl.models.sources.synthetic.build_synthetic`, and for 8 bits that of
    :func:`pytest_qvl.vram.forecast.validation.measured.frozen_base`, which packs weights once all are there in 16.
    """
    model = _skeleton(config, dtype)
    parts = anatomy(model)
    quantized = {
        f"{name}.weight": module
        for name, module in parts.named_linears()
        if (parts.group_of(name) == "language" if recipe.quantized is None else name in recipe.quantized)
    }
    pack: Callable[[torch.Tensor], tuple[torch.Tensor, Any]]
    if recipe.bits == 8:
        pack, layer_of = partial(int8.pack, recorder=recorder), int8.layer_of
    else:
        pack = partial(_pack, checkpoint=checkpoint, recorder=recorder, nested=recipe.nested)
        layer_of = partial(_linear_4bit, dtype=dtype)
    made: dict[int, nn.Parameter] = {}
    packed: dict[str, Any] = {}
    whole_first: dict[str, torch.Tensor] = {}

    def arrive(name: str, parameter: torch.Tensor) -> torch.Tensor:
        if name in quantized and recipe.bits == 8 and checkpoint == "synthetic":
            whole_first[name] = recorder.dataless(tuple(parameter.shape), parameter.dtype)
            return whole_first[name]
        if name in quantized:
            whole, packed[name.removesuffix(".weight")] = pack(parameter)
            return whole
        made[id(parameter)] = nn.Parameter(recorder.dataless(tuple(parameter.shape), parameter.dtype))
        return made[id(parameter)]

    with recorder, recorder.labelled("weights"):
        if checkpoint == "synthetic":
            _arrive_in_module_order(model, arrive, made, recorder)
            packed |= {name.removesuffix(".weight"): int8.packed(whole) for name, whole in whole_first.items()}
            whole_first.clear()
        else:
            _arrive_as_from_pretrained(model, arrive, quantized, recorder, recipe.bits)
    for name, weight in packed.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer_of(quantized[f"{name}.weight"], weight))
    for module in model.modules():
        for name, own in list(module._parameters.items()):
            if own is not None and id(own) in made:
                module._parameters[name] = made[id(own)]
    model.is_loaded_in_4bit = bool(quantized) and recipe.bits == 4
    model.is_loaded_in_8bit = bool(quantized) and recipe.bits == 8
    keep_quantized_weights_in_place(model)
    model.requires_grad_(False)
    model.eval()
    return model


def _arrive_as_from_pretrained(model: Any, arrive: Any, quantized: Any, recorder: Recorder, bits: int) -> None:
    parameters = sorted(model.named_parameters(), key=lambda item: _natural(item[0]))
    expected = sum(
        p.numel() * bits // 8 if name in quantized else p.numel() * p.element_size() for name, p in parameters
    )
    recorder.trace.free(recorder.trace.alloc(expected, "weights"))
    for name, parameter in parameters:
        arrive(name, parameter)
    for module in model.modules():
        _place_buffers(module, recorder)


def _arrive_in_module_order(model: Any, arrive: Any, made: Any, recorder: Recorder) -> None:
    held = None  # the builder lets go of a tensor when it has drawn the next one
    for module_name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:  # tied
                held = arrive(f"{module_name}.{key}", parameter)
        _place_buffers(module, recorder)
    del held


def _place_buffers(module: nn.Module, recorder: Recorder) -> None:
    for name, buffer in list(module._buffers.items()):
        if buffer is not None:
            module._buffers[name] = recorder.dataless(tuple(buffer.shape), buffer.dtype)


def _skeleton(config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForImageTextToText

    config = deepcopy(config)
    # Transformers 4 builds each part in the dtype of its own configuration.
    for part in (config, config.get_text_config(), config.vision_config):
        part.dtype = dtype
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()
    return model


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _pack(
    parameter: torch.Tensor, checkpoint: Checkpoint, recorder: Recorder, nested: bool
) -> tuple[torch.Tensor, nn.Parameter]:
    """A weight as it arrived, and packed."""
    with recorder.off_device() if checkpoint == "nf4" else nullcontext():
        whole = recorder.dataless(tuple(parameter.shape), parameter.dtype)
        data, state = bnb.functional.quantize_4bit(whole, compress_statistics=nested, quant_type="nf4")
    if checkpoint == "nf4":
        second = (state.offset, state.state2.absmax, state.state2.code) if nested else ()
        for tensor in (data, state.absmax, state.code, *second):
            recorder.place(tensor)
    # A Params4bit cannot hold a tensor subclass; its attributes are all that Linear4bit and PEFT read.
    weight: Any = nn.Parameter(data, requires_grad=False)
    weight.quant_state, weight.compress_statistics, weight.quant_type = state, nested, "nf4"
    weight.poses_as = _NAMED
    return whole, weight


def _linear_4bit(linear: Any, weight: Any, dtype: torch.dtype) -> Any:
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    layer.weight, layer.quant_state, layer.bias = weight, weight.quant_state, linear.bias
    return layer


def asked_lora(parts: Parts, request: Request, *, initialised: bool = True) -> Any:
    """The ``peft.LoraConfig`` that a request describes.

    Args:
        parts: The model.
        request: What is asked for.
        initialised: Whether first values are found as the request says. What they are does not change their size, and
            some ways to find them read the weights.
    """
    from peft import LoraConfig

    targets: Any = request.lora_targets
    if targets == "language":
        targets = [name for name, _ in parts.named_linears() if parts.group_of(name) == "language"]
    return LoraConfig(
        r=request.lora_r,
        lora_alpha=request.lora_r,
        lora_dropout=request.lora_dropout,
        use_dora=request.use_dora,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(request.modules_to_save) or None,
        trainable_token_indices=list(range(request.trainable_tokens)) or None,
        init_lora_weights=(request.init_lora_weights if initialised else "") or True,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in request.lora_options},
    )


def attach_lora(model: Any, request: Request, recorder: Recorder, recipe: Recipe) -> Any:
    """PEFT's LoRA as the recipe or the request wants it, in place; returns the PEFT model.

    ``recorder`` must not be active.

    Raises:
        ValueError: Names of modules that the model does not have.
    """
    from peft import get_peft_model

    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for name in request.modules_to_save:
        if name not in names:
            raise ValueError(f"modules_to_save names {name!r}, and no module of {request.model} is called that")
    config = asked_lora(anatomy(model), request, initialised=False)
    if recipe.lora is not None:
        config = replace(recipe.lora, inference_mode=False, init_lora_weights=True)
    with recorder, recorder.labelled("adapters"), _copies_placed(recorder), warnings.catch_warnings():
        # PEFT 0.21 reads a property that Transformers 5.23 deprecates.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=recipe.adapter_in_float32)
        _drop_data(wrapped, recorder)
    if request.init_lora_weights == "olora" and request.base_bits == 4:
        _quantized_from_float32(wrapped)
    return wrapped


def _quantized_from_float32(model: nn.Module) -> None:
    """What ``olora_init`` does to a 4-bit base: weights are packed from fp32, to which backward unpacks them.

    Packed they are as large as before.
    """
    for module in model.modules():
        if hasattr(module, "lora_A") and isinstance(module.base_layer, bnb.nn.Linear4bit):
            module.base_layer.weight.quant_state.dtype = torch.float32


@contextmanager
def _copies_placed(recorder: Recorder) -> Iterator[None]:
    """DoRA copies each 4-bit layer to unpack it; copies of tensors without data are on no device unless placed."""
    from peft.tuners.lora import dora

    plain: Any = dora.deepcopy

    def copied(layer: Any) -> Any:
        copy = plain(layer)
        weight = copy.weight
        second = weight.quant_state.state2
        tensors = [weight, weight.quant_state.absmax, weight.quant_state.offset, second and second.absmax, copy.bias]
        for tensor in tensors:
            if isinstance(tensor, DatalessTensor):
                recorder.place(tensor)
        return copy

    dora.deepcopy = copied
    try:
        yield
    finally:
        dora.deepcopy = plain


def _drop_data(model: nn.Module, recorder: Recorder) -> None:
    """Turn what was small enough to be created with data into tensors without, and count copies of whole modules."""
    for module in model.modules():
        for name, own in list(module._parameters.items()):
            if isinstance(own, DatalessTensor):
                recorder.place(own)
            elif own is not None:
                module._parameters[name] = nn.Parameter(
                    recorder.dataless(tuple(own.shape), own.dtype), requires_grad=own.requires_grad
                )


def follow_gradients(parts: Parts, recorder: Recorder) -> None:
    """Count a gradient as ``"gradients"`` from the moment it stays on its parameter."""

    def keep(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        recorder.relabel(parameter.grad, "gradients")

    for parameter in parts.wrapped.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(keep)  # type: ignore[no-untyped-call]


def make_optimizer(name: Optimizer, parameters: list[Any], recorder: Recorder) -> Any:
    """The optimizer called ``name`` in Transformers' ``TrainingArguments``, over ``parameters``.

    States of a paged optimizer live in managed memory outside the caching allocator and are not counted.
    """
    if name in _TORCH_OPTIMIZERS:
        return _TORCH_OPTIMIZERS[name](parameters)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(parameters, lr=LEARNING_RATE, scale_parameter=False, relative_step=False)
    kinds = {
        "adamw_8bit": bnb.optim.AdamW8bit,
        "adamw_bnb_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    }
    optimizer = kinds[name](parameters)
    plain = optimizer.get_state_buffer

    def state_buffer(parameter: Any, dtype: torch.dtype = torch.float32) -> Any:
        if optimizer.is_paged and parameter.numel() >= PAGED_ELEMENTS:
            with recorder.off_device():
                return plain(parameter, dtype=dtype)
        return plain(parameter, dtype=dtype)

    # bitsandbytes does not page on CPU, where tensors without data say they are, and would warn about it.
    optimizer._cpu_paged_warned = True
    optimizer.get_state_buffer = state_buffer
    return optimizer
