"""Workers share the cores; who has chosen a number of threads is left alone, and so is who uses no model."""

from __future__ import annotations

import os

import pytest

import pytest_qvl.session.threads as threads
from pytest_qvl.session.threads import share

SEES = """
    import os, sys
    def test_before(): print("BEFORE", os.environ.get("OMP_NUM_THREADS"))
    def test_uses_a_model(qvl_model):
        print("TORCH", "torch" in sys.modules)
        print("SEES", os.environ.get("OMP_NUM_THREADS"))
"""
OBEYS = """
        import torch
        print("OBEYS", torch.get_num_threads())
"""


@pytest.mark.parametrize(("cores", "workers", "each"), [(2, 2, 1), (8, 2, 4), (8, 3, 2), (2, 16, 1)])
def test_share(monkeypatch, cores, workers, each):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: range(cores))
    assert share(workers) == each


@pytest.mark.parametrize("chosen", [None, pytest.param("OMP_NUM_THREADS", marks=pytest.mark.slow)])
def test_workers_share_the_cores(pytester, monkeypatch, run_apart, chosen):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    if chosen:
        monkeypatch.setenv(chosen, str(cores + 1))
    pytester.makepyfile(SEES if chosen else SEES + OBEYS)
    result = run_apart("-n", "2", "--dist", "loadfile", "--qvl-device", "cpu", "-rP", plugins=["xdist"])
    result.assert_outcomes(passed=2)
    line = f"qvl: 2 workers with {share(2)} thread* each where they use a model (OMP_NUM_THREADS is not set)"
    if chosen:
        result.stdout.fnmatch_lines([f"SEES {cores + 1}"])
        result.stdout.no_fnmatch_line(line)
    else:
        result.stdout.fnmatch_lines([line, "BEFORE None", "TORCH False", f"SEES {share(2)}", f"OBEYS {share(2)}"])


def test_one_process_keeps_its_threads(pytester, monkeypatch, run_light):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    pytester.makepyfile("import os\ndef test_it(qvl_model): assert 'OMP_NUM_THREADS' not in os.environ")
    result = run_light()
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*workers with*")
