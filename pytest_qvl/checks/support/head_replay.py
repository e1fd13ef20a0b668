"""The head and the loss of a model over hidden states that were computed once: many losses for one forward."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.placeholders import model_inputs
from pytest_qvl.checks.support.teaching import forward
from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.attributes import attributes_replaced

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from pytest_qvl.checks.support.teaching import Batch
    from pytest_qvl.models.anatomy import Parts


class HeadReplay:
    """Calls the whole model as it is wrapped, with what its core (backbone and tower) returned in one forward.

    Everything behind the core is the model's own: logits, loss, wrappers, hooks.

    Args:
        parts: The model, in the mode that it is to be judged in.
        batch: Model inputs, with labels or without.
        recorded: What the core returned in a forward with them, see :func:`core_recorded`; one is run if not given.

    Raises:
        CannotJudge: The forward does not call its core.
    """

    def __init__(self, parts: Parts, batch: Batch, recorded: Sequence[Any] | None = None) -> None:
        import torch

        self._parts = parts
        self._batch = batch
        if recorded is None:
            inputs: Any = {name: value for name, value in batch.items() if name != "labels"} | {"logits_to_keep": 1}
            with torch.no_grad(), core_recorded(parts) as outputs:
                forward(parts, inputs)
            recorded = outputs
        if not recorded:
            raise CannotJudge("the model's forward does not call its core, so its loss cannot be looked at by itself")
        self._recorded = recorded[-1]

    def leaf(self) -> torch.Tensor:
        """The recorded hidden states, ``(rows, length, width)``, as a leaf that takes gradients."""
        found: torch.Tensor = self._recorded[0].detach().requires_grad_()
        return found

    @contextmanager
    def serving(self, hidden: torch.Tensor | None = None) -> Iterator[None]:
        """Let every call of the model in the block begin behind the core.

        Args:
            hidden: Hidden states in place of the recorded ones, of their shape.
        """
        output = self._recorded if hidden is None else _with_hidden(self._recorded, hidden)
        with core_serving(self._parts, output):
            yield

    def __call__(self, labels: torch.Tensor | None, *, hidden: torch.Tensor | None = None, **extra: Any) -> Any:
        """The model's output for other labels, ``(rows, length)``; ``extra`` goes to its forward."""
        given = {} if labels is None else {"labels": labels}
        with self.serving(hidden):
            return self._parts.wrapped(**model_inputs(self._batch), **given, use_cache=False, **extra)


@contextmanager
def core_serving(parts: Parts, output: Any) -> Iterator[None]:
    """Let every call of the model in the block begin behind the core, with what that is to have returned."""
    with attributes_replaced([(parts.core, "forward", lambda *_args, **_kwargs: output)]):
        yield


def _with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    return type(output)(**{**output, "last_hidden_state": hidden})


@contextmanager
def core_recorded(parts: Parts) -> Iterator[list[Any]]:
    """Record what the core returns inside the block, hidden states detached: the last call's output, if any."""
    outputs: list[Any] = []
    own = parts.core.forward

    def recording(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        outputs[:] = [_with_hidden(output, output[0].detach())]
        return output

    with attributes_replaced([(parts.core, "forward", recording)]):
        yield outputs
