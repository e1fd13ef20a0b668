"""Which attention kernel a model uses, and another one for the length of a block."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.attributes import attributes_replaced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from pytest_qvl.models.anatomy import Parts

    Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]

EAGER = "eager_attention_forward"  # the name of the function in every model's module
SCORES_AT_ONCE = 1 << 25  # elements, ten bytes each at the most: a third of a GiB beside a model of many


def attention_names(parts: Parts) -> dict[str, str]:
    """Attention implementation by sub-configuration, in the form that ``set_attn_implementation`` takes back.

    The key ``""`` is the model's own configuration.
    """
    config = parts.config
    names = {"": config._attn_implementation}
    for key in config.sub_configs:
        names[key] = getattr(config, key)._attn_implementation
    return names


@contextmanager
def other_attention(parts: Parts) -> Iterator[None]:
    """Run a block with eager attention, or with SDPA where eager is in use, in tower and backbone.

    Eager attention keeps every score of a call: 16 heads over 5,808 patches of an image are 5 GiB in bfloat16. So it is
    given some heads at a time where scores are more than :data:`SCORES_AT_ONCE`; heads have nothing to do with each
    other. Weights of attention are not returned then.
    """
    before = attention_names(parts)
    parts.base.set_attn_implementation("sdpa" if before[""] == "eager" else "eager")
    try:
        with _few_heads_at_once(parts):
            yield
    finally:
        parts.base.set_attn_implementation(before)


@contextmanager
def _few_heads_at_once(parts: Parts) -> Iterator[None]:
    homes = [sys.modules.get(name) for name in {type(module).__module__ for module in parts.base.modules()}]
    changes = [(home, EAGER, partial(_by_heads, getattr(home, EAGER))) for home in homes if hasattr(home, EAGER)]
    with attributes_replaced(changes):
        yield


def _by_heads(
    eager: Attention, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **named: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`eager` over all heads of ``(rows, heads, length, width)``, or over those of some keys after the other."""
    import torch

    rows, heads, length, _ = query.shape
    groups = key.shape[1]
    shared = heads // groups
    at_once = max(1, SCORES_AT_ONCE // (rows * shared * length * key.shape[2]))
    if at_once >= groups:
        return eager(module, query, key, value, *rest, **named)
    sizes = (query, at_once * shared), (key, at_once), (value, at_once)
    pieces = zip(*(torch.split(states, size, dim=1) for states, size in sizes), strict=True)
    return torch.cat([eager(module, *piece, *rest, **named)[0] for piece in pieces], dim=2), None
