"""The objects of a session and how they are put together: the one place that knows all of them.

The order in which hooks are called can be read here: pluggy calls plugins in reverse order of registration, so of two
in :func:`register_plugins` the lower is called first, after hooks marked ``tryfirst`` and before those marked
``trylast``. :mod:`pytest_qvl.session.phases` was registered together with the plugin, and is called after all of them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_qvl.report.run_results import ResultsBuilder
from pytest_qvl.report.terminal import Summary
from pytest_qvl.session.console import Console
from pytest_qvl.session.device import Device
from pytest_qvl.session.first_errors import FirstErrors
from pytest_qvl.session.fixture_scopes import FixtureScopes
from pytest_qvl.session.gpu_access import GpuAccess
from pytest_qvl.session.gpu_errors import GpuFailures
from pytest_qvl.session.header import simulated_card
from pytest_qvl.session.installed import Installed
from pytest_qvl.session.interrupts import Interrupts, UntilWritten
from pytest_qvl.session.keys import (
    ACCESS_KEY,
    CONSOLE_KEY,
    DEVICE_KEY,
    FIRST_ERRORS_KEY,
    LEAKS_KEY,
    LIMITS_KEY,
    METER_KEY,
    MODEL_KEY,
    PROBES_KEY,
    RESULTS_KEY,
    RUN_RECORD_KEY,
    SESSION_VERDICTS_KEY,
)
from pytest_qvl.session.leaks import LeakVerdicts
from pytest_qvl.session.limit_vram import VramLimits
from pytest_qvl.session.model_state import ModelState
from pytest_qvl.session.session_limits import SessionLimits
from pytest_qvl.session.session_verdicts import SessionVerdicts
from pytest_qvl.session.suite_collection import ShippedSuite
from pytest_qvl.session.vram_properties import PhaseNumbers
from pytest_qvl.session.worker_crashes import WorkerCrashes
from pytest_qvl.vram.meter import Meter

if TYPE_CHECKING:
    from pytest_qvl.options import Settings
    from pytest_qvl.report.record import RunRecord


def make_objects(config: pytest.Config, settings: Settings) -> None:
    """Make the objects of a session, from those that need none to those that need many."""
    stash = config.stash
    console = stash[CONSOLE_KEY] = Console(config)
    meter = stash[METER_KEY] = Meter()
    access = stash[ACCESS_KEY] = GpuAccess(config, settings, meter, console.announce)
    stash[DEVICE_KEY] = Device(settings, access, meter)
    model = stash[MODEL_KEY] = ModelState(console.progress, meter, access)
    errors = stash[FIRST_ERRORS_KEY] = FirstErrors()
    leaks = stash[LEAKS_KEY] = LeakVerdicts(meter, access, model, errors)
    limits = stash[LIMITS_KEY] = SessionLimits(meter)
    results = stash[RESULTS_KEY] = ResultsBuilder()
    subjects = None
    if any(chosen is not None for chosen in (settings.record, settings.compare, settings.html)):
        from pytest_qvl.session.subjects import Subjects

        subjects = Subjects()
        config.pluginmanager.register(subjects, "qvl-subjects")
    probes = None
    if settings.html is not None:
        from pytest_qvl.session.probe_replies import ProbeReplies

        probes = stash[PROBES_KEY] = ProbeReplies()
        config.pluginmanager.register(probes, "qvl-probe-replies")
    stash[SESSION_VERDICTS_KEY] = SessionVerdicts(results, limits, leaks, access, subjects=subjects, probes=probes)


def register_plugins(config: pytest.Config, settings: Settings, *, writes_record: bool) -> None:
    """Register the plugins of this run; of two that implement the same hook, pluggy calls the later one first."""
    register, stash = config.pluginmanager.register, config.stash
    register(ShippedSuite(), "qvl-suite")
    register(Installed(), "qvl-installed")
    if settings.known_failures:
        from pytest_qvl.session.known_failures import KnownFailureMarks

        register(KnownFailureMarks(settings, stash[RESULTS_KEY]), "qvl-known-failures")
    register(FixtureScopes(config), "qvl-fixture-scopes")
    results = stash[RESULTS_KEY]
    register(WorkerCrashes(settings, config.rootpath, results), "qvl-worker-crashes")
    if settings.images is not None:
        from pytest_qvl.session.image_folder import ImageFolder

        register(ImageFolder(settings.images, settings.source("images")), "qvl-image-folder")
    register(results, "qvl-results")
    if settings.compare is not None and writes_record:
        from pytest_qvl.report.base_comparison import BaseComparison

        register(BaseComparison(settings.compare, _run_record(config, settings)), "qvl-compare")
    register(Summary(results), "qvl-summary")
    limits = VramLimits(config, stash[METER_KEY], default=settings.vram_limit, required=settings.require_gpu)
    register(limits, "qvl-vram-limits")
    register(stash[LIMITS_KEY], "qvl-session-limits")
    register(PhaseNumbers(stash[METER_KEY]), "qvl-vram-numbers")
    register(GpuFailures(stash[ACCESS_KEY], stash[METER_KEY]), "qvl-gpu-failures")
    register(stash[SESSION_VERDICTS_KEY], "qvl-session-results")
    interrupts = Interrupts(stash[CONSOLE_KEY].announce)
    register(interrupts, "qvl-interrupts")
    if writes_record:
        _register_reports(config, settings)
    register(UntilWritten(interrupts), "qvl-until-written")
    if settings.require_gpu:
        from pytest_qvl.session.require_gpu import GpuRequired

        register(GpuRequired(results), "qvl-require-gpu")
    if settings.fault is not None:
        from pytest_qvl.session.fault_injection import Faulted, refuse_without_effect

        refuse_without_effect(settings)
        shared = stash[LEAKS_KEY].watch.making
        subjects = config.pluginmanager.get_plugin("qvl-subjects")
        dtype = stash[DEVICE_KEY].default_dtype
        fault = Faulted(settings.fault, settings, dtype, shared, results, subjects=subjects)
        register(fault, "qvl-fault")


def _run_record(config: pytest.Config, settings: Settings) -> RunRecord:
    """The record of the run, made for the first that asks: most runs neither write nor compare one."""
    from pytest_qvl.report.record import RunRecord

    stash = config.stash
    if RUN_RECORD_KEY not in stash:
        chosen = [*settings.described(), *simulated_card(settings)]
        stash[RUN_RECORD_KEY] = RunRecord(stash[RESULTS_KEY], chosen, settings.listed())
    return stash[RUN_RECORD_KEY]


def _register_reports(config: pytest.Config, settings: Settings) -> None:
    """What is written at the end of the run, by the process that was started."""
    register = config.pluginmanager.register
    if settings.record is not None and settings.record == settings.html:
        raise pytest.UsageError(
            f"qvl_html ({settings.source('html')}): {str(settings.html)!r} is the record's file too, which the report "
            "would replace: name another one"
        )
    if settings.html is not None:
        from pytest_qvl.report.page import Page

        register(Page(settings.html, _run_record(config, settings)), "qvl-html")
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        from pytest_qvl.report.github import StepSummary

        register(StepSummary(Path(summary), _run_record(config, settings)), "qvl-step-summary")
    if settings.record is not None:  # last, since a report that cannot be written turns the run red
        from pytest_qvl.report.record import Record

        register(Record(settings.record, _run_record(config, settings)), "qvl-record")
