"""The pytest hooks, and nothing else; imports the standard library and pytest only."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest

pytest.register_assert_rewrite("pytest_qvl.checks", "pytest_qvl.suite")

from pytest_qvl import fixtures  # noqa: E402 - after assertion rewriting
from pytest_qvl.evidence import printable  # noqa: E402
from pytest_qvl.gpu.lease import join_session  # noqa: E402
from pytest_qvl.gpu.visible import VisibleDevicesError, auto_workers  # noqa: E402
from pytest_qvl.options import SETTINGS_KEY, add_options, read_settings  # noqa: E402
from pytest_qvl.processes import child, import_first  # noqa: E402
from pytest_qvl.report.comparison import Comparison  # noqa: E402
from pytest_qvl.report.terminal import Summary  # noqa: E402
from pytest_qvl.session import fixture_graph, overrides, results, rootdir, threads, warning_filters  # noqa: E402
from pytest_qvl.session.fault_injection import Faulted, refuse_without_effect  # noqa: E402
from pytest_qvl.session.gpu_errors import GpuFailures  # noqa: E402
from pytest_qvl.session.installed import Installed  # noqa: E402
from pytest_qvl.session.interrupts import Interrupts  # noqa: E402
from pytest_qvl.session.limit_vram import LIMIT_VRAM_HELP, VramLimits, asks_for_gpus  # noqa: E402
from pytest_qvl.session.process_gpu import lease_lines, leases_for_record  # noqa: E402
from pytest_qvl.session.require_gpu import GpuRequired  # noqa: E402
from pytest_qvl.session.session_results import SessionVerdicts  # noqa: E402
from pytest_qvl.session.state import STATE_KEY, State  # noqa: E402
from pytest_qvl.session.suite_collection import ShippedSuite, is_shipped  # noqa: E402
from pytest_qvl.session.targets import check_devices, parametrize, target_of, targets  # noqa: E402
from pytest_qvl.session.tracebacks import release_frames  # noqa: E402
from pytest_qvl.session.vram_properties import PhaseNumbers  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Generator

    from pytest_qvl.options import Settings

LIMITS_KEY = pytest.StashKey[VramLimits]()
VERDICTS_KEY = pytest.StashKey[SessionVerdicts]()
ERRORS_KEY = pytest.StashKey[list[BaseException]]()
MARKERS = ("gpu: the test executes on CUDA", LIMIT_VRAM_HELP)


def _hide_hook_frame(excinfo: pytest.ExceptionInfo[BaseException]) -> bool:
    """Whether to leave a hook's frame out of a traceback; where only a message is shown, pytest wants one frame."""
    return bool(getattr(excinfo.value, "pytrace", True))


