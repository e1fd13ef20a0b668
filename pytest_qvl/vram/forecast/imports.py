"""What a process that only forecasts need not import.

Much of what Transformers, PEFT and bitsandbytes import is for what no forecast does: compile, shard over processes,
match detected objects. Each of them does without where it is not there.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

# For losses of detectors and for assisted generation; optional in Transformers.
_UNUSED = ("scipy", "sklearn")


@contextmanager
def only_what_runs() -> Iterator[None]:
    """Libraries imported inside compile nothing, and find no processes to shard over, nor what is optional.

    What they found stays so for the life of the process: only for one that does nothing but forecast.
    """
    import torch

    compiles, available = torch.compile, torch.distributed.is_available
    blocked = [name for name in _UNUSED if name not in sys.modules]
    torch.compile = _as_it_is  # type: ignore[assignment]
    torch.distributed.is_available = lambda: False
    sys.modules.update(dict.fromkeys(blocked))  # type: ignore[arg-type]  # None: not to be imported
    try:
        yield
    finally:
        torch.compile, torch.distributed.is_available = compiles, available
        for name in blocked:
            del sys.modules[name]


def _as_it_is(function: Any = None, *_: Any, **__: Any) -> Any:
    """Of a decorator that is about compiling: the function itself, or a decorator that gives it back."""
    return function if function is not None else _as_it_is
