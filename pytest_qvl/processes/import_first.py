"""Before any conftest is loaded: import what a backend needs to have imported before everything else."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import pytest

from pytest_qvl.models.backends import BACKENDS, start_first
from pytest_qvl.options import backends_before_conftests
from pytest_qvl.processes import child
from pytest_qvl.session.process_link import parent_link

# Options with which pytest runs no test.
_RUNS_NOTHING = ("help", "version", "collectonly", "markers", "showfixtures", "show_fixtures_per_test", "cacheshow")
_REFUSED = pytest.StashKey[str]()
_OUTPUT = "qvl_refused"


def import_first(config: pytest.Config) -> None:
    """Import what the one backend of this process needs first, if it does; a refusal waits for :func:`refuse`."""
    backend = _only_backend(config)
    if backend is None or backend not in BACKENDS or not _runs_tests(config):
        return
    try:
        start_first(backend, lambda line: _show(config, f"qvl: {line}"))
    except RuntimeError as error:
        config.stash[_REFUSED] = str(error)


def refuse(config: pytest.Config) -> None:
    """Say why a backend cannot be used in this process; here, because pytest before 9.2 shows a traceback earlier.

    A worker of xdist leaves it to the controller: of one that raises here xdist starts another, which would wait for
    the GPU that the first still holds.

    Raises:
        pytest.UsageError: With the reason.
    """
    reason = config.stash.get(_REFUSED, "") or _too_many_workers(config)
    if hasattr(config, "workerinput"):
        if reason:
            config.pluginmanager.register(RefusedWorker(reason), "qvl-refused-worker")
        return
    config.pluginmanager.register(Controller(), "qvl-refusals-of-workers")
    if reason:
        _refuse(config, reason)


class RefusedWorker:
    """In a worker that cannot run its backend: end before collection, and leave the reason to the controller."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session: pytest.Session) -> None:
        """The first hook after xdist has announced the worker."""
        session.config.workeroutput[_OUTPUT] = self._reason  # type: ignore[attr-defined]
        pytest.exit(self._reason, returncode=pytest.ExitCode.USAGE_ERROR)


class Controller:
    """Where workers are started: end the run with the reason of one that cannot run its backend."""

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Refuse what a worker refused.

        Raises:
            pytest.UsageError: With the worker's reason.
        """
        reason = getattr(node, "workeroutput", {}).get(_OUTPUT)  # a worker that crashed leaves none
        if reason:
            _refuse(node.config, reason)


def _refuse(config: pytest.Config, reason: str) -> NoReturn:
    parent = parent_link(config)
    if parent is not None:
        parent.request("interrupted", text=reason, for_all=False, status=None)
    raise pytest.UsageError(reason)


def _too_many_workers(config: pytest.Config) -> str:
    """Workers that wait for a GPU while they start: xdist begins when all have started, so none would ever run."""
    workers = getattr(config.option, "tx", None) or ()
    backend = _only_backend(config)
    if backend is None or not BACKENDS[backend].first or not workers or hasattr(config, "workerinput"):
        return ""
    from pytest_qvl.gpu.visible import visible_gpus

    gpus = len(visible_gpus().gpus)
    if not 0 < gpus < len(workers):
        return ""
    return (
        f"backend {backend!r} takes its GPU when a process starts, so {len(workers)} workers need as many GPUs, and "
        f"{gpus} may be used; give -n {gpus}"
    )


def _show(config: pytest.Config, line: str) -> None:
    capture: Any = config.pluginmanager.get_plugin("capturemanager")  # has begun to capture by now
    with capture.global_and_fixture_disabled():
        print(line, file=sys.stderr, flush=True)


def _only_backend(config: pytest.Config) -> str | None:
    backend = child.backend_of(config) or child.backend_of_worker()
    if backend is not None:
        return backend
    names = backends_before_conftests(config)
    return names[0] if len(names) == 1 else None


def _runs_tests(config: pytest.Config) -> bool:
    options = config.known_args_namespace
    if any(getattr(options, name, None) for name in _RUNS_NOTHING):
        return False
    distributed = getattr(options, "numprocesses", None) or getattr(options, "tx", None)
    return not distributed or "PYTEST_XDIST_WORKER" in os.environ
