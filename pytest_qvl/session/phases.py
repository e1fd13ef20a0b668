"""The phases of a test in order: its fixtures, setup, body, teardown and report, and at last the end of the session.

Registered together with the plugin, so that these hooks keep their place before those of any conftest.py.

``pytest_runtest_logreport`` is heard by ``report.run_results`` alone, which notes all that is reported later, and in a
backend's process by ``processes.child``, which sends it on. ``pytest_sessionfinish`` then goes in this order:

1. ``pytest_qvl.session.fault_injection``: lets go of the damaged model
2. ``pytest_qvl.session.require_gpu``: notes that no GPU test was executed
3. ``pytest_qvl.session.session_verdicts``: judges the session, gathers from all processes, turns a green run red
4. ``_pytest.junitxml``: writes JUnit's file
5. ``_pytest.runner``: tears down the fixtures of a run that was interrupted
6. ``pytest_qvl.session.phases``: frees the model's memory and the GPU
7. ``pytest_qvl.report.base_comparison``: compares with an earlier record; a regression turns a green run red
8. ``_pytest.terminal``: the summary, in the order of ``report.terminal``
9. ``pytest_qvl.session.interrupts``: says if a signal came meanwhile
10. ``pytest_qvl.report.record``: writes the page, which is one too, then the record with the exit status of the process
11. ``pytest_qvl.session.interrupts``: lets signals through again
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qvl.session import findings, fixture_graph, overrides, threads, warning_filters
from pytest_qvl.session.keys import (
    ACCESS_KEY,
    DEVICE_KEY,
    FIRST_ERRORS_KEY,
    LEAKS_KEY,
    MODEL_KEY,
    RAISED_KEY,
)
from pytest_qvl.session.suite_collection import is_shipped
from pytest_qvl.session.targets import target_of
from pytest_qvl.session.tracebacks import release_frames

if TYPE_CHECKING:
    from collections.abc import Generator


def _hide_hook_frame(excinfo: pytest.ExceptionInfo[BaseException]) -> bool:
    """Whether to leave a hook's frame out of a traceback; where only a message is shown, pytest wants one frame."""
    return bool(getattr(excinfo.value, "pytrace", True))


# ---- fixtures ----------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(fixturedef: Any, request: Any) -> Generator[None, object, object]:
    """Note what a fixture is made from, what it trained, and which test met its error first."""
    __tracebackhide__ = _hide_hook_frame
    stash, item = request.config.stash, request._pyfuncitem
    model, errors = stash[MODEL_KEY], stash[FIRST_ERRORS_KEY]
    model.note(fixturedef, item)
    known = errors.known_failure(fixturedef, item)
    if known is not None:
        raise known
    shared = stash[LEAKS_KEY].watch.making() if fixturedef.scope != "function" else nullcontext()
    try:
        with shared, warning_filters.spared() if overrides.is_own(fixturedef) else nullcontext():
            value = yield
        if not overrides.is_own(fixturedef):
            value = overrides.value_of(request.config, fixturedef, value)
    except (Exception, pytest.fail.Exception) as error:
        if fixturedef in model.noted:
            errors.note(fixturedef, error, item, again=not model.got_unannounced)
        raise
    model.note_trainer(fixturedef, item)
    return value


def pytest_fixture_post_finalizer(fixturedef: Any, request: Any) -> None:
    """Look for leaks, and forget what the fixture trained."""
    if fixturedef.scope != "function":
        request.config.stash[LEAKS_KEY].look()
    request.config.stash[MODEL_KEY].note_end(fixturedef)


# ---- a test ------------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let go of what the frames of a failure hold, once everybody has seen it."""
    raised = item.stash.setdefault(RAISED_KEY, [])
    try:
        return (yield)
    except BaseException:
        # An interrupt: before 9.2, pytest leaves its arguments to a test that did not come to its end.
        if hasattr(item, "funcargs"):
            item.funcargs = None
        raise
    finally:
        for error in raised:
            release_frames(error)
        raised.clear()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    """Point to the first test that met a fixture's error; from the end of setup on, the test is watched."""
    __tracebackhide__ = _hide_hook_frame
    stash = item.config.stash
    if any(map(fixture_graph.is_ours, fixture_graph.fixture_names(item))):
        warning_filters.filter_for_test()
        if is_shipped(item):
            warning_filters.spare()
        threads.limit_threads(item.config)
    try:
        with findings.judging(item):
            result = yield
    except (Exception, pytest.fail.Exception) as error:
        pointer = stash[FIRST_ERRORS_KEY].pointer(error, item)
        if pointer is None:
            raise
        raise pointer from None
    stash[ACCESS_KEY].verify()
    stash[MODEL_KEY].begin_watch(item)
    return result


@pytest.hookimpl(specname="pytest_runtest_setup")
def pytest_runtest_setup_model(item: pytest.Item) -> None:
    """Give the test its GPU, and the model the state that it asks for, unless a mark has skipped it by now."""
    stash = item.config.stash
    stash[ACCESS_KEY].enter(item)
    if stash[MODEL_KEY].prepare(item):
        stash[LEAKS_KEY].watch.begin()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Collect the evidence of every check that the test calls."""
    __tracebackhide__ = _hide_hook_frame
    model = item.config.stash[MODEL_KEY]
    with findings.judging(item), model.kept_as_found():
        result = yield
    model.check_announced(item)
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """Name the test that changed the shared model, or left memory allocated."""
    model, leaks, verdict = item.config.stash[MODEL_KEY], item.config.stash[LEAKS_KEY], None
    leaks.begin_teardown(item, item.stash.get(RAISED_KEY, []))
    try:
        result = yield
    finally:
        verdict = model.judge(item)
    verdict = verdict or leaks.judge()
    if verdict is not None:
        pytest.fail(verdict, pytrace=False)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put evidence, target and check on the report."""
    if call.excinfo is not None and (target_of(item) is not None or fixture_graph.requested_models(item)):
        item.stash.setdefault(RAISED_KEY, []).append(call.excinfo.value)
    with findings.trim_traceback(item.config, call.excinfo):
        report = yield
    findings.attach(item, report)
    return report


# ---- the end of the session --------------------------------------------------------------------------------


@pytest.hookimpl(trylast=True)
def pytest_keyboard_interrupt(excinfo: pytest.ExceptionInfo[BaseException]) -> None:
    """Let go of what the interrupted frames hold: the model, or half of one."""
    release_frames(excinfo.value)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Give the model's memory and the GPU back, after the fixtures are torn down."""
    stash = session.config.stash
    stash[FIRST_ERRORS_KEY].clear()
    stash[MODEL_KEY].release()
    stash[DEVICE_KEY].close()
