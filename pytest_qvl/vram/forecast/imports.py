"""What a process that only forecasts need not import.

A third of what Transformers, PEFT and bitsandbytes import is for what no forecast does: compile, shard over processes,
match detected objects. Each of them does without where it is not there.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

# For losses of detectors and for assisted generation; optional in Transformers.
_UNUSED = ("scipy", "sklearn")
_COMPILER = "torch._dynamo"
# What Transformers' masks and torch's checkpoint use of it, and what needs nothing else of it.
_WITHOUT_THE_REST = ("config", "_trace_wrapped_higher_order_op")


@contextmanager
def only_what_runs() -> Iterator[None]:
    """Libraries imported inside find neither a compiler nor processes to shard over, nor what is optional.

    What they found stays so for the life of the process: only for one that does nothing but forecast.
    """
    import torch

    compiles, available = torch.compile, torch.distributed.is_available
    blocked = [name for name in _UNUSED if name not in sys.modules]
    _put_off_compiler()
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


class _PutOff(ModuleType):
    """torch's compiler before anybody needs it.

    Functions are marked for it all over torch and Transformers, checkpoints and optimizers among them; a mark imports
    nothing here. Whatever else is asked of it, a submodule too, imports it.
    """

    disable = assume_constant_result = allow_in_graph = staticmethod(_as_it_is)

    @staticmethod
    def graph_break(*_: Any, **__: Any) -> None:
        """Nothing: there is no graph."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        assert spec is not None
        assert spec.loader is not None
        if name.startswith("__") and name != "__path__":
            raise AttributeError(f"module {_COMPILER!r} has no attribute {name!r}")
        self.__path__ = spec.submodule_search_locations or []
        self.__class__ = ModuleType  # type: ignore[assignment]
        spec.loader.exec_module(self)
        return getattr(self, name)


def _put_off_compiler() -> None:
    import torch

    spec = find_spec(_COMPILER)
    if _COMPILER in sys.modules or spec is None:
        return
    module: Any = module_from_spec(spec)
    sys.modules[_COMPILER] = torch._dynamo = module
    for name in _WITHOUT_THE_REST:
        import_module(f"{_COMPILER}.{name}")
    module.__class__ = _PutOff
    del module.__path__  # asked for by the import of any other submodule
