"""Layers that do not run, and what they would have done to memory, written down after one that did.

In a window of a run (an inference pass, a training step) each tower calls only some of its layers (:mod:`.towers`), and
the others hand on what they are given. Marks on the trace tell which layer's forward or backward begins. When the
window ends, the events of the layer that stands for a missing one are written down once more in the missing one's
place: its own allocations get numbers of their own (but for those that are over before the layer is, which have the
same), and what belongs to a neighbour is taken from the missing layer's neighbour. Nothing is estimated: the trace is
the one that all layers would have made. Where that cannot be shown (a layer frees what is neither its own nor a
neighbour's), :class:`NotRepeatingError` says so and all layers run.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from pytest_qvl.vram.forecast.engine.dataless import DatalessTensor, Storage
from pytest_qvl.vram.forecast.engine.trace import ALLOC, FREE, RELABEL, is_own, over_within, without_collector

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_qvl.vram.forecast.engine.recorder import Recorder
    from pytest_qvl.vram.forecast.engine.towers import Tower
    from pytest_qvl.vram.forecast.engine.trace import Event


class NotRepeatingError(Exception):
    """What a layer does to memory cannot be written down for another one."""


class Segment(NamedTuple):
    """What happened from where a layer begins to where the next one does.

    Attributes:
        tower: Which tower.
        backward: Whether it is the layer's backward.
        run: Which call of the tower.
        layer: The layer's index.
    """

    tower: int
    backward: bool
    run: int
    layer: int


class _HandsOn(nn.Module):
    """In the place of a layer that does not run."""

    def __init__(self, layer: nn.Module, tower: _ShortTower) -> None:
        super().__init__()
        # Not as modules of this one.
        self.__dict__.update(layer=layer, tower=tower)

    def __getattr__(self, name: str) -> Any:
        """What a tower asks its layers for (Transformers 4: ``attention_type``) is the layer's."""
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden: Any, *_: Any, **__: Any) -> Any:
        """What it was given, as the others return it."""
        return (hidden,) if self.__dict__["tower"].in_tuples else hidden


class _ShortTower:
    """One tower that calls only some of its layers, and marks where they begin.

    Attributes:
        in_tuples: Whether this release's layers return their result in a tuple.
    """

    def __init__(self, index: int, tower: Tower, repeats: Repeats) -> None:
        self.in_tuples = False
        self._index, self._tower, self._repeats = index, tower, repeats
        self._run = -1
        self._missing = {str(layer): tower.layers[layer] for found in tower.stands_for.values() for layer in found}

    def hooks(self) -> Iterator[Any]:
        """Put on the tower what leaves layers out and what marks the others; yields handles."""
        owner, layers = self._tower.owner, self._tower.layers
        hand_on = {name: _HandsOn(layer, self) for name, layer in self._missing.items()}

        def leave_out(*_: Any) -> None:
            self._run += 1
            self._repeats.mark(None)
            layers._modules.update(hand_on)

        def put_back(*_: Any) -> None:
            layers._modules.update(self._missing)
            self._repeats.mark(None)

        def returned(_: Any, __: Any, out: Any) -> None:
            self.in_tuples = isinstance(out, tuple)

        yield owner.register_forward_pre_hook(leave_out)
        yield owner.register_forward_hook(put_back, always_call=True)
        yield layers[0].register_forward_hook(returned)
        before = None
        for index in self._tower.runs:
            yield layers[index].register_forward_pre_hook(self._begins(index, before))
            before = index

    def _begins(self, layer: int, before: int | None) -> Any:
        """A hook that marks the layer's forward, and the backward of the one before it."""

        def begins(_: Any, args: Any) -> None:
            if torch._C._current_graph_task_id() != -1:
                return  # recomputed within its backward
            run, hidden = self._run, args[0]
            self._repeats.mark(Segment(self._index, False, run, layer))
            if before is not None and hidden.requires_grad:
                hidden.register_hook(lambda _: self._repeats.mark(Segment(self._index, True, run, before)))

        return begins


