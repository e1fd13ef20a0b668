"""What each kind of operation was measured at, where it was off and why."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from pytest_qvl.evidence import Judge
    from pytest_qvl.oracles.bounds import Claim

    Explain = Callable[[], str]
    Compare = Callable[[torch.Tensor], str]

# A result that is a multiple of what it has to be to within this is called one; in words only.
MULTIPLE = 0.02
HANDED_ON = "what modules hand on"


@dataclass
class Operation:
    """One kind of operation, over all places where it was judged.

    Attributes:
        judged: How often.
        worst: Largest error over its limit.
        failed: Places that were off, each with what is wrong there.
    """

    judged: int = 0
    worst: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)


@dataclass
class Tally:
    """Collects comparisons while a model runs; :meth:`report` gives them to a judge.

    Attributes:
        phase: When the model runs, for messages: empty at prefill.
        operations: By name, in the order of their first use.
        unjudged: What was left out, by reason.
    """

    phase: str = ""
    operations: dict[str, Operation] = field(default_factory=dict)
    unjudged: dict[str, list[str]] = field(default_factory=dict)

    def hold(self, operation: str, place: str, got: torch.Tensor, claim: Claim, explain: Explain | None = None) -> bool:
        """Hold a result to what an oracle claims, element by element; NaN fails.

        Args:
            operation: Kind of operation.
            place: Dotted name of the module.
            got: What the model computed, of the claim's shape.
            claim: What it had to.
            explain: Says what is wrong, called if anything is.
        """
        return self.hold_to_one(operation, place, got, (claim,), lambda _expected: explain() if explain else "")

    def hold_to_one(
        self, operation: str, place: str, got: torch.Tensor, claims: Iterable[Claim], explain: Compare
    ) -> bool:
        """Hold a result to several claims of which one has to be kept: those of kernels that round in other places.

        Args:
            operation: Kind of operation.
            place: Dotted name of the module.
            got: What the model computed, of the claims' shape.
            claims: What it had to, the usual kernel's first; none is computed after the first that is kept.
            explain: Says what is wrong beside the first claim's value, called if anything is.
        """
        expected, ratio = got, math.inf
        for number, claim in enumerate(claims):
            if number == 0:
                expected = claim.value
                if got.shape != expected.shape:
                    self.fail(operation, place, f"its shape is {tuple(got.shape)}, expected {tuple(expected.shape)}")
                    return False
            ratio = min(ratio, error_over_limit(got, claim))
            if ratio <= 1:
                break
        entry = self.operations.setdefault(operation, Operation())
        entry.judged += 1
        entry.worst = max(entry.worst, ratio)
        if ratio > 1 and place not in entry.failed:
            # Only the first place of an operation is told.
            words = "" if entry.failed else explain(expected) or multiple(got, expected)
            entry.failed[place] = f"{words}{self.phase}"
        return ratio <= 1

    def handed_on(self, place: str, got: torch.Tensor, expected: torch.Tensor, words: str) -> bool:
        """Hold what a module is given to be what another has made."""
        return self.same(HANDED_ON, place, got, expected, words)

    def same(self, operation: str, place: str, got: torch.Tensor, expected: torch.Tensor, words: str) -> bool:
        """Hold a tensor to be another, every bit of it, as it is where data is only handed on."""
        import torch

        entry = self.operations.setdefault(operation, Operation())
        entry.judged += 1
        # A model over several GPUs hands some tensors from one to the next.
        alike = got is expected or (got.shape == expected.shape and bool(torch.equal(got, expected.to(got.device))))
        if not alike:
            entry.worst = math.inf
            entry.failed.setdefault(place, f"{words}{self.phase}")
        return alike

    def fail(self, operation: str, place: str, words: str) -> None:
        """Note a defect that no comparison expresses."""
        entry = self.operations.setdefault(operation, Operation())
        entry.worst = math.inf
        entry.failed.setdefault(place, f"{words}{self.phase}")

    def count(self, operation: str, judged: int) -> None:
        """Note that so many places were looked at; what was wrong there is told by :meth:`fail`."""
        self.operations.setdefault(operation, Operation()).judged += judged

    def leave_out(self, reason: str, place: str) -> None:
        """Note that a place was not judged."""
        places = self.unjudged.setdefault(reason, [])
        if place not in places:
            places.append(place)

    def report(self, judge: Judge) -> None:
        """Figures, problems and notes of everything that was compared."""
        for name, operation in self.operations.items():
            places = list(operation.failed)
            more = f", and {len(places) - 1} more places" if len(places) > 1 else ""
            judge.at_most(
                f"{name}: largest error / limit",
                operation.worst,
                1.0,
                else_say=f"{name}: {places[0]} {operation.failed[places[0]]}{more}" if places else name,
            )
        judge.report("comparisons", sum(operation.judged for operation in self.operations.values()))
        for reason, places in self.unjudged.items():
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            judge.note(f"not judged: {places[0]}{more} ({reason})")


def error_over_limit(got: torch.Tensor, claim: Claim) -> float:
    """The largest error of a result over its limit; infinity for NaN, 0 for a result without elements."""
    if not got.numel():
        return 0.0
    error = (got - claim.value).abs_()  # as wide as the claim, which is float32
    largest = float((error / claim.limit).masked_fill_(error == 0, 0.0).max())
    return math.inf if math.isnan(largest) else largest


def factor(got: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """The multiple of `expected` that comes nearest to `got`, and how far it is off, relative to `got`."""
    a, b = got.detach().double().flatten(), expected.double().flatten()
    square = float(b @ b)
    times = float(a @ b) / square if square else math.nan
    size = float(a.norm())
    return times, float((a - times * b).norm()) / size if size else math.inf


def multiple(got: torch.Tensor, expected: torch.Tensor) -> str:
    """What is wrong with a result: that it is a multiple of what it has to be, or how much of it is off."""
    times, rest = factor(got, expected)
    if math.isfinite(times) and rest < MULTIPLE and abs(times - 1) > rest:
        return f"returns {times:.4g} times what it has to"
    if not bool(got.isfinite().all()):
        return "returns NaN or infinity"
    size = float(expected.double().norm()) or 1.0
    away = float((got.double() - expected.double()).norm()) / size
    return f"returns something else than it has to (off by {away:.2g} of its size)"
