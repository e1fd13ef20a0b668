"""Which checks there are, as their ``@check(promise=…, needs=…)`` says, without importing one of them.

The plugin asks for them, so the declarations are read from the source: importing every check takes a tenth of a second,
reading them a few milliseconds, once. :mod:`pytest_qvl.checks.registry` holds what was imported to the same.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

# The order of everything that lists checks; a module that is not named here comes behind them.
ORDER = (
    "vram",
    "forecast",
    "checkpoint",
    "weights",
    "quantization",
    "adapter",
    "neutrality",
    "roundtrip",
    "routing",
    "isolation",
    "packing",
    "pairing",
    "preprocessing",
    "positions",
    "vision",
    "generation",
    "generation_invariance",
    "generation_form",
    "as_found",
    "visual_alignment",
    "training",
    "backpropagation",
    "labels",
    "collation",
    "data",
    "loss",
    "gradients",
    "frozen",
    "layers",
    "golden",
)
NEEDS = {
    "gpu": "a GPU to measure on: no fault on the CPU is shown to it",
    "knowledge": "a model that knows answers, and its reference: judged on probes, and in a few healthy variations",
    "time": "many forward passes: healthy variations take turns with it",
    "forecast": "a forecast: its faults are wrong numbers and small cards, which tests of its own show",
    "request": "a setting that asks for it: a run without one does not miss it",
}
_DECLARATION = re.compile(r"^@(check\([^()]*(?:\([^()]*\)[^()]*)*\))\ndef (\w+)\(", re.MULTILINE)


class Declared(NamedTuple):
    """What a check says of itself.

    Attributes:
        name: The function.
        module: Its module in :mod:`pytest_qvl.checks`.
        promise: Number of the promise that it proves, as :data:`pytest_qvl.promises.PROMISES` counts from 1.
        needs: Keys of :data:`NEEDS`.
    """

    name: str
    module: str
    promise: int
    needs: tuple[str, ...] = ()


@cache
def declared() -> dict[str, Declared]:
    """Every check by name, in the order of :data:`ORDER` and of the source."""
    files = [file for file in Path(__file__).parent.glob("*.py") if file.stem != "__init__"]
    files.sort(key=lambda file: (ORDER.index(file.stem) if file.stem in ORDER else len(ORDER), file.stem))
    found = [each for file in files for each in read(file.read_text(encoding="utf-8"), file.stem)]
    return {each.name: each for each in found}


def read(source: str, module: str) -> list[Declared]:
    """The checks that a module's source declares; the arguments of ``@check`` are literals."""
    found = []
    for decorator, name in _DECLARATION.findall(source):
        call = ast.parse(decorator, mode="eval").body
        assert isinstance(call, ast.Call)
        given = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
        found.append(Declared(name, module, given["promise"], tuple(given.get("needs", ()))))
    return found


def needing(need: str) -> tuple[str, ...]:
    """Names of the checks that need something, a key of :data:`NEEDS`."""
    return tuple(each.name for each in declared().values() if need in each.needs)
