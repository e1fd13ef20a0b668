"""Which attention kernel a model uses, and another one for the length of a block."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_qvl.models.anatomy import Parts


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
    """Run a block with eager attention, or with SDPA where eager is in use, in tower and backbone."""
    before = attention_names(parts)
    parts.base.set_attn_implementation("sdpa" if before[""] == "eager" else "eager")
    try:
        yield
    finally:
        parts.base.set_attn_implementation(before)