def _is_own(fixturedef: Any) -> bool:
    """Whether a fixture is defined by this package."""
    return bool(getattr(fixturedef.func, "__module__", "").startswith("pytest_qvl."))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register flags and ini names."""
    add_options(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config, parser: pytest.Parser, args: list[str]) -> None:
    """Start over if an option's value moved the rootdir; import what a backend needs to have imported first."""
    if not rootdir.start_over_if_misled(early_config, parser, args):
        import_first.import_first(early_config)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | pytest.ExitCode | None:
    """The run that started over, where one did."""
    return rootdir.run_again(config)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Resolve settings and start the session's state; first, because xdist must not start workers in a parent."""
    for line in MARKERS:
        config.addinivalue_line("markers", line)
    warning_filters.register(config)
    settings = read_settings(config)
    check_devices(settings)
    import_first.refuse(config)
    register = config.pluginmanager.register
    child_of = child.backend_of(config)
    if child_of is not None:
        settings = settings.of_backend(child_of)
        if hasattr(config, "workerinput"):
            register(child.WorkerShare(), child.WORKER_NAME)
    config.stash[SETTINGS_KEY] = settings
    state = config.stash[STATE_KEY] = State(config, settings)
    if len(settings.backend) > 1:
        from pytest_qvl.processes import parent

        parent.refuse_what_needs_a_terminal(config)
        register(parent.Children(config, settings.backend, state.progress), child.PARENT_NAME)
    register(fixtures, "qvl-fixtures")
    register(ShippedSuite(), "qvl-suite")
    register(Installed(), "qvl-installed")
    summary = Summary()
    register(summary, "qvl-summary")
    comparison = Comparison()
    register(comparison, "qvl-comparison")
    limits = VramLimits(config, state.meter, default=settings.vram_limit, required=settings.require_gpu)
    config.stash[LIMITS_KEY] = limits
    register(limits, "qvl-vram-limits")
    register(PhaseNumbers(state.meter), "qvl-vram-numbers")
    failures = GpuFailures(state.access, state.meter)
    register(failures, "qvl-gpu-failures")
    verdicts = SessionVerdicts([limits.judge_session, state.judge_session], state.facts)
    config.stash[VERDICTS_KEY] = verdicts
    register(verdicts, "qvl-session-verdicts")
    register(Interrupts(state.announce), "qvl-interrupts")
    if settings.record is not None and child_of is None and not hasattr(config, "workerinput"):
        from pytest_qvl.report.record import Record, vram_for_record

        chosen = [*settings.described(), *_simulated(settings)]
        parts = [
            summary.as_dict,
            comparison.as_dict,
            verdicts.as_dict,
            failures.as_dict,
            lambda: leases_for_record(verdicts.facts),
            lambda: vram_for_record(verdicts.facts),
        ]
        register(Record(settings.record, chosen, parts), "qvl-record")
    if settings.require_gpu:
        register(GpuRequired(), "qvl-require-gpu")
    if settings.fault is not None:
        refuse_without_effect(settings)
        register(Faulted(settings, state.default_dtype, state.shared), "qvl-fault")
    _let_plugins_override(config)


def _let_plugins_override(config: pytest.Config) -> None:
    """Let fixtures of a module given with ``-p`` override ours, wherever it stands on the command line.

    Of two plugins' fixtures pytest takes those registered last, and entry points come after ``-p``.
    It learns of plugins by replaying their registrations at session start, and there ours comes first.
    """
    history = config.pluginmanager.hook.pytest_plugin_registered._call_history
    if history is not None:
        history.sort(key=lambda call: call[0]["plugin"] is not fixtures)


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """``-n auto`` is the number of GPUs where the run asked for GPUs; else the answer is xdist's."""
    asked = config.getoption("numprocesses", None) == "auto" and asks_for_gpus(config, read_settings(config))
    try:
        return auto_workers(asked=asked)
    except VisibleDevicesError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Workers inherit the name of this run, so that one waits for another as long as that one runs."""
    join_session()


def pytest_report_header(config: pytest.Config) -> list[str]:
    """What was chosen, and by whom."""
    settings = config.stash[SETTINGS_KEY]
    lines = (
        ", ".join(settings.described()),
        *_simulated(settings),
        *threads.described(config),
        *overrides.described(config),
    )
    return [printable(f"qvl: {line}") for line in lines]


def _simulated(settings: Settings) -> list[str]:
    if settings.card is None or all(target.device == "cpu" for target in targets(settings)):
        return []
    from pytest_qvl.vram.cap import told

    return [told(settings.card)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that uses a model once per model and device."""
    parametrize(metafunc, metafunc.config.stash[SETTINGS_KEY])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(fixturedef: Any, request: Any) -> Generator[None, object, object]:
    """Note what a fixture is made from, what it trained, and which test met its error first."""
    __tracebackhide__ = _hide_hook_frame
    state, item = request.config.stash[STATE_KEY], request._pyfuncitem
    state.note(fixturedef, item)
    known = state.known_failure(fixturedef, item)
    if known is not None:
        raise known
    try:
        with state.making(fixturedef), warning_filters.spared() if _is_own(fixturedef) else nullcontext():
            value = yield
        if not _is_own(fixturedef):
            value = overrides.value_of(request.config, fixturedef, value)
    except (Exception, pytest.fail.Exception) as error:
        state.note_failure(fixturedef, error, item)
        raise
    state.note_trainer(fixturedef, item)
    return value


