"""Which files of a user override which fixtures of this package, and whether they reach the shipped suite."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl import lineage
from pytest_qvl.refusals import Refusal
from pytest_qvl.shipped import FOLDER, PACKAGE

if TYPE_CHECKING:
    import pytest

OWN_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Overriding:
    """One file with overrides.

    Attributes:
        file: A conftest.py, or a module given with ``-p``.
        names: Fixtures of this package that it overrides, sorted.
        reaches_suite: Whether the shipped suite sees them: not from a conftest.py below the rootdir.
    """

    file: Path
    names: tuple[str, ...]
    reaches_suite: bool


def overriding(config: pytest.Config) -> list[Overriding]:
    """Every plugin module loaded so far that overrides a fixture of this package."""
    found = []
    for plugin in config.pluginmanager.get_plugins():
        path = getattr(plugin, "__file__", None)
        if not path or Path(path).is_relative_to(OWN_PACKAGE):
            continue
        names = tuple(sorted(filter(lineage.is_ours, lineage.fixtures_of(plugin))))
        if names:
            file = Path(path)
            below = file.name == "conftest.py" and config.rootpath in file.parent.parents
            found.append(Overriding(file, names, not below))
    return sorted(found, key=lambda one: str(one.file))


def described(config: pytest.Config) -> list[str]:
    """For the header: what is overridden where, and a rootdir that is not where the run was started."""
    lines = [
        f"{shown(config, one.file)} overrides {', '.join(one.names)}"
        + ("" if one.reaches_suite else f", not for {PACKAGE}")
        for one in overriding(config)
    ]
    started = config.invocation_params.dir
    if config.rootpath != started and _asks_for_suite(config):
        lines.append(
            f"WARNING: the rootdir {config.rootpath} is not {started}, where this run was started: a conftest.py "
            f"below the rootdir does not reach {PACKAGE}; give --rootdir=. if it should"
        )
    return lines


def refuse_no_factory(fixturedef: Any, value: Any) -> None:
    """Refuse an overriding ``qvl_batch`` that gives a batch, or nothing, and not the function that makes batches.

    Raises:
        Refusal: Names the fixture's file, what it gave and what it has to give; also for every later test.
    """
    if fixturedef.argname != "qvl_batch" or callable(value):
        return
    code = fixturedef.func.__code__
    given = "None" if value is None else f"a value of type {type(value).__name__}"
    refusal = Refusal(
        f"the fixture qvl_batch ({Path(code.co_filename).name}:{code.co_firstlineno}) gives {given}; it has to give a "
        "function: qvl_batch(samples, padding_side='left', answers=False) returns a mapping from names to tensors"
    )
    _, key, _ = fixturedef.cached_result
    fixturedef.cached_result = (None, key, (refusal, None))
    raise refusal


def shown(config: pytest.Config, file: Path) -> str:
    """A path as seen from where the run was started."""
    return os.path.relpath(file, config.invocation_params.dir)


def _asks_for_suite(config: pytest.Config) -> bool:
    return any(argument.startswith((PACKAGE, str(FOLDER))) for argument in config.args)
