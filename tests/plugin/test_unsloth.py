"""A process that runs Unsloth imports it before everything else; who does not run it does not import it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: 2026.10.9\n"
PACKAGE = """
    import os, sys, warnings
    warnings.warn("a warning of its own")
    print("BANNER")
    there = [name for name in ("torch", "transformers", "peft", "conftest") if name in sys.modules]
    ORDER = f"{there} {os.environ['CUDA_VISIBLE_DEVICES'][:4]} {os.environ['UNSLOTH_COMPILE_LOCATION']}"
"""
A_GPU = """
    from pytest_qvl.gpu import visible
    from pytest_qvl.gpu.nvml import Gpu
    gpu = Gpu("GPU-00000000-0000-0000-0000-000000000001", 0, "NVIDIA T4", 15 * 2**30)
    visible.visible_gpus = lambda: visible.Visible((gpu,))
"""
CONFTEST = """
    import os, pathlib, sys
    order = getattr(sys.modules.get("unsloth"), "ORDER", "not imported")
    with pathlib.Path(__file__).with_name("seen.txt").open("a") as seen:
        print(order, file=seen)
"""
TEST = """
    import pytest
    @pytest.fixture(scope="session")
    def qvl_target(request): return request.param
    def test_it(qvl_backend): pass
"""


@pytest.fixture(autouse=True)
def _installed(pytester, monkeypatch):
    monkeypatch.setenv("CI", "true")  # lines of the summary in full
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "pytest_qvl.plugin")
    monkeypatch.setenv("QVL_GPU_LEASES", str(pytester.mkdir("leases")))
    for name in ("CUDA_VISIBLE_DEVICES", "UNSLOTH_COMPILE_LOCATION", "PYTEST_XDIST_WORKER"):
        monkeypatch.delenv(name, raising=False)
    packages = pytester.mkdir("packages")
    for name in ("unsloth", "unsloth_zoo"):
        info = packages / f"{name}-2026.10.9.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(METADATA.format(name=name))
    pytester.makepyfile(**{"packages/unsloth/__init__": PACKAGE, "a_gpu": A_GPU, "test_it": TEST})
    folders = (Path(__file__).parents[2], packages, pytester.path)
    monkeypatch.setenv("PYTHONPATH", ":".join(map(str, folders)))
    pytester.makeconftest(CONFTEST)


@pytest.fixture
def light_torch(monkeypatch):
    """Torch's stand-in, as a build without CUDA: importing the real one takes most of the time where it is not used."""
    monkeypatch.setenv("MACHINE", '{"gpus": [], "cuda": null}')
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).with_name("machine")), prepend=":")


def seen(pytester):
    file = pytester.path / "seen.txt"
    lines = file.read_text().splitlines()
    file.unlink()
    return lines


@pytest.mark.parametrize(
    ("arguments", "imports", "torch"),
    [
        pytest.param(["--qvl-backend", "unsloth", "-s"], [True], "real", marks=pytest.mark.slow),
        (["--qvl-backend", "transformers", "--qvl-backend", "unsloth"], [False, False, True], "light"),
        (["--qvl-backend", "unsloth", "--collect-only"], [False], "light"),
        pytest.param(
            ["--qvl-backend", "unsloth", "-p", "xdist", "-n", "1"], [False, True], "real", marks=pytest.mark.slow
        ),
    ],
    ids=["alone", "in its process", "collecting", "in a worker"],
)
def test_it_is_imported_first_where_its_tests_run_and_nowhere_else(pytester, request, arguments, imports, torch):
    if torch == "light":
        request.getfixturevalue("light_torch")
    result = pytester.runpytest_subprocess("-p", "a_gpu", "--qvl-device", "cuda", "-W", "error", *arguments)
    assert result.ret == 0
    lines = seen(pytester)
    assert [line != "not imported" for line in lines] == imports
    for line in filter(lambda line: line != "not imported", lines):
        there, folder = re.fullmatch(r"(\[.*\] GPU-) (/.*/compiled)", line).groups()
        assert there == "[] GPU-"
        assert not Path(folder).parent.exists()
    assert "BANNER" not in result.stdout.str()


@pytest.mark.parametrize("beside", [[], ["--qvl-backend", "transformers"]], ids=["alone", "beside the baseline"])
def test_workers_that_would_wait_for_one_gpu_are_refused(pytester, light_torch, beside):
    arguments = ["-p", "a_gpu", "-p", "xdist", "-n", "2", "--qvl-device", "cuda", *beside, "--qvl-backend", "unsloth"]
    result = pytester.runpytest_subprocess(*arguments)
    says = "backend 'unsloth' takes its GPU when a process starts, so 2 workers need as many GPUs, and 1 may be used; *"
    result.stderr.fnmatch_lines([f"ERROR: {says}"])
    if beside:
        result.assert_outcomes(skipped=1, failed=1)
    else:
        assert result.ret == pytest.ExitCode.USAGE_ERROR


def test_the_baseline_before_it_is_one_clear_error(pytester, light_torch):
    pytester.makepyfile(too_early="import sys, types\nsys.modules['peft'] = types.ModuleType('peft')")
    result = pytester.runpytest_subprocess("-p", "too_early", "--qvl-backend", "unsloth")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: Unsloth has to be imported before what it patches, and peft had been *"])
    pytester.makeini("[pytest]\nqvl_backend =\n  transformers\n  unsloth")
    result = pytester.runpytest_subprocess("-p", "too_early", "-rf", "--qvl-device", "cuda")
    result.stdout.fnmatch_lines(
        ["FAILED *[[]embedded-cuda-unsloth]* - not run: backend unsloth's process stopped: Unsloth has *"]
    )
    result.stderr.fnmatch_lines(["ERROR: Unsloth has to be imported before *"])


def test_without_a_gpu_its_tests_are_skipped_with_the_reason(pytester, monkeypatch, light_torch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    pytester.makepyfile(test_it="def test_it(qvl_backend): pass")
    result = pytester.runpytest_subprocess("--qvl-backend", "unsloth", "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED *: needs CUDA: *"])
    assert seen(pytester) == ["not imported"]


def test_a_missing_unsloth_is_one_clear_error(pytester, monkeypatch):
    monkeypatch.setattr("pytest_qvl.models.backends.unsloth_start._version", lambda package: None)
    result = pytester.runpytest_inprocess("--qvl-backend", "unsloth")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --qvl-backend: backend 'unsloth' needs Unsloth, *pip install *'unsloth>=*"])


@pytest.mark.parametrize(
    "beside",
    [
        pytest.param([], id="alone"),
        pytest.param(["--qvl-backend", "transformers"], id="beside the baseline", marks=pytest.mark.slow),
    ],
)
def test_an_import_that_fails_in_a_worker_ends_the_run_in_one_sentence(pytester, light_torch, beside):
    pytester.makepyfile(**{"packages/unsloth/__init__": "raise ImportError('no kernel here')"})
    arguments = ["-p", "a_gpu", "-p", "xdist", "-n", "1", "--qvl-device", "cuda", *beside, "--qvl-backend", "unsloth"]
    result = pytester.runpytest_subprocess(*arguments, timeout=60)
    says = "Unsloth could not be imported: ImportError: no kernel here"
    assert result.stderr.str().splitlines().count(f"ERROR: {says}") == 1
    result.stdout.no_fnmatch_line("*INTERNALERROR*")
    if beside:
        result.assert_outcomes(skipped=1, failed=1)
        result.stdout.fnmatch_lines([f"FAILED *[[]embedded-cuda-unsloth]* - not run: * stopped: {says}"])
    else:
        assert result.ret == pytest.ExitCode.USAGE_ERROR
