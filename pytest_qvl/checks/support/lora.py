"""What PEFT calls its matrices and adapters, and which of them start at zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.adapters import adapter_configs, base_modules
from pytest_qvl.models.anatomy import Parts

if TYPE_CHECKING:
    from torch import nn


# The matrices that PEFT starts at zero, so that a fresh adapter adds nothing: B, but A where it adapts an
# embedding; with AdaLoRA the singular values E between the two, and B is random.
_STARTS_AT_ZERO = ("lora_B", "lora_embedding_A")
SINGULAR_VALUES = "lora_E"
# AdaLoRA's count of a layer's ranks, by which it divides: PEFT does not save it and loads it as the rank, but leaves it
# trainable once cast. Its value is large and its gradient small, so a right step may be below its resolution.
RANK_COUNT = "ranknum"
# Initialisations that write into the base weights whenever they attach (PEFT's LoraConfig, "init_lora_weights").
_REWRITES_BASE = ("olora", "pissa", "corda", "loftq")
# Writes into them only where `peft.tuners.lora.preprocess_loraga` has left gradients on the layers, never on loading.
GRADIENT_INITIALISATION = "lora_ga"


def zero_initialised_matrices(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The adapter matrices (of :func:`pytest_qvl.models.adapters.adapter_parameters`) that start at zero.

    Of a layer of which only A is given, as where MiCA trains A over a frozen B, that is A.
    """
    kinds: dict[str, set[str]] = {}
    for name in parameters:
        kinds.setdefault(layer_of(name), set()).add(matrix_of(name))
    return {name: p for name, p in parameters.items() if matrix_of(name) in start_at_zero(kinds[layer_of(name)])}


def start_at_zero(kinds: set[str]) -> tuple[str, ...]:
    """Which kinds of matrices start at zero in a layer that trains these kinds."""
    if SINGULAR_VALUES in kinds:
        return (SINGULAR_VALUES,)
    return (*_STARTS_AT_ZERO, "lora_A") if "lora_B" not in kinds else _STARTS_AT_ZERO


def rewrites_base(config: Any) -> bool:
    """Whether attaching an adapter of this ``LoraConfig`` writes into the base weights."""
    kind = getattr(config, "init_lora_weights", True)
    return isinstance(kind, str) and kind.lower().startswith(_REWRITES_BASE)


def foreign_types(parts: Parts) -> list[str]:
    """Kinds of the adapters on the model that have no matrices A and B (``"IA3"``), by PEFT's names."""
    kinds = {peft_type_of(config) for config in adapter_configs(parts).values()}
    return sorted(kinds - {"LORA", "ADALORA", "TRAINABLE_TOKENS"})


def peft_type_of(config: Any) -> str:
    """PEFT's name of a configuration's kind: ``"LORA"``, ``"IA3"`` and so on; empty for what is none of PEFT's."""
    kind = getattr(config, "peft_type", "")
    return str(getattr(kind, "value", kind) or "")


def layer_of(name: str) -> str:
    """The adapted layer's name, from the name of one of its LoRA matrices; another name as it is."""
    return name.partition(".lora_")[0]


def matrix_of(name: str) -> str:
    """``"lora_A"``, ``"lora_B"`` and so on from an adapter parameter's name; empty if no LoRA matrix."""
    _, dot, rest = name.partition(".lora_")
    return f"lora_{rest.split('.')[0]}" if dot else ""


def heads_are_tied(parts: Parts) -> bool:
    """Whether head and embeddings of the base model are one tensor, as in Qwen2.5-VL-3B."""
    modules = base_modules(parts)
    head, embeddings = (modules[parts.roots[group]] for group in ("lm_head", "embeddings"))
    return head.weight is embeddings.weight


def no_adapter(parts: Parts) -> str:
    """What to say of a model without adapter layers."""
    kinds = sorted({peft_type_of(config) for config in adapter_configs(parts).values()})
    if kinds:
        return (
            f"the model's adapter is {', '.join(kinds)}, which has no layers of its own to judge; LoRA is judged here"
        )
    return "the model carries no adapter; wrap it with peft.get_peft_model first"
