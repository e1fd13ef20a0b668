"""Which files of a user override which fixtures of this package, where they reach, and whether with what fits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.session import fixture_graph
from pytest_qvl.session.errors import UserError
from pytest_qvl.session.fixture_values import judged
from pytest_qvl.session.suite_collection import FOLDER, PACKAGE

if TYPE_CHECKING:
    import pytest

OWN_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Overriding:
    """A file of a user that overrides fixtures of this package.

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
        names = tuple(sorted(filter(fixture_graph.is_ours, fixture_graph.fixtures_of(plugin))))
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


def value_of(config: pytest.Config, fixturedef: Any, value: Any) -> Any:
    """The value of an overriding fixture as the tests get it, if it is what that fixture has to give.

    Raises:
        UserError: Names the fixture, the line that defines it, what it gave and what it has to give; also for every
            later test.
    """
    meant, problem = judged(fixturedef.argname, value)
    if problem:
        refusal = UserError(f"the fixture {fixturedef.argname} ({place(config, fixturedef)}) gives {problem}")
        fixture_graph.keep_error(fixturedef, refusal)
        raise refusal
    if meant is not value:
        fixture_graph.keep_value(fixturedef, meant)
    return meant


def is_own(fixturedef: Any) -> bool:
    """Whether a fixture is defined by this package."""
    return bool(getattr(fixturedef.func, "__module__", "").startswith("pytest_qvl."))


def place(config: pytest.Config, fixturedef: Any) -> str:
    """Where a fixture is defined, as file and line; in words where that is no file of the user's."""
    found = fixture_graph.defined_at(fixturedef)
    return "a parameter of the test" if found is None else f"{shown(config, found[0])}:{found[1]}"


def shown(config: pytest.Config, file: Path) -> str:
    """A path as seen from where the run was started."""
    return os.path.relpath(file, config.invocation_params.dir)


def _asks_for_suite(config: pytest.Config) -> bool:
    return any(argument.startswith((PACKAGE, str(FOLDER))) for argument in config.args)
