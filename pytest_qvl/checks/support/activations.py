"""How large activations grow, module by module, and where they stop being finite."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch
    from torch import nn

    from pytest_qvl.models.anatomy import Parts


@dataclass(frozen=True)
class Peak:
    """The largest magnitude that a module put out.

    Attributes:
        module: Dotted name in the base model.
        value: Largest absolute value over all calls; NaN or infinite if any element was.
        dtype_max: Largest finite number of the output's dtype.
    """

    module: str
    value: float
    dtype_max: float

    @property
    def finite(self) -> bool:
        """Whether every element was finite."""
        return math.isfinite(self.value)


@dataclass
class Peaks:
    """What :func:`watched` saw; :meth:`listed` brings it to the host in one transfer."""

    _seen: dict[str, torch.Tensor] = field(default_factory=dict)
    _limits: dict[str, float] = field(default_factory=dict)

    def note(self, name: str, output: torch.Tensor) -> None:
        """Take one output into account (two reductions on its device, no copy of it)."""
        import torch

        low, high = torch.aminmax(output.detach())
        peak = torch.maximum(-low, high).float()
        self._seen[name] = torch.maximum(self._seen[name], peak) if name in self._seen else peak
        self._limits[name] = torch.finfo(output.dtype).max

    def listed(self) -> list[Peak]:
        """One entry per module, in the order of their first call."""
        import torch

        if not self._seen:
            return []
        values = torch.stack(list(self._seen.values())).tolist()
        return [Peak(name, value, self._limits[name]) for name, value in zip(self._seen, values, strict=True)]


def leaves(root: nn.Module) -> list[nn.Module]:
    """The modules of a tree that have no children: the ones that compute."""
    return [module for module in root.modules() if next(module.children(), None) is None]


@contextmanager
def watched(parts: Parts, modules: Iterable[nn.Module]) -> Iterator[Peaks]:
    """Record peak outputs of `modules` of the base model inside the block, passing over what is no tensor."""
    names = {id(module): name for name, module in parts.base.named_modules()}
    peaks = Peaks()

    def after(module: nn.Module, _args: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if hasattr(tensor, "is_floating_point") and tensor.is_floating_point() and tensor.numel():
            peaks.note(names[id(module)], tensor)

    handles = [module.register_forward_hook(after) for module in modules]
    try:
        yield peaks
    finally:
        for handle in handles:
            handle.remove()


def first_not_finite(peaks: Peaks) -> Peak | None:
    """The first module in call order whose output was not finite: where an overflow began."""
    return next((peak for peak in peaks.listed() if not peak.finite), None)


@contextmanager
def outputs(modules: Iterable[nn.Module | None]) -> Iterator[list[torch.Tensor]]:
    """What modules put out inside the block, one after the other; of several tensors the first."""
    found: list[torch.Tensor] = []

    def note(_module: Any, _args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [module.register_forward_hook(note) for module in modules if module is not None]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
