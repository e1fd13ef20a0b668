"""Which modules a LoRA configuration asks for and how large their adapters are, worked out without PEFT."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.lora import heads_are_tied
from pytest_qvl.checks.support.wording import listed, some
from pytest_qvl.models.adapters import base_modules
from pytest_qvl.models.anatomy import Parts
from pytest_qvl.models.layers import MIXER, MIXER_INPUTS, language_layers

if TYPE_CHECKING:
    from torch import nn


def requested_modules(parts: Parts, config: Any, candidates: Mapping[str, nn.Module]) -> set[str]:
    """Modules that the configuration names, and those tied to them where ``ensure_weight_tying`` asks for it.

    PEFT's documentation of ``ensure_weight_tying``: tied layers get one adapter, whichever of them is named.
    """
    asked = {name for name, module in candidates.items() if _is_asked_for(config, name, module)}
    tied = {parts.roots["embeddings"], parts.roots["lm_head"]}
    if getattr(config, "ensure_weight_tying", False) and heads_are_tied(parts) and asked & tied:
        asked |= tied
    return asked


def adaptable_modules(parts: Parts) -> dict[str, nn.Module]:
    """Every module that LoRA can adapt, by the name it has without an adapter."""
    from torch import nn

    return {
        name: module
        for name, module in base_modules(parts).items()
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv3d)
    }


def bare_mixers(parts: Parts, config: Any, candidates: Mapping[str, nn.Module], adapted: Collection[str]) -> str:
    """Which linear-attention mixers (Qwen3.5) no target reaches, in a sentence: LoRA's usual seven names do not.

    What the configuration leaves out on purpose is not said: ``exclude_modules``, ``layers_to_transform``, and
    ``modules_to_save``, which trains it whole.

    Args:
        parts: The model, wrapped or not.
        config: The ``peft.LoraConfig``.
        candidates: Every module that LoRA can adapt, by name (:func:`adaptable_modules`).
        adapted: Names of those that have an adapter.

    Returns:
        The sentence; empty where no mixer is left out.
    """
    every = copy.copy(config)
    every.target_modules = ".*"
    could = requested_modules(parts, every, candidates)
    layers = language_layers(parts)
    bare: dict[str, list[str]] = {}
    for mixer in (f"{layer.name}.{MIXER}" for layer in layers if not layer.attends):
        inside = [f"{mixer}.{end}" for end in (*MIXER_INPUTS, "out_proj")]
        if could.intersection(inside) and not any(name in adapted for name in inside):
            bare[mixer] = [name for name in inside if name in could]
    if not bare:
        return ""
    names = list(dict.fromkeys(name.rpartition(".")[2] for inside in bare.values() for name in inside))
    return (
        f"{len(bare)} of {len(layers)} layers mix tokens by linear attention without an adapter on it: "
        f"{sum(map(len, bare.values()))} linears of {some(list(bare))}; to adapt them too, name {listed(names)} in "
        "target_modules"
    )


def _is_asked_for(config: Any, name: str, module: nn.Module) -> bool:
    """PEFT's documented matching: a regex fits the whole name, a list entry its dotted end or all of it."""
    from torch import nn

    if config.exclude_modules and _matches(config.exclude_modules, name):
        return False
    if any(re.match(rf"(.*\.)?{saved}(\..*)?$", name) for saved in config.modules_to_save or ()):
        return False
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        return isinstance(module, nn.Linear) and name != "lm_head"
    if not _matches(config.target_modules, name):
        return False
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    patterns = config.layers_pattern or r"[^.]*"
    index = next(
        (
            int(found.group(1))
            for pattern in ([patterns] if isinstance(patterns, str) else patterns)
            if (found := re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", name))
        ),
        None,
    )
    return index in ([layers] if isinstance(layers, int) else layers)


def _matches(request: str | Iterable[str], name: str) -> bool:
    if isinstance(request, str):
        return re.fullmatch(request, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in request)


def patterned(pattern: Mapping[str, int], name: str, default: int) -> int:
    """PEFT's documented matching of ``rank_pattern`` and ``alpha_pattern``: a key fits the end of the name."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def frozen_on_purpose(config: Any, optimizer: Any) -> tuple[str, ...]:
    """Kinds of matrices that belong to the adapter and are not trained.

    MiCA (``init_lora_weights="mica"``, arXiv:2604.01694) trains A over minor singular vectors of the base weight in B;
    LoRA-FA (arXiv:2308.03303), which in PEFT is an optimizer, trains B over a random A.
    """
    if str(config.init_lora_weights).lower() == "mica":
        return ("lora_B", "lora_embedding_B")
    return ("lora_A",) if is_lorafa(optimizer) else ()


def is_lorafa(optimizer: Any) -> bool:
    """Whether this is PEFT's optimizer of LoRA-FA, which is made from all parameters of the model, frozen ones too."""
    return type(optimizer).__name__ == "LoraFAOptimizer"


def expected_size(config: Any, name: str, module: nn.Module) -> int:
    """Parameters of the adapter on one module."""
    import torch

    rank = patterned(config.rank_pattern, name, config.r)
    if isinstance(module, torch.nn.Linear):
        fan_in, fan_out = module.in_features, module.out_features
    elif isinstance(module, torch.nn.Embedding):
        fan_in, fan_out = module.num_embeddings, module.embedding_dim
    else:
        weight: Any = module.weight
        fan_in, fan_out = weight[0].numel(), weight.shape[0]
    vectors = bool(config.use_dora) + bool(getattr(config, "lora_bias", False))
    return int(rank * (fan_in + fan_out) + vectors * fan_out)
