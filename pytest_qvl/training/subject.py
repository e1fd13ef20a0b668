"""What is being trained: the model, what of it may move, and who moves it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import unwrapped
from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.adapters import adapter_parameters
from pytest_qvl.models.anatomy import TOWER, Parts, anatomy
from pytest_qvl.models.training import trained_copies, trained_on_purpose

if TYPE_CHECKING:
    from torch import nn

    from pytest_qvl.models.policy import AdapterPolicy


@dataclass
class Subject:
    """One training run as the callback is told of it.

    Attributes:
        parts: Of the model.
        args: ``transformers.TrainingArguments``.
        optimizer: As Accelerate wraps it.
        scheduler: Of the learning rate.
        processor: What makes the batches; None if nobody said.
        policy: What may be trained.
        allowed: Everything that may be trained by the policy, by dotted name: adapters, trained copies, own weights.
        base: Every other parameter, by dotted name.
    """

    parts: Parts
    args: Any
    optimizer: Any
    scheduler: Any
    processor: Any
    policy: AdapterPolicy
    allowed: dict[str, nn.Parameter] = field(init=False)
    base: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        """Sort the parameters."""
        parts = self.parts
        adapters = adapter_parameters(parts)
        self.allowed = {**adapters, **trained_copies(parts), **trained_on_purpose(parts, self.policy)}
        own = {id(parameter) for parameter in self.allowed.values()}
        self.base = {n: p for n, p in parts.base.named_parameters() if id(p) not in own}

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What of :attr:`allowed` requires grad, each tensor once."""
        found = {id(p): (name, p) for name, p in reversed(self.allowed.items()) if p.requires_grad}
        return dict(reversed(found.values()))

    def trained_of_base(self) -> list[str]:
        """Names of the base's own parameters that require grad although nobody allows it."""
        return [name for name, parameter in self.base.items() if parameter.requires_grad]

    def in_vision(self, name: str) -> bool:
        """Whether a tensor of this name is the vision tower's or the merger's."""
        return self.parts.group_of(name) in TOWER

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""
        return list(getattr(self.optimizer, "param_groups", None) or [])

    def group_rates(self) -> list[float]:
        """The learning rate of each parameter group that has one.

        Raises:
            CannotJudge: None has.
        """
        rates = [float(group["lr"]) for group in self.groups if group.get("lr") is not None]
        if not rates:
            raise CannotJudge("no parameter group of the optimizer has a learning rate (it may find its own)")
        return rates

    def rates(self) -> dict[int, float | None]:
        """The learning rate of each parameter that the optimizer holds, by its id; None where there is none."""
        return {
            id(p): None if group.get("lr") is None else float(group["lr"])
            for group in self.groups
            for p in group["params"]
        }


def whole_model(model: Any) -> Parts:
    """The parts of a model whose every parameter is whole in this process.

    Raises:
        CannotJudge: Parameters are sharded over processes.
        UnknownModelError: It is no Qwen-VL model.
    """
    inner = unwrapped(model)
    if any(hasattr(parameter, "ds_id") for parameter in inner.parameters()):
        raise CannotJudge("DeepSpeed keeps only a part of each parameter in this process (ZeRO stage 3)")
    if any(type(parameter).__name__ == "DTensor" for parameter in inner.parameters()):
        raise CannotJudge("each process keeps only a part of each parameter (DTensor)")
    return anatomy(inner)
