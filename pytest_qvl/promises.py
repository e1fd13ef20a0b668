"""The promises that the suite proves; which checks prove each of them, the checks say themselves."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_qvl.checks.declared import declared, needing


@dataclass(frozen=True)
class Promise:
    """One line of the summary.

    Attributes:
        number: Its place in the summary, from 1; what ``@check(promise=…)`` names.
        title: What is promised.
        needs_limit: Whether it is about a limit, so that measuring alone keeps nothing.
    """

    number: int
    title: str
    needs_limit: bool = False

    @property
    def checks(self) -> tuple[str, ...]:
        """Names of the check functions that prove it."""
        return tuple(each.name for each in declared().values() if each.promise == self.number)

    @property
    def on_request(self) -> tuple[str, ...]:
        """Those that a run without a certain setting does not ask for; they are not missed there."""
        return tuple(name for name in self.checks if name in needing("request"))


PROMISES = (
    Promise(1, "quantized where it should be"),
    Promise(2, "LoRA on the language backbone, whole"),
    Promise(3, "fresh or disabled adapter is neutral"),
    Promise(4, "vision stays frozen"),
    Promise(5, "features land on their placeholders"),
    Promise(6, "M-RoPE positions"),
    Promise(7, "vision and merger are stable"),
    Promise(8, "generation is stable"),
    Promise(9, "answers come from the pictures"),
    Promise(10, "training step"),
    Promise(11, "peak VRAM within its limit", needs_limit=True),
    Promise(12, "every layer computes what it is defined to"),
)


def promise_number(check: str) -> int | None:
    """Number of the promise that a check proves; ``None`` for somebody else's check."""
    found = declared().get(check)
    return None if found is None else found.promise
