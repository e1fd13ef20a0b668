"""What values the settings have that are read: JSON and dataclasses hold nobody to their annotations.

A ``"false"`` that is taken for a true would be a forecast of another training. Standard library only.
"""

from __future__ import annotations

from dataclasses import is_dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_SWITCHES = (
    *("bf16", "fp16", "gradient_checkpointing", "activation_checkpointing", "use_liger_kernel"),
    *("eval_do_concat_batches", "batch_eval_metrics", "prediction_loss_only", "load_best_model_at_end"),
    *("use_dora", "lora_bias", "ensure_weight_tying"),
)
_STRATEGIES = ("no", "steps", "epoch")
_BIASES = ("none", "all", "lora_only")


def _names(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(name, str) for name in value)


def _name_or_names(value: Any) -> bool:
    return isinstance(value, str) or _names(value)


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset, range)) and all(map(_whole, value))


def _ranks(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(n, str) and _whole(rank) and rank > 0 for n, rank in value.items()
    )


def _indices(value: Any) -> bool:
    return _whole_numbers(value) or (isinstance(value, dict) and all(map(_whole_numbers, value.values())))


def _group(value: Any) -> bool:
    return isinstance(value, dict) or is_dataclass(value)


def _one_of(known: tuple[str, ...]) -> Callable[[Any], bool]:
    return lambda value: getattr(value, "value", value) in known


# Of each setting: whether a value is one of its own, and what those are. ``None`` is one of every setting.
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_SWITCHES, (lambda value: isinstance(value, bool), "true or false")),
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy"),
        # YAML 1.1 reads a bare ``no`` as false.
        (lambda value: value is False or _one_of(_STRATEGIES)(value), f"one of {', '.join(_STRATEGIES)}"),
    ),
    **dict.fromkeys(("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"), (_group, "settings by name")),
    **dict.fromkeys(("liger_kernel_config", "eva_config"), (_group, "settings by name")),
    "use_reentrant": (lambda value: isinstance(value, bool), "true or false"),
    "lora_dropout": (_number, "a number"),
    "rho": (_number, "a number"),
    "modules_to_save": (_names, "a list of names"),
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "layers_pattern"), (_name_or_names, "a list of names, or one")
    ),
    "init_lora_weights": (lambda value: isinstance(value, (bool, str)), "true, false or a name"),
    "bias": (_one_of(_BIASES), f"one of {', '.join(_BIASES)}"),
    "layers_to_transform": (lambda value: _whole(value) or _whole_numbers(value), "a number of a layer, or a list"),
    "rank_pattern": (_ranks, "ranks by name of a module"),
    "trainable_token_indices": (_indices, "a list of token ids, or one by name of a module"),
}


def refuse_mistyped(where: str, settings: Mapping[str, Any]) -> None:
    """Refuse the first setting whose value is none of its own.

    Args:
        where: What holds the settings, for the message.
        settings: By name.

    Raises:
        ValueError: Names the setting, its value, and what it may be.
    """
    for name, (is_one, what) in _VALUES.items():
        value = settings.get(name)
        if value is not None and not is_one(value):
            raise ValueError(f"{where} has {name}={value!r}: it must be {what}")
