"""The base model under watch: every tensor bitwise what it was before the first step, a part of them at a time."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from pytest_qvl.checks.support.wording import some, tally
from pytest_qvl.evidence import CannotJudge, Evidence, Judge
from pytest_qvl.models.adapters import base_modules
from pytest_qvl.models.fingerprint.digests import Fingerprint, differences, digests
from pytest_qvl.models.quantized import linear_states, quant_state_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from pytest_qvl.training.subject import Subject

_MOST_PARTS = 64
_WHOLE = -1  # beside the numbers of turns
_BIAS = ".bias"
_WRAPPED = ".base_layer"  # what PEFT puts into the names of layers that it wraps


class BaseWatch:
    """Digests of the base model's tensors before training, and what they are held to afterwards.

    Whole at first and after the first step, and from then on in turns: as many tensors at a time as fit into the
    share of the training's time that the guard may take (docs/guard.md#cost), so that each comes up again after as
    many turns as there are parts.

    Biases of 4-bit layers may be cast: bitsandbytes does so in place where a layer's input has another dtype than its
    bias. Each is held to its first value under every cast there is.

    Args:
        subject: What is trained.

    Attributes:
        parts: In how many turns the whole base is read.
        seconds: What one whole read takes; 0 before the second.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._fingerprints: dict[int, Fingerprint] = {}
        self.parts, self._turn = 1, 0
        self.seconds = 0.0
        self._reads = 0
        linears = linear_states(subject.parts)
        repacked = [state.name for state in linears if state.repacked]
        self._unreadable = (
            f"{len(repacked)} quantized weights are repacked for a CPU kernel (first: {repacked[0]})"
            if repacked
            else ""
        )
        self._before: dict[str, int] = {}
        self._casts: dict[str, set[int]] = {}
        if not repacked:
            self._before = self._read(whole=True)
            biases = {f"{state.name}{_BIAS}" for state in linears if state.is_4bit}
            self._casts = _casts((name, tensor) for name, tensor in self._tensors() if name in biases)

    def plan(self, budget: float) -> None:
        """Choose the number of parts such that one takes `budget` seconds at most."""
        if self.seconds:
            self.parts = min(_MOST_PARTS, max(1, math.ceil(self.seconds / max(budget, 1e-6))))
            self._turn %= self.parts

    def judge(self, when: str, *, whole: bool) -> Evidence:
        """Hold the base, or the part of it whose turn it is, to what it was.

        Args:
            when: What has happened in between, in words.
            whole: All of it at once.

        Raises:
            CheckFailed: Names the tensors that changed.
            CannotJudge: The weights cannot be read.
        """
        if self._unreadable:
            raise CannotJudge(self._unreadable)
        now = self._read(whole=whole)
        expected = self._before if whole else {n: d for n, d in self._before.items() if n in now}
        moved = [n for n in differences(expected, now) if now.get(n) not in self._casts.get(n, ())]
        judge = Judge("base_unchanged", "training leaves the base model bitwise as it was")
        group_of = self._subject.parts.group_of
        judge.equal(
            "base tensors that changed",
            len(moved),
            0,
            else_say=f"{len(moved)} of {len(expected)} base tensors are not bitwise what they were before the first "
            f"step, {when}: {tally(map(group_of, moved))}, first {some(moved)}{self._why(moved)}",
        )
        judge.report("base tensors read", len(now))
        judge.report("turns for the whole base", self.parts)
        return judge.verdict()

    def _why(self, moved: list[str]) -> str:
        named = {name.replace(_WRAPPED, ""): parameter for name, parameter in self._subject.base.items()}
        own = [named[name] for name in moved if name in named]
        trained = [parameter for parameter in own if parameter.requires_grad]
        held = self._subject.rates()
        stepped = [parameter for parameter in own if id(parameter) in held]
        if stepped or trained:
            return (
                f"; {len(stepped)} of them are held by the optimizer and {len(trained)} require grad: freeze the base "
                "(requires_grad_(False)), or declare what is trained on purpose (policy)"
            )
        return "; none of them requires grad, so something wrote into them (a callback, a merge, a tied weight)"

    def _find(self) -> None:
        """Note where each tensor of the base is kept: walking all modules takes longer than reading on a GPU."""
        self._places = [
            (f"{name}.{key}" if name else key, table, key)
            for name, module in base_modules(self._subject.parts).items()
            for table in (module._parameters, module._buffers)
            for key in table
        ]

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What is at each place now, and the tensors of its quantization."""
        own = {id(parameter) for parameter in self._subject.allowed.values()}
        for name, table, key in self._places:
            tensor = table.get(key)
            if tensor is None or id(tensor) in own:
                continue
            yield name, tensor
            if (quant := getattr(tensor, "quant_state", None)) is not None:
                yield from quant_state_tensors(name, quant)

    def _read(self, *, whole: bool) -> dict[str, int]:
        import torch

        if whole:
            self._find()
        tensors = list(self._tensors())
        if not whole:
            tensors = tensors[self._turn :: self.parts]
        on_cuda = any(tensor.is_cuda for _, tensor in tensors[:1])
        if whole and on_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        key = _WHOLE if whole else self._turn
        found = self._fingerprints.setdefault(key, Fingerprint()).read(tensors)
        if whole:
            # The first read makes the kernel and the tables.
            self.seconds = time.perf_counter() - started if self._reads else 0.0
            self._reads += 1
        else:
            self._turn = (self._turn + 1) % self.parts
        return found


def _casts(biases: Iterable[tuple[str, torch.Tensor]]) -> dict[str, set[int]]:
    """Digests of each bias under every chain of two casts, by its name."""
    import torch

    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    made: dict[str, torch.Tensor] = {}
    for name, bias in biases:
        for first in dtypes:
            once = bias.detach().to(first)
            made |= {f"{name} {first} {second}": once.to(second) for second in dtypes}
    found: dict[str, set[int]] = {}
    for key, digest in digests(made.items()).items():
        found.setdefault(key.partition(" ")[0], set()).add(digest)
    return found
