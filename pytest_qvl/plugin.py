"""The door: options, the objects of a session and how they are put together, the header, and targets of tests.

What happens around a test stands in :mod:`pytest_qvl.session.phases`. Importing this module imports pytest and names
only; each hook imports what it needs when it is called, most of it in ``pytest_configure``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.register_assert_rewrite("pytest_qvl.checks", "pytest_qvl.suite")

from pytest_qvl.session.keys import (  # noqa: E402 - after assertion rewriting
    ACCESS_KEY,
    CONSOLE_KEY,
    DEVICE_KEY,
    FIRST_ERRORS_KEY,
    LEAKS_KEY,
    LIMITS_KEY,
    METER_KEY,
    MODEL_KEY,
    RESULTS_KEY,
    SESSION_RESULTS_KEY,
)
from pytest_qvl.session.process_link import PARENT_NAME  # noqa: E402

if TYPE_CHECKING:
    from pytest_qvl.options import Settings


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Register flags and ini names, and the hooks around tests: here, so that those of a conftest.py come after."""
    from pytest_qvl.options import add_options
    from pytest_qvl.session import phases

    add_options(parser)
    pluginmanager.register(phases, "qvl-phases")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config, parser: pytest.Parser, args: list[str]) -> None:
    """Start over if an option's value moved the rootdir; import what a backend needs to have imported first."""
    from pytest_qvl.processes import import_first
    from pytest_qvl.session import rootdir

    if not rootdir.start_over_if_misled(early_config, parser, args):
        import_first.import_first(early_config)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | pytest.ExitCode | None:
    """The run that started over, where one did."""
    from pytest_qvl.session import rootdir

    return rootdir.run_again(config)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Resolve settings and put the session together; first, because xdist must not start workers in a parent."""
    from pytest_qvl import fixtures
    from pytest_qvl.options import SETTINGS_KEY, read_settings
    from pytest_qvl.processes import child, import_first
    from pytest_qvl.session import warning_filters
    from pytest_qvl.session.limit_vram import LIMIT_VRAM_HELP
    from pytest_qvl.session.targets import check_devices

    config.addinivalue_line("markers", "gpu: the test executes on CUDA")
    config.addinivalue_line("markers", LIMIT_VRAM_HELP)
    warning_filters.register(config)
    settings = read_settings(config)
    check_devices(settings)
    import_first.refuse(config)
    backend = child.backend_of(config)
    if backend is not None:
        settings = settings.of_backend(backend)
        if hasattr(config, "workerinput"):
            config.pluginmanager.register(child.WorkerShare(), child.WORKER_NAME)
    config.stash[SETTINGS_KEY] = settings
    _compose(config, settings)
    if len(settings.backend) > 1:
        from pytest_qvl.processes import parent

        parent.refuse_what_needs_a_terminal(config)
        children = parent.Children(config, settings.backend, config.stash[CONSOLE_KEY].progress)
        config.pluginmanager.register(children, PARENT_NAME)
    config.pluginmanager.register(fixtures, "qvl-fixtures")
    _register(config, settings, writes_record=backend is None and not hasattr(config, "workerinput"))
    _let_plugins_override(config)


def _compose(config: pytest.Config, settings: Settings) -> None:
    """Make the objects of a session, from those that need none to those that need many."""
    from pytest_qvl.report.run_results import ResultsBuilder
    from pytest_qvl.session.console import Console
    from pytest_qvl.session.device import Device
    from pytest_qvl.session.first_errors import FirstErrors
    from pytest_qvl.session.gpu_access import GpuAccess
    from pytest_qvl.session.leaks import LeakVerdicts
    from pytest_qvl.session.limit_vram import VramLimits
    from pytest_qvl.session.model_state import ModelState
    from pytest_qvl.session.session_results import SessionResults
    from pytest_qvl.vram.meter import Meter

    stash = config.stash
    console = stash[CONSOLE_KEY] = Console(config)
    meter = stash[METER_KEY] = Meter()
    access = stash[ACCESS_KEY] = GpuAccess(config, settings, meter, console.announce)
    stash[DEVICE_KEY] = Device(settings, access, meter)
    model = stash[MODEL_KEY] = ModelState(console.progress, meter, access)
    errors = stash[FIRST_ERRORS_KEY] = FirstErrors()
    leaks = stash[LEAKS_KEY] = LeakVerdicts(meter, access, model, errors)
    limits = stash[LIMITS_KEY] = VramLimits(config, meter, default=settings.vram_limit, required=settings.require_gpu)
    results = stash[RESULTS_KEY] = ResultsBuilder()
    stash[SESSION_RESULTS_KEY] = SessionResults(results, limits, leaks, access)


def _register(config: pytest.Config, settings: Settings, *, writes_record: bool) -> None:
    """Register the plugins of this run; of those that listen to the same hook the last speaks first."""
    from pytest_qvl.report.terminal import Summary
    from pytest_qvl.session.fixture_scopes import FixtureScopes
    from pytest_qvl.session.gpu_errors import GpuFailures
    from pytest_qvl.session.installed import Installed
    from pytest_qvl.session.interrupts import Interrupts
    from pytest_qvl.session.suite_collection import ShippedSuite
    from pytest_qvl.session.vram_properties import PhaseNumbers
    from pytest_qvl.session.worker_crashes import WorkerCrashes

    register, stash = config.pluginmanager.register, config.stash
    register(ShippedSuite(), "qvl-suite")
    register(Installed(), "qvl-installed")
    register(FixtureScopes(config), "qvl-fixture-scopes")
    results = stash[RESULTS_KEY]
    register(WorkerCrashes(settings, config.rootpath, results), "qvl-worker-crashes")
    if settings.images is not None:
        from pytest_qvl.session.image_folder import ImageFolder

        register(ImageFolder(settings.images, settings.source("images")), "qvl-image-folder")
    register(results, "qvl-results")
    register(Summary(results), "qvl-summary")
    register(stash[LIMITS_KEY], "qvl-vram-limits")
    register(PhaseNumbers(stash[METER_KEY]), "qvl-vram-numbers")
    register(GpuFailures(stash[ACCESS_KEY], stash[METER_KEY]), "qvl-gpu-failures")
    register(stash[SESSION_RESULTS_KEY], "qvl-session-results")
    register(Interrupts(stash[CONSOLE_KEY].announce), "qvl-interrupts")
    if settings.record is not None and writes_record:
        from pytest_qvl.report.record import Record

        chosen = [*settings.described(), *_simulated(settings)]
        register(Record(settings.record, chosen, results), "qvl-record")
    if settings.require_gpu:
        from pytest_qvl.session.require_gpu import GpuRequired

        register(GpuRequired(results), "qvl-require-gpu")
    if settings.fault is not None:
        from pytest_qvl.session.fault_injection import Faulted, refuse_without_effect

        refuse_without_effect(settings)
        shared = stash[LEAKS_KEY].watch.making
        fault = Faulted(settings.fault, settings, stash[DEVICE_KEY].default_dtype, shared, results)
        register(fault, "qvl-fault")


def _let_plugins_override(config: pytest.Config) -> None:
    """Let fixtures of a module given with ``-p`` override ours, wherever it stands on the command line.

    Of two plugins' fixtures pytest takes those registered last, and entry points come after ``-p``.
    It learns of plugins by replaying their registrations at session start, and there ours comes first.
    """
    from pytest_qvl import fixtures

    history = config.pluginmanager.hook.pytest_plugin_registered._call_history
    if history is not None:
        history.sort(key=lambda call: call[0]["plugin"] is not fixtures)


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """``-n auto`` is the number of GPUs where the run asked for GPUs; else the answer is xdist's."""
    from pytest_qvl.gpu.visible import VisibleDevicesError, auto_workers
    from pytest_qvl.options import read_settings
    from pytest_qvl.session.mark_expressions import asks_for_gpus

    asked = config.getoption("numprocesses", None) == "auto" and asks_for_gpus(config, read_settings(config))
    try:
        return auto_workers(asked=asked)
    except VisibleDevicesError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Workers inherit the name of this run, so that one waits for another as long as that one runs."""
    from pytest_qvl.gpu.lease import join_session

    join_session()


def pytest_report_header(config: pytest.Config) -> list[str]:
    """What was chosen, and by whom."""
    from pytest_qvl.evidence import printable
    from pytest_qvl.options import SETTINGS_KEY
    from pytest_qvl.session import overrides, threads

    settings = config.stash[SETTINGS_KEY]
    lines = (
        ", ".join(settings.described()),
        *_simulated(settings),
        *threads.described(config),
        *overrides.described(config),
    )
    return [printable(f"qvl: {line}") for line in lines]


def _simulated(settings: Settings) -> list[str]:
    from pytest_qvl.session.targets import targets

    if settings.card is None or all(target.device == "cpu" for target in targets(settings)):
        return []
    from pytest_qvl.vram.cap import describe_cap

    return [describe_cap(settings.card)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that uses a model once per model and device."""
    from pytest_qvl.options import SETTINGS_KEY
    from pytest_qvl.session.targets import parametrize

    parametrize(metafunc, metafunc.config.stash[SETTINGS_KEY])