def pytest_fixture_post_finalizer(fixturedef: Any, request: Any) -> None:
    """What a fixture trained goes with it."""
    request.config.stash[STATE_KEY].note_end(fixturedef)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let go of what the frames of a failure hold, once everybody has seen it."""
    errors = item.stash.setdefault(ERRORS_KEY, [])
    try:
        return (yield)
    except BaseException:
        # An interrupt: before 9.2, pytest leaves its arguments to a test that did not come to its end.
        if hasattr(item, "funcargs"):
            item.funcargs = None
        raise
    finally:
        for error in errors:
            release_frames(error)
        errors.clear()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    """Point to the first test that met a fixture's error; from the end of set-up on, the test is watched."""
    __tracebackhide__ = _hide_hook_frame
    state = item.config.stash[STATE_KEY]
    if any(map(fixture_graph.is_ours, fixture_graph.fixture_names(item))):
        warning_filters.filter_for_test()
        if is_shipped(item):
            warning_filters.spare()
        threads.limit_threads(item.config)
    try:
        with results.judging(item):
            result = yield
    except (Exception, pytest.fail.Exception) as error:
        pointer = state.pointer(error, item)
        if pointer is None:
            raise
        raise pointer from None
    state.access.verify()
    state.begin_watch(item)
    return result


@pytest.hookimpl(specname="pytest_runtest_setup")
def pytest_runtest_setup_model(item: pytest.Item) -> None:
    """Give the test its GPU, and the model the state that it asks for, unless a mark has skipped it by now."""
    state = item.config.stash[STATE_KEY]
    state.access.enter(item)
    state.prepare(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Collect the evidence of every check that the test calls."""
    __tracebackhide__ = _hide_hook_frame
    state = item.config.stash[STATE_KEY]
    with results.judging(item), state.kept_as_found():
        result = yield
    state.check_announced(item)
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """Name the test that changed the shared model, or left memory allocated."""
    state, verdict = item.config.stash[STATE_KEY], None
    state.begin_teardown(item, item.stash.get(ERRORS_KEY, []))
    try:
        result = yield
    finally:
        verdict = state.judge(item)
    verdict = verdict or state.judge_memory()
    if verdict is not None:
        pytest.fail(verdict, pytrace=False)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put evidence, target and check on the report."""
    if call.excinfo is not None and (target_of(item) is not None or fixture_graph.requested_models(item)):
        item.stash.setdefault(ERRORS_KEY, []).append(call.excinfo.value)
    with results.trim_traceback(item.config, call.excinfo):
        report = yield
    results.attach(item, report)
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What became of the limits on VRAM, and which GPUs were used."""
    for line in (*config.stash[LIMITS_KEY].summary(), *lease_lines(config.stash[VERDICTS_KEY].facts)):
        terminalreporter.line(f"qvl: {line}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A backend's process tells the one that was started what became of limits on its session."""
    own: child.Child | None = session.config.pluginmanager.get_plugin(child.NAME)
    if own is not None:
        own.request("limits", outcomes=session.config.stash[LIMITS_KEY].session_outcomes())


@pytest.hookimpl(trylast=True)
def pytest_keyboard_interrupt(excinfo: pytest.ExceptionInfo[BaseException]) -> None:
    """Let go of what the interrupted frames hold: the model, or half of one."""
    release_frames(excinfo.value)


@pytest.hookimpl(specname="pytest_sessionfinish", trylast=True)
def pytest_sessionfinish_memory(session: pytest.Session) -> None:
    """Give the model's memory and the GPU back, after the fixtures are torn down."""
    session.config.stash[STATE_KEY].close()
