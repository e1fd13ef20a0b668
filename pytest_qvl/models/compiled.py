"""Code that torch.compile has made of a model's, and how to do without it."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def uncompiled() -> Iterator[bool]:
    """Run compiled functions as they were written; yields whether anything in this process is compiled.

    A compiler fuses what it finds, a base layer and PEFT's layer around it in different ways, and rounds where it
    fused: two of its programs cannot be held to the same bits.
    """
    if not compilations():  # importing what follows takes seconds
        yield False
        return
    import torch

    with torch.compiler.set_stance("force_eager"):
        yield True


def compilations() -> int:
    """How many graphs torch.compile has compiled in this process so far."""
    utils: Any = sys.modules.get("torch._dynamo.utils")
    return utils.counters["stats"]["unique_graphs"] if utils else 0
