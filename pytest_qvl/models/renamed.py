"""What Transformers has renamed: each thing by the name that the release at hand knows."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_qvl.models.anatomy import Parts

# 5.24 renamed the key-value cache and will drop the old names in 5.40; the second is that of linear attention's layers.
KV_CACHE_NAMES = ("cache", "cache_params", "past_key_values")
# How Transformers reads the names of before 4.52 (`_checkpoint_conversion_mapping` of Qwen2-VL and Qwen2.5-VL in 4.57).
_OLD_LAYOUT = (
    (re.compile(r"^visual\."), "model.visual."),
    (re.compile(r"^model\.(?!language_model\.|visual\.)"), "model.language_model."),
)


def kv_cache_name(parts: Parts) -> str:
    """What the model's forward and ``generate`` call the key-value cache."""
    known = inspect.signature(type(parts.base).forward).parameters
    return next(name for name in KV_CACHE_NAMES if name in known)


def kv_cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The key-value cache among keyword arguments, whichever name a caller gave it; ``None`` for none."""
    return next((kwargs[name] for name in KV_CACHE_NAMES if kwargs.get(name) is not None), None)


def enable_checkpointing(base: Any, kwargs: dict[str, Any]) -> None:
    """Switch gradient checkpointing on; ``kwargs`` go to ``torch.utils.checkpoint``. 5.23 renamed it."""
    (getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable)(kwargs)


def disable_checkpointing(base: Any) -> None:
    """Switch gradient checkpointing off. 5.23 renamed it."""
    (getattr(base, "activation_checkpointing_disable", None) or base.gradient_checkpointing_disable)()


def in_todays_layout(name: str) -> str:
    """The name that a tensor of a checkpoint has in Transformers 4.52 and later."""
    for pattern, replacement in _OLD_LAYOUT:
        name = pattern.sub(replacement, name)
    return name
