"""Whether a committed table still stands for the code: a digest of what decides its content."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pytest_qvl.faults.matrix.normalised import definitions, spoken_names
from pytest_qvl.models.sources.embedded import embedded_model_dir

PACKAGE = Path(__file__).parents[2]
DECIDES = ("checks", "oracles", "faults", "samples", "models", "evidence.py")
# What only lists, prints, or judges no model of the panel.
ASIDE = frozenset(
    {
        *(
            "faults/matrix/by_model.py",
            "faults/command.py",
            "faults/matrix/figure.py",
            "faults/matrix/freshness.py",
            "faults/matrix/journal.py",
            "faults/matrix/pool.py",
            "faults/matrix/runner.py",
        ),
        *(
            "faults/matrix/healthy_child.py",
            "faults/matrix/healthy_command.py",
            "faults/matrix/healthy_panel.py",
            "faults/matrix/healthy_plan.py",
        ),
        *("faults/matrix/healthy_record.py", "faults/matrix/isa.py", "faults/matrix/isa_used.py"),
        *("faults/matrix/normalised.py", "faults/matrix/page.py", "faults/matrix/results.py", "faults/unreproduced.py"),
        *("faults/mutation/__init__.py", "faults/mutation/code.py", "faults/mutation/command.py"),
        *("faults/mutation/drawn.py", "faults/mutation/judging.py", "faults/mutation/places.py"),
        *("faults/mutation/probes.py", "faults/mutation/record.py", "faults/mutation/running.py"),
        *("faults/mutation/settings.py", "faults/mutation/tensors.py"),
        *("checks/__init__.py", "checks/forecast.py", "checks/vram.py"),
        *("models/backends/unsloth.py", "models/backends/unsloth_start.py", "models/fingerprint/cuda.py"),
        *("models/fingerprint/kernel.py", "models/sources/released.py", "models/sources/command.py"),
        *("models/owner.py", "models/adapter_versions.py", "models/base_weights.py", "models/memory.py"),
        "models/progress_bars.py",
        *("models/sources/synthetic_checkpoint.py", "models/sources/synthetic_processor.py"),
    }
)

# What runs in models with linear attention only, and decides no verdict on others.
LINEAR_ATTENTION = frozenset({"checks/support/layers/mixers.py", "models/mixer_kernels.py", "oracles/delta.py"})
# Models by name that have none; of a folder nobody knows.
_WITHOUT_LINEAR_ATTENTION = re.compile(r"embedded(:(?!qwen3\.5).*)?|synthetic:(?!qwen3\.5).*")
DEFAULT_MODEL = "embedded"

# How a fault's function is written by :func:`definitions_of`: its own name, and the one that the decorator gives it.
_FAULT = re.compile(
    r"FunctionDef\(name='(\w+)',.*,decorator_list=\[Call\(func=Name\(fault\),args=\[Constant\(value='([\w-]+)'\)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Definitions:
    """Digests of what decides a verdict.

    Attributes:
        common: Of all but what a single fault alone stands for.
        faults: Of a fault's own function, by the fault's name: what it decides are the outcomes of that fault.
    """

    common: str
    faults: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Of all of them."""
        return _hash([self.common, *(f"{name} {text}" for name, text in sorted(self.faults.items()))])


def definitions_digest(model: str = DEFAULT_MODEL) -> str:
    """Hash of what decides a verdict on a model, see :func:`deciding_definitions`."""
    return deciding_definitions(model).digest


@cache
def deciding_definitions(model: str = DEFAULT_MODEL) -> Definitions:
    """What decides a verdict: the code of checks, oracles, faults, probes and models, and the embedded checkpoint.

    As they are when it is first asked for: a run of an hour stands for the code that it began with.

    Every function, class and other statement at the top of a module is one text, and the digest is that of all texts in
    sorted order, without the modules they stand in. Moving a definition, a module or a folder decides nothing, so it
    must not ask for a run of hours; nor must comments, docstrings, annotations, layout, imports, or names of variables
    and of parameters that no call spells out. Every other name, number and text counts, and so does a definition that
    comes or goes. The price: two definitions of the same name that change places are not told apart.

    Args:
        model: As for ``--qvl-model``. What only linear attention runs (:data:`LINEAR_ATTENTION`) is left aside for
            embedded and synthetic models that have none.
    """
    common, faults = parted(definitions_of(file.read_text(encoding="utf-8") for file in deciding_files(model)))
    for file in sorted(embedded_model_dir().iterdir()):
        if file.suffix in (".json", ".safetensors", ".txt"):
            common.append(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}")
    return Definitions(_hash(common), {name: _hash([text]) for name, text in faults.items()})


def parted(texts: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Texts of definitions as those that decide for all, and those of single faults by the fault's name.

    A fault's function that another definition names decides for that one too.
    """
    texts = list(texts)
    found = {text: match.groups() for text in texts if (match := _FAULT.match(text))}
    named = {name for text in texts for name in re.findall(r"Name\((\w+)\)", text)}
    alone = {fault: text for text, (function, fault) in found.items() if function not in named}
    return [text for text in texts if text not in alone.values()], alone


def _hash(texts: Iterable[str]) -> str:
    found = hashlib.sha256()
    for text in texts:
        found.update(hashlib.sha256(text.encode()).digest())
    return found.hexdigest()[:16]


def deciding_files(model: str = DEFAULT_MODEL) -> list[Path]:
    """Every module whose code the digest stands for, in folders at any depth."""
    aside = ASIDE | (LINEAR_ATTENTION if _WITHOUT_LINEAR_ATTENTION.fullmatch(model) else frozenset())
    roots = [PACKAGE / name for name in DECIDES]
    files = [file for root in roots for file in ([root] if root.suffix else root.rglob("*.py"))]
    return sorted(file for file in files if file.relative_to(PACKAGE).as_posix() not in aside)


def definitions_of(sources: Iterable[str]) -> list[str]:
    """What modules do, definition by definition and sorted: equal for modules that do the same in other words."""
    trees = [ast.parse(source) for source in sources]
    spoken = frozenset(name for tree in trees for name in spoken_names(tree))
    return sorted(text for tree in trees for text in definitions(tree, spoken))
