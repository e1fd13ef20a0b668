"""What a process that only forecasts need not import."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def without_compiler() -> Iterator[None]:
    """``torch.compile`` gives functions back as they are.

    bitsandbytes has it compile some of its CPU kernels while it is imported, which imports torch's compiler: a third of
    all that a forecast imports, for kernels that tensors without data never run.
    """
    import torch

    def as_it_is(function: Any = None, **_: Any) -> Any:
        return function if function is not None else as_it_is

    before, torch.compile = torch.compile, as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = before
