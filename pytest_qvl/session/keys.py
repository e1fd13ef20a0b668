"""Where the objects of a session are found: what hangs on pytest's configuration, and what hangs on a test.

Only names and types; :mod:`pytest_qvl.session.composition` makes the objects, or the module that they belong to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_qvl.report.record import RunRecord
    from pytest_qvl.report.report_data import LimitOutcome
    from pytest_qvl.report.run_results import ResultsBuilder
    from pytest_qvl.session.console import Console
    from pytest_qvl.session.device import Device
    from pytest_qvl.session.first_errors import FirstErrors
    from pytest_qvl.session.gpu_access import GpuAccess
    from pytest_qvl.session.leaks import LeakVerdicts
    from pytest_qvl.session.model_state import ModelState
    from pytest_qvl.session.probe_replies import ProbeReplies
    from pytest_qvl.session.session_limits import SessionLimits
    from pytest_qvl.session.session_verdicts import SessionVerdicts
    from pytest_qvl.vram.meter import Meter, Phase

# ---- on the configuration: one of each per process ---------------------------------------------------------

CONSOLE_KEY: pytest.StashKey[Console] = pytest.StashKey()
METER_KEY: pytest.StashKey[Meter] = pytest.StashKey()
ACCESS_KEY: pytest.StashKey[GpuAccess] = pytest.StashKey()
DEVICE_KEY: pytest.StashKey[Device] = pytest.StashKey()
MODEL_KEY: pytest.StashKey[ModelState] = pytest.StashKey()
FIRST_ERRORS_KEY: pytest.StashKey[FirstErrors] = pytest.StashKey()
LEAKS_KEY: pytest.StashKey[LeakVerdicts] = pytest.StashKey()
LIMITS_KEY: pytest.StashKey[SessionLimits] = pytest.StashKey()
RESULTS_KEY: pytest.StashKey[ResultsBuilder] = pytest.StashKey()
SESSION_VERDICTS_KEY: pytest.StashKey[SessionVerdicts] = pytest.StashKey()
# Only where a report is asked for.
PROBES_KEY: pytest.StashKey[ProbeReplies] = pytest.StashKey()
RUN_RECORD_KEY: pytest.StashKey[RunRecord] = pytest.StashKey()
# Arguments of the run that starts over, where the rootdir was misled.
AGAIN_KEY: pytest.StashKey[list[str]] = pytest.StashKey()

# ---- on a test ---------------------------------------------------------------------------------------------

# Every fixture that it uses.
FIXTURE_NAMES_KEY: pytest.StashKey[frozenset[str]] = pytest.StashKey()
# What it raised; frames of these are let go when everybody has seen them.
RAISED_KEY: pytest.StashKey[list[BaseException]] = pytest.StashKey()
# Those of them that are a failed allocation, until its teardown.
OUT_OF_MEMORY_KEY: pytest.StashKey[list[BaseException]] = pytest.StashKey()
# Bytes that torch had given out on CUDA before its first fixture.
GIVEN_OUT_KEY: pytest.StashKey[int] = pytest.StashKey()
# Its limits on VRAM: the measurement under way, results not yet sent, and results without a measurement.
TEST_PHASE_KEY: pytest.StashKey[Phase] = pytest.StashKey()
VRAM_OUTCOMES_KEY: pytest.StashKey[list[LimitOutcome]] = pytest.StashKey()
UNMEASURED_KEY: pytest.StashKey[list[LimitOutcome]] = pytest.StashKey()
