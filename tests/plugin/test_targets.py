"""Which tests run on which device, which of them carry ``gpu``, and what a promised GPU makes of skips."""

from __future__ import annotations

import shutil

import pytest

from pytest_qvl.models.sources.embedded import embedded_model_dir

ON_MODELS = """
    import pytest
    def test_name(qvl_model): pass
    def test_plain(): pass
    @pytest.mark.gpu
    def test_card(): pytest.skip("no card here")
"""


def collected(result):
    return [line.partition("::")[2] for line in result.outlines if "::" in line]


def test_the_embedded_model_runs_on_both_devices_and_cuda_is_marked(pytester):
    pytester.makepyfile(ON_MODELS)
    everything = ["test_name[embedded-cpu]", "test_plain", "test_card", "test_name[embedded-cuda]"]
    assert sorted(collected(pytester.runpytest_inprocess("--collect-only", "-q"))) == sorted(everything)
    on_gpu = ["test_name[embedded-cuda]", "test_card"]
    assert sorted(collected(pytester.runpytest_inprocess("--collect-only", "-q", "-m", "gpu"))) == sorted(on_gpu)


@pytest.mark.parametrize(
    ("arguments", "ids"),
    [
        (["--qvl-device", "cuda"], ["embedded-cuda"]),
        (["--qvl-model", "Qwen/Qwen2.5-VL-7B-Instruct"], ["Qwen2.5-VL-7B-Instruct-cuda"]),
        (["--qvl-model", "synthetic:qwen2.5-vl-7b", "--qvl-device", "cpu"], ["qwen2.5-vl-7b-cpu"]),
        (["--qvl-model", "a/same", "--qvl-model", "b/same"], ["same-cuda", "same-cuda-2"]),
    ],
    ids=str,
)
def test_ids_are_short_and_unique(pytester, arguments, ids):
    for folder in ("a", "b"):
        shutil.copytree(embedded_model_dir(), pytester.path / folder / "same")
    pytester.makepyprojecttoml("[tool.pytest]\nstrict = true\n")
    pytester.makepyfile("def test_name(qvl_model): pass")
    result = pytester.runpytest_inprocess("--collect-only", "-q", *arguments)
    assert collected(result) == [f"test_name[{name}]" for name in ids]


def test_without_cuda_gpu_tests_are_skipped_with_the_reason_in_one_line(pytester, with_torch):
    pytester.makepyfile(ON_MODELS)
    result = pytester.runpytest_inprocess("-rs", "--qvl-device", "cuda")
    result.assert_outcomes(passed=1, skipped=2)
    lines = [line for line in result.outlines if line.startswith("qvl: embedded on cuda")]
    assert len(lines) == 1
    assert lines[0].startswith("qvl: embedded on cuda: 1 test not run: needs CUDA: ")


REQUIRED = """
    import pytest
    pytestmark = pytest.mark.gpu
    def test_runs(): pass
    @pytest.mark.skip(reason="left out on purpose")
    def test_out(): pass
    @pytest.mark.xfail(reason="known")
    def test_known(): assert False
    def test_undecided():
        from pytest_qvl.evidence import CannotJudge
        raise CannotJudge("a uniform picture")
"""


def test_a_required_gpu_makes_a_skip_an_error(pytester, with_torch):
    pytester.makepyfile(test_a=ON_MODELS, test_b=REQUIRED)
    result = pytester.runpytest_inprocess("--qvl-require-gpu", "--qvl-device", "cuda", "-rE")
    result.assert_outcomes(passed=2, failed=1, errors=1, skipped=2, xfailed=1)
    result.stdout.fnmatch_lines_random(
        ["*--qvl-require-gpu: a GPU test was skipped: no card here*", "*a GPU test was skipped: needs CUDA: *"]
    )
    result.stdout.fnmatch_lines(
        ["qvl: --qvl-require-gpu: no GPU test was executed: 2 marked gpu ran and allocated nothing on CUDA"]
    )


def test_a_required_gpu_makes_a_run_without_gpu_tests_fail(pytester):
    pytester.makepyfile("import os\ndef test_plain(): pass\n")
    pytester.makeini("[pytest]\nqvl_require_gpu = true")
    result = pytester.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["qvl: --qvl-require-gpu: no GPU test was executed", "*1 passed*"])
    assert pytester.runpytest_inprocess("-k", "nothing").ret == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize(
    "listing", ["--collect-only", "--help", "--markers", "--fixtures", "--setup-plan", "--version"]
)
def test_a_required_gpu_is_silent_where_nothing_runs(pytester, monkeypatch, listing):
    monkeypatch.setenv("QVL_REQUIRE_GPU", "1")
    pytester.makepyfile("def test_plain(): pass")
    result = pytester.runpytest_inprocess(listing)
    assert result.ret == 0
    result.stdout.no_fnmatch_line("*no GPU test was executed*")
