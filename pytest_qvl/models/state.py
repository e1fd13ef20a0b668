"""Run a block on a model and put the model's state back afterwards."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pytest_qvl.models.adapters import adapted_layers, auxiliary_layers
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.autocast import casts_not_kept

_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)


@contextmanager
def preserved(model: Any, *, training: bool | None = None, seed: int | None = None) -> Iterator[None]:
    """Run a block and put the model's state back, whatever happens inside.

    Put back: train/eval mode and gradient-checkpointing flag of every module, ``requires_grad`` and ``.grad`` of every
    parameter, forward and backward hooks, active and switched-off adapters, ``use_cache``, the generation config,
    ``rope_deltas``, and the random states of Python-independent generators (CPU and CUDA). Weights are not copied:
    a check that trains restores them itself. Gradients that wait for an optimizer step are out of the way inside of
    the block, so that none adds to them, and no forward inside computes with what autocast kept of weights as they
    were before (:func:`pytest_qvl.models.autocast.casts_not_kept`).

    Args:
        model: The model, wrapped or not.
        training: Put the model into train (``True``) or eval (``False``) mode for the block.
        seed: Seed torch for the block.
    """
    import torch

    parts = anatomy(model)
    modules = list(parts.wrapped.modules())
    modes = [m.training for m in modules]
    checkpointing = [vars(m).get("gradient_checkpointing") for m in modules]
    hooks = [{t: dict(vars(m)[t]) for t in _HOOK_TABLES if t in vars(m)} for m in modules]
    parameters = [(p, p.requires_grad, p.grad) for p in parts.wrapped.parameters()]
    switched = [*adapted_layers(parts).values(), *auxiliary_layers(parts).values()]
    layers = [(layer, layer._disable_adapters, copy.copy(layer._active_adapter)) for layer in switched]
    generation, use_cache = parts.base.generation_config, parts.text_config.use_cache
    settings = copy.deepcopy(vars(generation))
    deltas = parts.core.rope_deltas
    # A model over several GPUs draws from the generator of each.
    devices = list({parameter.device for parameter, _, _ in parameters if parameter.is_cuda})
    with casts_not_kept(), torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.manual_seed(seed)
        if training is not None:
            parts.wrapped.train(training)
        parts.core.rope_deltas = None
        for parameter, _, _ in parameters:
            parameter.grad = None  # a backward pass in the block would add to the very tensor that is put back
        try:
            yield
        finally:
            for module, mode, flag, tables in zip(modules, modes, checkpointing, hooks, strict=True):
                module.training = mode
                if flag is not None:
                    module.gradient_checkpointing = flag
                for table, before in tables.items():
                    live = vars(module)[table]
                    for key in [k for k in live if k not in before]:
                        del live[key]
                    for key, hook in before.items():
                        live.setdefault(key, hook)
            for parameter, requires_grad, grad in parameters:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad
            for layer, disabled, active in layers:
                layer._disable_adapters, layer._active_adapter = disabled, active
            parts.base.generation_config = generation  # the object itself: others may hold it
            vars(generation).clear()
            vars(generation).update(settings)
            parts.text_config.use_cache = use_cache
            parts.core.rope_deltas = deltas
