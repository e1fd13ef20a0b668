"""The rootdir is where the project is, not where the value of one of this package's options is.

pytest settles its rootdir before it loads plugins, and with it which ini file counts and which tests a conftest.py
reaches. Options of plugins are unknown then, so the folder in ``--qvl-model /data/model`` passes for a path to tests,
and the project's own configuration can be left out without a word. Joined, ``--qvl-model=/data/model``, it cannot.
So where such a value is a path that exists, the run starts over, in this process, with values joined to their options.

Uses public parts of pytest only, and imports no torch: it runs while pytest starts.
"""

from __future__ import annotations

import copy
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_qvl.options import SETTINGS
from pytest_qvl.session.keys import AGAIN_KEY

if TYPE_CHECKING:
    from collections.abc import Sequence

ADDOPTS = "PYTEST_ADDOPTS"
TAKE_A_VALUE = frozenset(setting.flag for setting in SETTINGS if not setting.switch)


def joined(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Arguments with the values of this package's options joined to them by ``=``.

    Args:
        arguments: As given to pytest; files of arguments (``@file``) are expanded as pytest does.

    Returns:
        The new arguments, and whether a value among them passes for a path to tests.
    """
    result: list[str] = []
    misleading = False
    rest = _expanded(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            return [*result, argument, *rest], misleading
        if argument in TAKE_A_VALUE and rest and not rest[0].startswith("-"):
            value = rest.pop(0)
            misleading = misleading or _exists(value)
            argument = f"{argument}={value}"
        result.append(argument)
    return result, misleading


def start_over_if_misled(config: pytest.Config, parser: pytest.Parser, args: list[str]) -> bool:
    """Whether the run has to start over; if so, no conftest is loaded now and every option is at its default.

    Call it from ``pytest_load_initial_conftests``, then :func:`run_again` from ``pytest_cmdline_main``.
    """
    arguments, misled = joined([os.fspath(argument) for argument in config.invocation_params.args])
    _, misled_by_environment = joined(shlex.split(os.environ.get(ADDOPTS, "")))
    if not (misled or misled_by_environment):
        return False
    config.stash[AGAIN_KEY] = arguments
    args.clear()
    config.known_args_namespace = parser.parse_known_args([], namespace=copy.copy(config.option))
    config.known_args_namespace.noconftest = True
    return True


def run_again(config: pytest.Config) -> int | pytest.ExitCode | None:
    """The exit status of the run that started over; ``None`` where nothing did."""
    arguments = config.stash.get(AGAIN_KEY, None)
    if arguments is None:
        return None
    given = os.environ.get(ADDOPTS)
    if given is not None:
        os.environ[ADDOPTS] = shlex.join(joined(shlex.split(given))[0])
    try:
        return pytest.main(arguments, config.invocation_params.plugins)
    finally:
        if given is not None:
            os.environ[ADDOPTS] = given


def _expanded(arguments: Sequence[str]) -> list[str]:
    found: list[str] = []
    for argument in arguments:
        if argument.startswith("@") and Path(argument[1:]).is_file():
            found += _expanded(Path(argument[1:]).read_text().splitlines())
        else:
            found.append(argument)
    return found


def _exists(value: str) -> bool:
    try:
        return Path(value.partition("::")[0]).exists()
    except (OSError, ValueError):  # too long for a path, or with a NUL in it
        return False