class Repeats:
    """Towers that are shortened while a window of a run is recorded.

    Args:
        towers: Which layers of which towers run.
        recorder: Follows the run.
    """

    def __init__(self, towers: list[Tower], recorder: Recorder) -> None:
        self._towers, self._recorder = towers, recorder
        self._start = 0
        self._marks: list[tuple[int, Segment | None]] = []
        self._gradients: dict[tuple[int, int, int], int] = {}

    @contextmanager
    def shortened(self) -> Iterator[None]:
        """Run inside with fewer layers, and have the trace as of all of them at the end.

        Raises:
            NotRepeatingError: What a layer did cannot be written down for the others.
        """
        self._begin()
        handles = [hook for index, tower in enumerate(self._towers) for hook in _ShortTower(index, tower, self).hooks()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self.complete()

    def mark(self, segment: Segment | None) -> None:
        """From here on it is ``segment``; ``None`` for what is no layer's."""
        self._marks.append((len(self._recorder.trace.events), segment))

    def fill_gradients(self) -> None:
        """Parameters of layers that did not run get the gradients that they would have."""
        for index, tower in enumerate(self._towers):
            for stand_in, missing in tower.stands_for.items():
                own = [(name, p.grad) for name, p in tower.layers[stand_in].named_parameters() if p.grad is not None]
                for layer in missing:
                    parameters = dict(tower.layers[layer].named_parameters())
                    for name, grad in own:
                        parameters[name].grad = self._gradient(index, layer, grad)

    def _gradient(self, tower: int, layer: int, like: Any) -> DatalessTensor:
        key = (tower, layer, like.storage_.number)
        if key in self._gradients:
            raise NotRepeatingError("two gradients have one storage")
        storage = Storage(like.storage_.nbytes)
        self._gradients[key] = self._recorder.follow_reserved(storage)
        return DatalessTensor(like.layout_, like.offset, storage)

    def complete(self) -> None:
        """Write down what the layers that did not run would have done since the window began; begin another one.

        Raises:
            NotRepeatingError: It cannot be.
        """
        if self._marks:
            writing = _Writing(self._towers, self._recorder, self._gradients)
            with without_collector():
                writing.write(list(_segments(self._recorder.trace.events, self._start, self._marks)))
            self._recorder.trace.events[self._start :] = writing.events
        self._begin()

    def _begin(self) -> None:
        self._start = len(self._recorder.trace.events)
        self._marks, self._gradients = [], {}


def _segments(
    events: list[Event], start: int, marks: list[tuple[int, Segment | None]]
) -> Iterator[tuple[Segment | None, list[Event]]]:
    """The events since ``start``, cut at the marks."""
    yield None, events[start : marks[0][0]]
    for (begin, segment), (end, _) in zip(marks, [*marks[1:], (len(events), None)], strict=True):
        yield segment, events[begin:end]


def missing_after(runs: Sequence[int], position: int, backward: bool) -> range:
    """What did not run between the one at ``position`` and the next that did, in the order of forward or backward.

    Args:
        runs: Positions of what ran, in order.
        position: One of them.
        backward: Whether the next is the one before it.
    """
    rank = runs.index(position)
    if backward:
        return range(position - 1, runs[rank - 1], -1) if rank else range(0)
    return range(position + 1, runs[rank + 1]) if rank + 1 < len(runs) else range(0)


# What an allocation is: of which segment, and the how-manieth of its allocations.
Made = tuple[Segment, int]


class _Writing:
    """The events of a window with all layers, from those with some.

    Args:
        towers: Which layers ran.
        recorder: Numbers new allocations.
        gradients: Numbers that gradients of missing layers have: by tower, layer, and the number of the gradient that
            they are like.
    """

    def __init__(self, towers: list[Tower], recorder: Recorder, gradients: dict[tuple[int, int, int], int]) -> None:
        self.events: list[Event] = []
        self._towers, self._recorder, self._gradients = towers, recorder, gradients
        self._ranks = [{layer: rank for rank, layer in enumerate(tower.runs)} for tower in towers]
        self._stand_ins = [{m: t for t, missing in tower.stands_for.items() for m in missing} for tower in towers]
        self._made: dict[int, Made] = {}
        # Of every layer's segments the numbers of their allocations, by their order; of a layer that did not run those
        # that outlive the segment.
        self._numbers: dict[Segment, dict[int, int]] = {}
        self._patterns: dict[Segment, _Pattern] = {}

    def write(self, segments: list[tuple[Segment | None, list[Event]]]) -> None:
        """Write down all layers.

        Raises:
            NotRepeatingError: A layer cannot be.
        """
        for segment, events in segments:
            if segment is not None:
                numbers = [event[1] for event in events if is_own(event)]
                self._numbers[segment] = dict(enumerate(numbers))
                self._made.update((number, (segment, nth)) for nth, number in enumerate(numbers))
        for segment, events in segments:
            if segment is not None and segment.layer in self._towers[segment.tower].stands_for:
                self._patterns[segment] = self._pattern(segment, events)
        for segment, events in segments:
            self._write_run(segment, events)
            if segment is not None:
                for layer in missing_after(self._towers[segment.tower].runs, segment.layer, segment.backward):
                    self._write_missing(segment._replace(layer=layer))
        self._check()

    def _write_run(self, segment: Segment | None, events: list[Event]) -> None:
        for event in events:
            code, number, size, kind = event
            made = self._made.get(number) if code in (FREE, RELABEL) else None
            if made is None:
                self.events.append(event)
                continue
            made_in, nth = made
            distance = self._distance(segment, made_in)
            if segment is not None and distance is not None:
                number = self._numbers[made_in._replace(layer=segment.layer + distance)][nth]
                self.events.append((code, number, size, kind))
                continue
            # Later than the layers: what is freed of one is freed of those that it stands for.
            self.events.append(event)
            for layer in self._towers[made_in.tower].stands_for.get(made_in.layer, ()):
                if (made_in.tower, layer, number) not in self._gradients:
                    self.events.append((code, self._numbers[made_in._replace(layer=layer)][nth], size, kind))

    def _pattern(self, segment: Segment, events: list[Event]) -> _Pattern:
        """What a layer did that stands for others, in terms of its own and its neighbours' allocations."""
        pattern = _Pattern()
        over = over_within(events)
        nth = -1
        for event in events:
            code, number, size, kind = event
            nth += is_own(event)
            made = self._made.get(number)
            if number in over and (code != ALLOC or is_own(event)):
                pattern.same.append(event)
            elif code == ALLOC:
                if is_own(event):
                    pattern.add(code, nth, number, size, kind)
            elif code not in (FREE, RELABEL):
                raise NotRepeatingError("a phase begins within a layer")
            elif made is not None:
                distance = self._distance(segment, made[0])
                if distance is None:
                    raise NotRepeatingError("a layer changes what belongs to one that is not beside it")
                pattern.add(code, pattern.index((made[0].backward, made[0].run, distance)), made[1], size, kind)
            elif code != FREE or not segment.backward:
                # What all layers were given goes with the last that needs it. In backward that is the lowest of those
                # that are alike, which ran, so that it is left out here.
                raise NotRepeatingError("a layer changes what is not a layer's")
        return pattern

    def _write_missing(self, segment: Segment) -> None:
        stand_in = segment._replace(layer=self._stand_ins[segment.tower][segment.layer])
        pattern = self._patterns[stand_in]
        own: dict[int, int] = {}
        self._numbers[segment] = own
        # Forward goes up and backward comes down: what a neighbour made is there when it is needed.
        of = [
            self._numbers.get(Segment(segment.tower, backward, run, segment.layer + distance), {})
            for backward, run, distance in pattern.whose
        ]
        reserve, events = self._recorder.trace.reserve, self.events
        for same, (code, place, nth, size, kind) in pattern.steps:
            events += same
            if code == ALLOC:
                gradient = self._gradients.get((segment.tower, segment.layer, nth))
                own[place] = number = reserve() if gradient is None else gradient
            elif nth in of[place]:
                number = of[place][nth]
            else:
                raise NotRepeatingError("a layer changes what its neighbour has not")
            events.append((code, number, size, kind))
        events += pattern.same

    def _distance(self, segment: Segment | None, other: Segment) -> int | None:
        """Layers that ran between two segments' of one tower, in order; ``None`` unless they are the same or next."""
        if segment is None or segment.tower != other.tower:
            return None
        ranks = self._ranks[segment.tower]
        distance = ranks[other.layer] - ranks[segment.layer]
        return distance if -1 <= distance <= 1 else None

    def _check(self) -> None:
        """Nothing of a missing layer is left that nobody will free: all is freed, or a parameter's gradient."""
        missing = {
            number
            for segment, numbers in self._numbers.items()
            if segment.layer in self._stand_ins[segment.tower]
            for number in numbers.values()
        }
        kept = set(self._gradients.values())
        if not kept <= missing:
            raise NotRepeatingError("a gradient was not made by its layer's backward")
        if not missing - {number for code, number, _, _ in self.events if code == FREE} <= kept:
            raise NotRepeatingError("a layer leaves something behind")


class _Pattern:
    """What a layer does to memory, apart from which one it is.

    Attributes:
        whose: Whose allocations it changes: of backward or forward, in which run, how many layers away.
        steps: Events that are the same for every layer, and one that is not: code; index in ``whose``, or of an
            allocation which of the layer's it is; which of its allocations, or of an allocation its number; bytes;
            kind.
        same: Events that are the same for every layer, after the last step.
    """

    def __init__(self) -> None:
        self.whose: list[tuple[bool, int, int]] = []
        self.steps: list[tuple[list[Event], tuple[int, int, int, int, int]]] = []
        self.same: list[Event] = []

    def add(self, code: int, place: int, nth: int, size: int, kind: int) -> None:
        """A step, with the events since the last one."""
        self.steps.append((self.same, (code, place, nth, size, kind)))
        self.same = []

    def index(self, whose: tuple[bool, int, int]) -> int:
        """Where ``whose`` stands, put there if it was not."""
        if whose not in self.whose:
            self.whose.append(whose)
        return self.whose.index(whose)
