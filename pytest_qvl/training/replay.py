"""What an optimizer's own rule does to one tensor: its step, taken once more on copies."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


class CannotReplayError(Exception):
    """The rule of an optimizer cannot be asked."""


def state_of(optimizer: Any, parameter: nn.Parameter, *, copied: bool) -> dict[str, Any] | None:
    """What an optimizer knows of a tensor (momentum, counts of steps) before a step.

    Args:
        optimizer: As Accelerate wraps it, or bare.
        parameter: One that it holds.
        copied: Whether a state that is there is copied, which takes its size in memory until the step is judged.

    Returns:
        A copy; empty before the tensor's first step; None where there is a state and it is not copied.
    """
    import torch

    state = getattr(_bare(optimizer), "state", {}).get(parameter)
    if not state:
        return {}
    if not copied:
        return None
    return {
        key: value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
        for key, value in state.items()
    }


def rule_stands_still(optimizer: Any, parameter: nn.Parameter, state: dict[str, Any]) -> bool:
    """Whether the rule of an optimizer leaves every bit of a tensor as it is.

    A second optimizer of the same class and settings, with the state that the first one had before the step, is given
    a copy of the tensor, which stood still, and its gradient: exactly what the first was given, so that exactly what
    the first should have done comes out, rounding included.

    Args:
        optimizer: As Accelerate wraps it, or bare.
        parameter: The tensor, with its gradient, after a step that did not move it.
        state: Of :func:`state_of`, before that step.

    Raises:
        CannotReplayError: The optimizer does not hold the tensor, or its class takes other arguments than its groups.
    """
    import torch

    value = parameter.detach()
    return torch.equal(_step(optimizer, parameter, value, state), value)


def rule_takes_no_step(optimizer: Any, parameter: nn.Parameter, state: dict[str, Any]) -> bool:
    """Whether the rule of an optimizer does not even move zeros, which hide no step; see :func:`rule_stands_still`."""
    import torch

    return not _step(optimizer, parameter, torch.zeros_like(parameter.detach()), state).any()


def _step(optimizer: Any, parameter: nn.Parameter, value: Any, state: dict[str, Any]) -> Any:
    import torch

    bare = _bare(optimizer)
    group = next((g for g in bare.param_groups if any(p is parameter for p in g["params"])), None)
    if group is None or parameter.grad is None:
        raise CannotReplayError("the optimizer does not hold it")
    probe = torch.nn.Parameter(value.clone())
    probe.grad = parameter.grad.detach().to(value.dtype, copy=True)
    taken = inspect.signature(type(bare)).parameters
    try:
        second = type(bare)([probe], **{key: group[key] for key in group if key in taken and key != "params"})
        if state:
            second.state[probe] = copy.deepcopy(state)
        second.step()
    except Exception as error:
        raise CannotReplayError(
            f"{type(bare).__name__} cannot be made a second time: {type(error).__name__}"
        ) from error
    return probe.detach()


def _bare(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)
