"""The logits that the whole model returns: those of its head, whatever hooks and wrappers are around it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.bitwise import bits_of
from pytest_qvl.checks.support.head_replay import core_serving

if TYPE_CHECKING:
    import torch

    from pytest_qvl.checks.support.layers.flow import Call, Flow
    from pytest_qvl.checks.support.layers.tally import Tally
    from pytest_qvl.models.anatomy import Parts

OPERATION = "logits of the model"


class Returned:
    """Holds what the model returns to what its head made, every bit of it.

    A cast to another dtype is the only thing that Transformers may do in between (4.4x: to float32), and the
    head is given only the tokens that are asked for. Hooks on the model or on a wrapper around it come behind the head,
    where no other judge of a layer looks.

    Args:
        parts: The model.
        tally: Where findings go.
        flow: What modules are given and make.
    """

    def __init__(self, parts: Parts, tally: Tally, flow: Flow) -> None:
        self._parts, self._tally, self._flow = parts, tally, flow
        self._core: Any = None
        self._made: torch.Tensor | None = None

    def watch(self) -> None:
        """Put hooks on the model, its wrapper, its core and its head; behind those that are there."""
        for module in dict.fromkeys((self._parts.base, self._parts.wrapped)):
            self._flow.watch(module, partial(self._judge, "the model" if module is self._parts.base else "its wrapper"))
        self._flow.watch(self._parts.core, self._keep)
        self._flow.before(self._parts.base, self._begin)
        self._flow.watch(self._parts.lm_head, self._note)

    def call_again(self, inputs: dict[str, Any]) -> None:
        """Call the model as it is wrapped, in the mode that it is in now, from what its core returned last: the head.

        ``generate`` goes past hooks of a ``PeftModel``.
        """
        if self._core is None:
            self._tally.leave_out("the model's forward does not call its core", OPERATION)
            return
        wrapped: Any = self._parts.wrapped
        with core_serving(self._parts, self._core):
            wrapped(**inputs, use_cache=False, logits_to_keep=1)
        self._core = self._made = None

    def _begin(self, _args: Any, _kwargs: Any) -> None:
        self._made = None

    def _note(self, call: Call) -> None:
        # A copy, of one token a row: a hook may write into the head's own tensor.
        self._made = call.made.clone()

    def _keep(self, call: Call) -> None:
        self._core = call.output
        self._flow.forget((call.module,))

    def _judge(self, what: str, call: Call) -> None:
        import torch

        got = call.output[0] if isinstance(call.output, tuple) else getattr(call.output, "logits", None)
        self._flow.forget((call.module,))
        if not isinstance(got, torch.Tensor) or self._made is None:
            self._tally.leave_out("the model returns no logits of a head that it calls", OPERATION)
            return
        got, expected = bits_of(got.detach()), bits_of(self._made.to(got))
        mode = "train" if self._parts.base.training else "eval"
        words = (
            f"{what} does not return the logits of its head in {mode} mode: a hook or a patch behind it changes them"
        )
        self._tally.same(OPERATION, self._parts.roots["lm_head"], got, expected, words)
