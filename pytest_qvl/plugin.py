"""The hooks that pytest calls first: options, settings, the public fixtures, the header, and targets of tests.

The objects of a session are put together in :mod:`pytest_qvl.session.composition`, and what happens around a test is in
:mod:`pytest_qvl.session.phases`. Importing this module imports pytest only; each hook imports what it needs when it is
called.
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("pytest_qvl.checks", "pytest_qvl.suite")


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
    from pytest_qvl.options import SETTINGS_KEY, read_settings
    from pytest_qvl.processes import child, import_first
    from pytest_qvl.session import composition, warning_filters
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
    composition.make_objects(config, settings)
    if len(settings.backend) > 1:
        from pytest_qvl.processes import parent

        parent.start_backends(config, settings)
    _register_fixtures(config)
    composition.register_plugins(config, settings, writes_record=backend is None and not hasattr(config, "workerinput"))


def _register_fixtures(config: pytest.Config) -> None:
    """Register the public fixtures; those of a module given with ``-p`` override them, wherever it is named.

    Of two plugins' fixtures pytest takes those registered last, and entry points come after ``-p``.
    It learns of plugins by replaying their registrations at session start, and there ours comes first.
    """
    from pytest_qvl import fixtures

    config.pluginmanager.register(fixtures, "qvl-fixtures")
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
    from pytest_qvl.session.header import header_lines

    return header_lines(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that uses a model once per model and device."""
    from pytest_qvl.options import SETTINGS_KEY
    from pytest_qvl.session.targets import parametrize

    parametrize(metafunc, metafunc.config.stash[SETTINGS_KEY])
