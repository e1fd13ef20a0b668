"""Which healthy variation runs under which setting, and which process takes the next one."""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from functools import partial
from threading import Condition
from typing import TYPE_CHECKING

from pytest_qvl.faults.matrix.healthy import DEFAULT, DTYPES, KNOWLEDGE, variations

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pytest_qvl.faults.matrix.healthy import Variation
    from pytest_qvl.faults.matrix.isa import Cpu, Setting

# How many variations a setting gets against others. Two threads keep two cores busy, are hardly faster, and change the
# order of additions only; torch's kernels without vectors take twice as long, and next to no CPU in use needs them.
SINGLE_THREAD, WITHOUT_VECTORS, SEVERAL_THREADS = 12, 1, 1
SLOWDOWN = {"default": 2.0}  # value of ATEN_CPU_CAPABILITY to time, against kernels with vectors
START = 8  # imports, loading and references of a process take as long as about so many variations


def spread(count: int, settings: Sequence[Setting], model: str = DEFAULT) -> dict[Setting, list[int]]:
    """The numbers of the variations that each setting gets; always the same ones.

    Kinds of variations recur with small periods, so they are shuffled: in order, a setting would never meet some of
    them. Every setting gets at least one, and one that needs the model's knowledge and one of each dtype, as far as
    they go.
    """
    left = variations(count, model)
    random.Random(0).shuffle(left)
    found: dict[Setting, list[int]] = {setting: [] for setting in settings}
    sizes = _sizes(count, settings)
    kinds: list[Callable[[Variation], bool]] = [_needs_knowledge]
    kinds += [partial(_has_dtype, dtype) for dtype in dict.fromkeys(DTYPES)]
    for wanted in kinds:
        for setting in settings:
            place = next((place for place, one in enumerate(left) if wanted(one)), None)
            if place is not None and len(found[setting]) < sizes[setting]:
                found[setting].append(left.pop(place).number)
    for setting in settings:
        found[setting] += [left.pop().number for _ in range(sizes[setting] - len(found[setting]))]
    return found


def offered_only(left: Mapping[Setting, Sequence[int]], cpu: Cpu) -> dict[Setting, list[int]]:
    """What is left of settings that the CPU does not offer goes to those it does, as :func:`spread` shares out."""
    found = {setting: list(numbers) for setting, numbers in left.items() if not setting.lacks(cpu)}
    others = [number for setting, numbers in left.items() if setting not in found for number in numbers]
    sizes = _sizes(len(others), list(found))
    for setting, size in sizes.items():
        found[setting] += [others.pop() for _ in range(size)]
    return found


def _needs_knowledge(variation: Variation) -> bool:
    return KNOWLEDGE[0] in variation.checks


def _has_dtype(dtype: str, variation: Variation) -> bool:
    return variation.dtype == dtype


def _sizes(count: int, settings: Sequence[Setting]) -> dict[Setting, int]:
    if not settings:
        return {}
    single = min(count, len(settings))
    weights = [_weight(setting) for setting in settings]
    bounds = [(count - single) * sum(weights[:place]) // sum(weights) for place in range(len(weights) + 1)]
    return {setting: bounds[place + 1] - bounds[place] + (place < single) for place, setting in enumerate(settings)}


def _weight(setting: Setting) -> int:
    if setting.threads > 1:
        return SEVERAL_THREADS
    return WITHOUT_VECTORS if setting.aten in SLOWDOWN else SINGLE_THREAD


def expected_cost(variation: Variation) -> float:
    """About how long its checks take, against those of a short one; torch's CPU kernels for float16 are slow."""
    slow = 3.0 if variation.eager and variation.dtype == "float16" else 1.0
    return slow * (1.0 + 3.0 * _needs_knowledge(variation) + 1.0 * ("training_step" in variation.checks))


class Schedule:
    """Hands variations to processes, one at a time; used by several threads.

    Settings with more threads come first, then those with the most work left, and the longest variations of each
    setting, so that short ones are left at the end and fill it up. A setting is shared by several processes only where
    what is left of it is worth their start.

    Args:
        waiting: Numbers of the variations of each setting.
        jobs: Threads of all processes together.
        deadline: Hand out nothing after this, a ``time.monotonic()``.
        model: That the variations are of.
    """

    def __init__(
        self,
        waiting: Mapping[Setting, Sequence[int]],
        jobs: int,
        deadline: float | None = None,
        model: str = DEFAULT,
    ) -> None:
        highest = max((max(numbers, default=-1) for numbers in waiting.values()), default=-1)
        costs = [expected_cost(variation) for variation in variations(highest + 1, model)]
        self._waiting = {s: deque(sorted(numbers, key=lambda n: -costs[n])) for s, numbers in waiting.items()}
        self._jobs = self._free = jobs
        self._deadline = deadline
        self._processes: Counter[Setting] = Counter()
        self._changed = Condition()

    def begin(self) -> Setting | None:
        """Wait until a process may start and return the setting it is for; ``None`` if no more processes are needed."""
        with self._changed:
            while not self._over() and any(self._waiting.values()):
                setting = self._next()
                if setting is not None:
                    self._processes[setting] += 1
                    self._free -= self._slots(setting)
                    return setting
                self._changed.wait()
        return None

    def number(self, setting: Setting) -> int | None:
        """The next variation for a process of this setting, or ``None`` if it should end."""
        with self._changed:
            waiting = self._waiting[setting]
            return None if self._over() or not waiting else waiting.popleft()

    def end(self, setting: Setting, *, broken: bool = False) -> None:
        """Note that a process has ended; if it broke, its setting gets no other process."""
        with self._changed:
            self._processes[setting] -= 1
            self._free += self._slots(setting)
            if broken:
                self._waiting[setting].clear()
            self._changed.notify_all()

    def _over(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _slots(self, setting: Setting) -> int:
        return min(setting.threads, self._jobs)

    def _next(self) -> Setting | None:
        possible = [s for s in self._waiting if self._slots(s) <= self._free and self._worth_a_start(s)]
        return max(possible, key=lambda s: (s.threads, self._left(s) * SLOWDOWN.get(s.aten, 1.0)), default=None)

    def _worth_a_start(self, setting: Setting) -> bool:
        return bool(self._waiting[setting]) and (not self._processes[setting] or self._left(setting) >= START)

    def _left(self, setting: Setting) -> float:
        """Variations left for each process of a setting, if there were one process more."""
        return len(self._waiting[setting]) / (self._processes[setting] + 1)
