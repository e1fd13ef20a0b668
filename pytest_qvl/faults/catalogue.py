"""What a fault is, and the list of all of them. Reading the list imports no torch."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from pytest_qvl.faults.sizes import EMBEDDED, Sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from pytest_qvl.faults.case import Case
    from pytest_qvl.faults.requirements import Requirement

    Damage = Callable[[Case], Iterator[None]]

FAMILIES = {
    "quantization": "quantization placement",
    "preparation": "k-bit preparation",
    "adapters": "adapter placement",
    "frozen": "frozen weights",
    "routing": "placeholders and routing",
    "slices": "placeholders and routing",
    "videos": "videos",
    "positions": "positions",
    "padding": "padding and batching",
    "attention": "vision attention",
    "images": "processor",
    "preprocessing": "image preprocessing",
    "numerics": "numerics",
    "weights": "weights against the checkpoint",
    "configuration": "values of the configuration",
    "generation": "generation",
    "as_found": "generation as found",
    "training": "training",
    "taught": "training",
    "collators": "training collator",
    "thoughts": "training collator",
    "data": "data that a collator spoils",
    "gradients": "loss and gradients",
    "disk": "adapters on disk",
    "layers": "arithmetic of layers",
    "cache": "arithmetic of layers",
    "recurrent": "linear attention",
    "logits": "arithmetic of layers",
    "lora": "arithmetic of adapters",
    "library": "library and files, before any reference",
    "session": "session state",
}


@dataclass(frozen=True)
class Fault:
    """One deliberate defect, and the check that must catch it.

    Attributes:
        name: What the command line calls it.
        family: One of :data:`FAMILIES`.
        summary: What is wrong, in one sentence.
        target: What is changed: ``"load"``, ``"model"``, ``"adapter"``, ``"batch"``, ``"processor"`` or ``"run"``.
        check: The check that must catch it.
        expected_words: Words that the check's message must contain: they point at the cause. Numbers that depend on the
            model stand in braces, see :class:`pytest_qvl.faults.sizes.Sizes`.
        source: Public thread of the bug it stands for; empty if it stands for none.
        silent: Whether Transformers accepts it: forward, backward and ``generate`` raise nothing.
        transformers: Smallest release of Transformers in which the defect exists.
        damage: Context manager over a :class:`pytest_qvl.faults.case.Case`; everything is put back on leaving.
        needs: Returns why the defect cannot be made on this machine, or nothing.
        requires: What the model and its device must have for it, by name in
            :data:`pytest_qvl.faults.requirements.REQUIREMENTS`.
        unshared: Why a reference that is recorded after the damage is without it all the same; empty where it is not,
            or what :attr:`target` stands for says so, see :mod:`pytest_qvl.faults.common_mode`.
    """

    name: str
    family: str
    summary: str
    target: str
    check: str
    expected_words: tuple[str, ...]
    source: str
    silent: bool
    transformers: tuple[int, ...]
    damage: Callable[[Case], AbstractContextManager[None]]
    needs: Callable[[], str | None]
    requires: tuple[Requirement, ...] = ()
    unshared: str = ""

    def words(self, sizes: Sizes = EMBEDDED) -> tuple[str, ...]:
        """What the check's message must contain for a model of these sizes."""
        return sizes.fill(self.expected_words)

    def missing(self, case: Case | None = None) -> str | None:
        """Why this fault cannot be made here; ``None`` where it can.

        Args:
            case: A healthy case that would have to carry it; without one only this machine is asked.
        """
        import transformers

        have = tuple(int(n) for n in re.findall(r"\d+", transformers.__version__)[:3])
        if have < self.transformers:
            return f"Transformers {'.'.join(map(str, self.transformers))} and later only"
        if reason := self.needs():
            return reason
        if case is None:
            return None
        from pytest_qvl.faults.requirements import unmet

        return unmet(self.requires, self.check, case) or None


_FAULTS: dict[str, Fault] = {}


def fault(
    name: str,
    summary: str,
    *,
    target: str,
    check: str,
    expected_words: tuple[str, ...],
    source: str = "",
    silent: bool = True,
    transformers: tuple[int, ...] = (4, 57),
    needs: Callable[[], str | None] = lambda: None,
    requires: tuple[Requirement, ...] = (),
    unshared: str = "",
) -> Callable[[Damage], Damage]:
    """Enter a generator over a case into the catalogue; see :class:`Fault` for the arguments.

    Raises:
        ValueError: The name is taken, or the module is of no known family.
    """

    def enter(damage: Damage) -> Damage:
        family = FAMILIES.get(damage.__module__.rpartition(".")[2])
        if name in _FAULTS or family is None:
            raise ValueError(f"fault {name!r} is defined twice, or its module is none of {', '.join(FAMILIES)}")
        _FAULTS[name] = Fault(
            name, family, summary, target, check, expected_words, source, silent, transformers,
            contextmanager(damage), needs, requires, unshared,
        )  # fmt: skip
        return damage

    return enter


@cache
def catalogue() -> dict[str, Fault]:
    """Every fault by name, family by family."""
    for module in FAMILIES:
        import_module(f"pytest_qvl.faults.definitions.{module}")
    return dict(_FAULTS)


def find(name: str) -> Fault:
    """The fault of that name.

    Raises:
        ValueError: There is none; names the nearest ones.
    """
    from difflib import get_close_matches

    faults = catalogue()
    if name not in faults:
        near = " or ".join(map(repr, get_close_matches(name, faults)))
        raise ValueError(
            f"no fault is called {name!r}; " + (f"did you mean {near}?" if near else "`pytest-qvl faults` lists them")
        )
    return faults[name]
