"""Whether a committed table still stands for the code: a digest of what decides its content."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

from pytest_qvl.data import embedded_model_dir
from pytest_qvl.faults.normalised import without_names

PACKAGE = Path(__file__).parents[1]
DECIDES = ("checks", "faults", "samples", "models", "evidence.py")
# What only lists, prints, or judges no model of the panel.
ASIDE = frozenset(
    {
        *("faults/by_model.py", "faults/cli.py", "faults/freshness.py", "faults/journal.py", "faults/matrix.py"),
        *("faults/healthy_child.py", "faults/healthy_panel.py", "faults/isa.py"),
        *("faults/normalised.py", "faults/page.py", "faults/results.py", "faults/unreproduced.py"),
        *("checks/__init__.py", "checks/forecast.py", "checks/vram.py"),
        *("models/backends/unsloth.py", "models/backends/unsloth_start.py", "models/fingerprint_cuda.py"),
        *("models/fingerprint_kernel.py", "models/owner.py", "models/released.py", "models/synthesize.py"),
        *("models/synthetic_checkpoint.py", "models/synthetic_processor.py"),
    }
)


@cache
def definitions_digest() -> str:
    """Hash of what decides a verdict: the code of checks, faults, probes and models, and the embedded checkpoint.

    As they are when it is first asked for: a run of an hour stands for the code that it began with.

    Comments, docstrings, annotations, layout and names of local variables do not count; every other name, number and
    text does.
    """
    found = hashlib.sha256()
    for file in deciding_files():
        name = file.relative_to(PACKAGE).as_posix()
        found.update(f"{name}\n{code_of(file.read_text(encoding='utf-8'))}\n".encode())
    for file in sorted(embedded_model_dir().iterdir()):
        if file.suffix in (".json", ".safetensors", ".txt"):
            found.update(f"{file.name}\n{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()[:16]


def deciding_files() -> list[Path]:
    """Every module whose code the digest stands for, in folders at any depth."""
    roots = [PACKAGE / name for name in DECIDES]
    files = [file for root in roots for file in ([root] if root.suffix else root.rglob("*.py"))]
    return sorted(file for file in files if file.relative_to(PACKAGE).as_posix() not in ASIDE)


def code_of(source: str) -> str:
    """What a module does, as text that is equal for modules that do the same under other local names."""
    return without_names(ast.parse(source))
