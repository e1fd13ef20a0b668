"""The questions, in their order. Standard library only; each is imported when it is asked."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_qvl.preflight.findings import Finding
    from pytest_qvl.preflight.subject import Subject


@dataclass(frozen=True)
class Question:
    """One question of a preflight.

    Attributes:
        number: As in the report; 0 is whether the files can be read at all.
        module: Its module in this package; empty for 0, which is answered while the files are read.
        title: In the report.
    """

    number: int
    module: str
    title: str

    def answer(self, subject: Subject) -> Iterator[Finding]:
        """What the question's module says (see :mod:`pytest_qvl.preflight`)."""
        module = importlib.import_module(f"{__name__}.{self.module}")
        found: Iterator[Finding] = module.answer(subject)
        return found


QUESTIONS = (
    Question(0, "", "Can the files be read without harm?"),
    Question(1, "four_bits", "Which modules will be in 4 bits?"),
    Question(2, "targets", "Which modules get an adapter?"),
    Question(3, "keys", "Does every key of the adapter land on a module, and is it for this model?"),
    Question(4, "alive", "Is the adapter alive?"),
    Question(5, "prequantized", "Can the base run, and are its files complete and consistent?"),
    Question(6, "processor", "Do processor, tokenizer and template belong to the base?"),
    Question(7, "survival", "What survives a merge?"),
    Question(8, "card", "Does it fit the card?"),
)
