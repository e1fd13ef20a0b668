"""Chunks of an attention that are alike: some run, and what the others would have done to memory is written down.

A vision tower attends within each image or window by itself: it splits queries, keys and values, attends chunk by
chunk, and joins the results. A large image has hundreds of windows in every block, nearly all of one length. Of every
length the first chunk and the last run, and are asked to do the same to memory. When one of them is done, the events of
those between it and the next are written down after it, in forward as the first of their length did them and in
backward, which comes from the end, as the last did. What is freed after the attention (results once they are joined,
gradients once they are) is freed of all chunks at once. Nothing is estimated: the trace is the one that all chunks
would have made.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pytest_qvl.vram.forecast.engine.repeats import NotRepeatingError, missing_after
from pytest_qvl.vram.forecast.engine.trace import ALLOC, FREE, Event, is_own, over_within

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import nn

    from pytest_qvl.vram.forecast.engine.trace import AllocationTrace

# Code; whether it is of the chunk's forward; which of its allocations; bytes; kind.
_Step = tuple[int, bool, int, int, int]


class _StandIn(NamedTuple):
    """The chunk that stands for those of its length in one direction.

    Attributes:
        position: Which chunk.
        steps: What it did.
        same: Of each step the event, where other chunks have the very same: of allocations that are over before it is.
    """

    position: int
    steps: list[_Step]
    same: list[Event | None]


class Chunks:
    """Attentions that are shortened while they run.

    Args:
        trace: Gives the trace of the present run.

    Attributes:
        attention: The attention whose forward runs now; ``None`` outside of those that are shortened.
    """

    def __init__(self, trace: Callable[[], AllocationTrace]) -> None:
        self._trace = trace
        self.attention: Attention | None = None
        self._last: dict[nn.Module, Attention] = {}

    @contextmanager
    def shortened(self, attentions: Iterable[nn.Module]) -> Iterator[None]:
        """Inside, the attentions run some of their chunks.

        Raises:
            NotRepeatingError: What a chunk did cannot be written down for the others.
        """

        def begins(module: nn.Module, _: Any) -> None:
            self.attention = self._last[module] = Attention(self._trace(), lambda: self._last[module])

        def returns(*_: Any) -> None:
            attention = self.attention
            if attention is not None and attention.is_shortened and not attention.is_joined:
                raise NotRepeatingError("an attention does not join its chunks")

        def ends(*_: Any) -> None:
            self.attention = None

        handles = [
            handle
            for module in attentions
            for handle in (
                module.register_forward_pre_hook(begins),
                module.register_forward_hook(returns),
                module.register_forward_hook(ends, always_call=True),
            )
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._last.clear()


class Attention:
    """One call of an attention, its backward included.

    Args:
        trace: Where chunks that do not run are written down.
        last: The last call of the same attention: where it was checkpointed, the one whose tensors backward uses.

    Attributes:
        runs: Positions of the chunks that run.
        is_joined: Whether their results were joined.
    """

    def __init__(self, trace: AllocationTrace, last: Callable[[], Attention]) -> None:
        self._trace, self._last = trace, last
        self._lengths: tuple[int, ...] = ()
        self.runs: tuple[int, ...] = ()
        self.is_joined = False
        self._next = 0
        # The chunk that is running: whether backward, where it stands, how many events there were when it began.
        self._running: tuple[bool, int, int] | None = None
        # By direction and position, and by direction and length.
        self._numbers: dict[tuple[bool, int], list[int]] = {}
        self._stands_for: dict[tuple[bool, int], _StandIn] = {}

    @property
    def is_shortened(self) -> bool:
        """Whether it has chunks that do not run."""
        return len(self.runs) < len(self._lengths)

    def split(self, tensor: torch.Tensor, lengths: Sequence[int], dim: int) -> tuple[torch.Tensor, ...]:
        """The chunks of a tensor that run."""
        if not self._lengths:
            self._lengths = tuple(lengths)
            self.runs = chosen(self._lengths)
        if not self.is_shortened:
            return torch.split(tensor, list(lengths), dim)
        if tuple(lengths) != self._lengths:
            raise NotRepeatingError("queries and keys are not split alike")
        return _Split.apply(self, tensor, dim)  # type: ignore[no-any-return, no-untyped-call]

    def begins(self) -> None:
        """The next chunk is about to attend."""
        if self.is_shortened:
            self.ends()
            if self._next == len(self.runs):
                raise NotRepeatingError("an attention attends more often than it has chunks")
            self._begin(False, self.runs[self._next])
            self._next += 1

    def joined(self, results: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        """What all chunks' results make."""
        if not self.is_shortened:
            return torch.cat(list(results), dim)
        self.ends()
        if not self._next == len(results) == len(self.runs):
            raise NotRepeatingError("an attention joins something else than its chunks")
        self.is_joined = True
        for position, result in zip(self.runs, results, strict=True):
            if result.requires_grad:
                result.register_hook(partial(self._backward_begins, position))  # type: ignore[no-untyped-call]
        return _Join.apply(self, dim, *results)  # type: ignore[no-any-return, no-untyped-call]

    def spans(self) -> Iterator[tuple[int, int]]:
        """Where the chunks that run begin, and their lengths."""
        starts = list(accumulate(self._lengths, initial=0))
        return ((starts[position], self._lengths[position]) for position in self.runs)

    def all_of(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One tensor for each chunk, those of chunks that run in the places of the others."""
        of = {self._lengths[position]: tensor for position, tensor in zip(self.runs, tensors, strict=True)}
        return [of[length] for length in self._lengths]

    def _backward_begins(self, position: int, _: torch.Tensor) -> None:
        self.ends()
        self._begin(True, position)

    def _begin(self, backward: bool, position: int) -> None:
        if self._trace.twins is None:
            raise NotRepeatingError("an attention begins within another one's chunk")
        self._running = (backward, position, len(self._trace.events))
        self._twins, self._trace.twins = self._trace.twins, None

    def ends(self) -> None:
        """The chunk that was running is done: those between it and the next one that runs are written down."""
        if self._running is None:
            return
        backward, position, start = self._running
        self._running, self._trace.twins = None, self._twins
        events = self._trace.events[start:]
        for code, number, _, _ in events:
            if code == FREE:
                self._twins.pop(number, None)
        self._numbers[backward, position] = [event[1] for event in events if is_own(event)]
        key = backward, self._lengths[position]
        own, steps = self._steps(backward, position, events)
        if key not in self._stands_for:
            over = over_within(events)
            same = [event if event[1] in over else None for event in own]
            self._stands_for[key] = _StandIn(position, steps, same)
            others = [event for event in events if event not in own and event[0] != ALLOC]
            if others and self._lengths.count(key[1]) > 2:
                raise NotRepeatingError("a chunk changes what is not its own")
        elif self._stands_for[key].steps != steps:
            raise NotRepeatingError("chunks of one length do different things")
        for missing in missing_after(self.runs, position, backward):
            self._write(backward, missing)

    def _steps(self, backward: bool, position: int, events: list[Event]) -> tuple[list[Event], list[_Step]]:
        """What a chunk did with its own allocations: as events, and apart from which chunk it is."""
        of = {number: (True, nth) for nth, number in enumerate(self._last()._numbers[False, position])}
        of |= {number: (not backward, nth) for nth, number in enumerate(self._numbers[backward, position])}
        own = [event for event in events if event[1] in of and event[0] in (ALLOC, FREE)]
        return own, [(code, *of[number], size, kind) for code, number, size, kind in own]

    def _write(self, backward: bool, position: int) -> None:
        stand_in = self._stands_for[backward, self._lengths[position]]
        of_stand_in = self._numbers[backward, stand_in.position]
        self._numbers[backward, position] = numbers = list(of_stand_in)
        forward = self._last()._numbers[False, position]
        for same, (code, is_forward, nth, size, kind) in zip(stand_in.same, stand_in.steps, strict=True):
            if same is None and code == ALLOC:
                numbers[nth] = self._trace.reserve()
                self._twins.setdefault(of_stand_in[nth], []).append(numbers[nth])
            number = (forward if is_forward else numbers)[nth]
            self._trace.events.append(same or (code, number, size, kind))


class _Split(torch.autograd.Function):
    """Into the chunks that run; the gradients of all are joined."""

    @staticmethod
    def forward(ctx: Any, attention: Attention, tensor: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
        ctx.attention, ctx.dim = attention, dim
        return tuple(tensor.narrow(dim, start, length) for start, length in attention.spans())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        ctx.attention.ends()
        return None, torch.cat(ctx.attention.all_of(gradients), ctx.dim), None


class _Join(torch.autograd.Function):
    """The results of all chunks, from those that run."""

    @staticmethod
    def forward(ctx: Any, attention: Attention, dim: int, *results: torch.Tensor) -> torch.Tensor:
        ctx.spans, ctx.dim = tuple(attention.spans()), dim
        return torch.cat(attention.all_of(results), dim)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        return None, None, *(gradient.narrow(ctx.dim, start, length) for start, length in ctx.spans)


def chosen(lengths: Sequence[int]) -> tuple[int, ...]:
    """Positions of the chunks that run: the first and the last of every length."""
    first = {length: position for position, length in reversed(list(enumerate(lengths)))}
    last = {length: position for position, length in enumerate(lengths)}
    return tuple(sorted({*first.values(), *last.values()}))
