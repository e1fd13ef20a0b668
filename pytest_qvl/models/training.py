"""What a real training step on a QLoRA model needs, and how to undo it."""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.adapters import (
    active_adapters,
    adapted_layers,
    adapter_configs,
    adapter_parameters,
    auxiliary_layers,
)
from pytest_qvl.models.anatomy import TOWER
from pytest_qvl.models.autocast import autocast_dtype
from pytest_qvl.models.quantized import linear_states

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch
    from torch import nn

    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.models.policy import AdapterPolicy

_CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")
_MISSING = object()
# torch.amp.GradScaler's first scale; halved, as it does, while gradients overflow.
FIRST_FLOAT16_SCALE = 2.0**16


def is_checkpointing(parts: Parts) -> bool:
    """Whether any layer recomputes its activations in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in parts.base.modules())


@contextmanager
def checkpointing(parts: Parts, enabled: bool, *, own_way: bool = False) -> Iterator[None]:
    """Run a block with gradient checkpointing on or off, and put every layer's flag back.

    A model that already checkpoints keeps its own way of doing so; with ``own_way`` also one that is prepared to
    and has it switched off (Unsloth's layers at rest). Otherwise the flags of all layers that
    support it are set, non-reentrant, and nothing else happens: ``gradient_checkpointing_enable`` would also
    hook embeddings and (Transformers 5) the vision patch embed, which the non-reentrant kind does not need.
    """
    from torch.utils.checkpoint import checkpoint

    layers = [module for module in parts.base.modules() if hasattr(module, "gradient_checkpointing")]
    before = [{name: vars(layer).get(name, _MISSING) for name in _CHECKPOINTING} for layer in layers]
    if enabled != is_checkpointing(parts):
        for layer in layers:
            layer.gradient_checkpointing = enabled
            if enabled and not (own_way and "_gradient_checkpointing_func" in vars(layer)):
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    try:
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            for name, value in values.items():
                if value is not _MISSING:
                    setattr(layer, name, value)
                elif name in vars(layer):
                    delattr(layer, name)


def trained_copies(parts: Parts) -> dict[str, nn.Parameter]:
    """What PEFT trains besides its adapters because the configuration asks for it, by dotted name.

    Copies for ``modules_to_save`` and the like, and :func:`trained_biases`.
    """
    return {**copied_parameters(parts), **trained_biases(parts)}


def copied_parameters(parts: Parts) -> dict[str, nn.Parameter]:
    """Copies that PEFT trains in place of a module of the base model (``modules_to_save``), by dotted name."""
    found: dict[str, nn.Parameter] = {}
    adapters = {id(parameter) for parameter in adapter_parameters(parts).values()}
    for name, module in auxiliary_layers(parts).items():
        original = {id(parameter) for parameter in module.original_module.parameters()}
        for key, parameter in module.named_parameters():
            if id(parameter) not in original and id(parameter) not in adapters:
                found[f"{name}.{key}"] = parameter
    return found


def trained_on_purpose(parts: Parts, policy: AdapterPolicy) -> dict[str, nn.Parameter]:
    """The base model's own weights that require grad in parts that the policy allows to be trained, by dotted name."""
    others = {id(parameter) for parameter in (*adapter_parameters(parts).values(), *trained_copies(parts).values())}
    return {
        name: parameter
        for name, parameter in parts.base.named_parameters()
        if parameter.requires_grad and id(parameter) not in others and parts.group_of(name) in policy.trained
    }


def trained_biases(parts: Parts) -> dict[str, nn.Parameter]:
    """The base model's biases that an adapter's ``bias`` trains, by dotted name; those of vision and merger left out.

    ``"all"`` is every bias of the model, ``"lora_only"`` those of the adapted layers. Vision tower and merger stay
    frozen whatever a configuration says, so that a bias trained there is no part of the adapter.
    """
    return {
        name: parameter
        for name, parameter in asked_biases(parts).items()
        if parameter.requires_grad and parts.group_of(name) not in TOWER
    }


def asked_biases(parts: Parts) -> dict[str, nn.Parameter]:
    """The base model's biases that the ``bias`` of the active adapters asks to train, in all of its parts."""
    kinds = {getattr(adapter_configs(parts).get(name), "bias", "none") for name in active_adapters(parts)}
    adapted = tuple(f"{name}.base_layer.bias" for name in adapted_layers(parts)) if kinds - {"none"} else ()
    own = {id(parameter) for parameter in adapter_parameters(parts).values()} if kinds - {"none"} else set()
    return {
        name: parameter
        for name, parameter in (parts.base.named_parameters() if adapted else ())
        if name.endswith(".bias") and id(parameter) not in own and ("all" in kinds or name in adapted)
    }


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Let a module compute the same every time inside the block.

    In eval mode, and with probabilities of 0 for the case that somebody (a user's trainer) calls ``train()`` inside.
    """
    from torch import nn

    modes = [(each, each.training) for each in module.modules()]
    drops = [(each, each.p) for each in module.modules() if isinstance(each, nn.Dropout)]
    module.eval()
    for layer, _ in drops:
        layer.p = 0.0
    try:
        yield
    finally:
        for each, mode in modes:
            each.training = mode
        for layer, probability in drops:
            layer.p = probability


@contextmanager
def weights_restored(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Put parameters back bitwise after a block that trains them; the copies wait in host memory."""
    import torch

    kept = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)


def layer_gains(parts: Parts) -> dict[str, float]:
    """What one unit in every element of B adds to each adapted layer's output, for an input of root mean square 1.

    For linear layers ``scaling * sum over ranks of E|A x|`` with ``E|A x| = sqrt(2 / pi) * norm(row of A)`` for
    normally distributed ``x``. For an embedding, where A is what starts at zero and a token picks one of its
    columns, ``scaling * sum over ranks of |B|``, mean over the width, relative to the root mean square of the
    table that it is added to. By dotted name in the base model; a layer whose gain is 0 or unknown is left out.
    """
    import torch

    gains: dict[str, float] = {}
    for layer_name, layer in adapted_layers(parts).items():
        for name in layer.active_adapters:
            if name in getattr(layer, "lora_E", {}):
                continue  # AdaLoRA: A, E and B are all trained from small random values, at one rate
            if name in getattr(layer, "lora_A", {}):
                rows = layer.lora_A[name].weight.detach().float().flatten(1).norm(dim=1)
                gain = math.sqrt(2 / math.pi) * float(rows.sum())
            elif name in getattr(layer, "lora_embedding_B", {}):
                table = layer.get_base_layer().weight.detach()
                size = float(torch.linalg.vector_norm(table, dtype=torch.float32)) / math.sqrt(table.numel())
                gain = float(layer.lora_embedding_B[name].detach().float().abs().sum(dim=1).mean()) / (size or 1.0)
            else:
                continue
            gains[layer_name] = max(gains.get(layer_name, 0.0), abs(layer.scaling[name]) * gain)
    return {name: gain for name, gain in gains.items() if 0 < gain < math.inf}


def loss_floor(parts: Parts, token: int) -> float:
    """A lower bound, in nats, of the loss on one token that a frozen head allows, whatever precedes the head.

    The head sees ``h`` with ``|h| <= max|gain| * sqrt(width)``, by the RMS norm before it. For head rows
    ``w``, the loss ``log sum_j exp((w_j - w_token) h)`` is at least ``ln V - |mean(w) - w_token| |h|`` by
    Jensen's inequality. Zero for any model of practical size; a random model a few dozen wide cannot get near
    it.
    """
    import torch

    head, gain = next(parts.lm_head.parameters()), parts.language_backbone.norm.weight
    if not head.is_floating_point():
        return 0.0
    with torch.no_grad():
        away = float((head.mean(0, dtype=torch.float32) - head[token].float()).norm())
        longest = float(gain.abs().max()) * math.sqrt(gain.numel())
    return max(0.0, math.log(head.shape[0]) - away * longest)


def is_reentrant(parts: Parts) -> bool:
    """Whether the checkpointing is torch's reentrant kind, which needs inputs that require grad."""
    functions = [vars(module).get("_gradient_checkpointing_func") for module in parts.base.modules()]
    return any(getattr(function, "keywords", {}).get("use_reentrant", True) for function in functions if function)


def computes_in_float16(parts: Parts) -> bool:
    """Whether activations or matrix products are in float16, of autocast around too: gradients need a loss scale."""
    import torch

    if autocast_dtype(parts.device.type) == torch.float16:
        return True
    dtypes = {state.compute_dtype or state.storage for state in linear_states(parts)}
    return parts.embeddings.weight.dtype == torch.float16 or "float16" in dtypes


def backward(
    loss_of: Callable[[], torch.Tensor], parameters: list[nn.Parameter], *, scale: float
) -> tuple[float, float]:
    """One forward and backward with a loss scale, leaving unscaled gradients in ``parameters``.

    A scale above 1 is halved until every gradient is finite, as ``torch.amp.GradScaler`` does over its first
    steps. Scales are powers of two, so that scaling and unscaling are exact for float32 gradients.

    Args:
        loss_of: Runs the forward and returns the loss.
        parameters: Trainable parameters; their old gradients are dropped, and stay dropped if the loss has no
            path to any of them.
        scale: First loss scale; 1 for no scaling.

    Returns:
        The loss, and the scale that was used.
    """
    import torch

    while True:
        for parameter in parameters:
            parameter.grad = None
        loss: Any = loss_of()
        if not loss.requires_grad:
            return float(loss), scale
        (loss * scale).backward()
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if scale <= 1 or not torch.isfinite(loss) or all(bool(torch.isfinite(grad).all()) for grad in grads):
            break
        scale /= 2
    for grad in grads:
        grad.div_(scale)
    return float(loss.detach()), scale
