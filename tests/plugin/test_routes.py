"""Every way in and out of the plugin, and every plugin and ini that may stand beside it."""

from __future__ import annotations

import pytest

UNRELATED = """
    import unittest

    def test_plain(tmp_path): assert tmp_path.is_dir()

    class TestCase(unittest.TestCase):
        def setUp(self): self.ready = True
        def test_method(self): self.assertTrue(self.ready)
        @unittest.skip("not today")
        def test_skipped(self): raise AssertionError

    def documented():
        '''
        >>> documented()
        42
        '''
        return 42
"""


@pytest.fixture
def unrelated(pytester):
    """Tests that have nothing to do with the plugin."""
    pytester.makepyfile(test_unrelated=UNRELATED)


def test_without_the_plugin_nothing_of_it_is_left(pytester, unrelated):
    pytester.makepyfile(test_fixture="def test_it(qvl_model): pass")
    result = pytester.runpytest_inprocess("-p", "no:qvl", "--doctest-modules")
    result.assert_outcomes(passed=3, skipped=1, errors=1)
    result.stdout.fnmatch_lines(["*fixture 'qvl_model' not found*"])
    assert "qvl:" not in result.stdout.str()
    assert pytester.runpytest_inprocess("-p", "no:qvl", "--qvl-seed", "1").ret == pytest.ExitCode.USAGE_ERROR


@pytest.mark.parametrize(
    ("autoload", "arguments"),
    [
        (True, []),
        (True, ["-p", "qvl"]),
        (False, ["-p", "qvl"]),
        (False, ["-p", "pytest_qvl.plugin"]),
        (True, ["-p", "no:xdist"]),
        (True, ["-p", "no:cacheprovider", "-p", "no:warnings", "-s"]),
    ],
    ids=str,
)
def test_unrelated_tests_pass_by_every_route(pytester, unrelated, monkeypatch, autoload, arguments):
    if not autoload:
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    # By its module the plugin is already imported here, which pytest 9.0 warns of.
    strict = [] if "pytest_qvl.plugin" in arguments else ["-W", "error"]
    result = pytester.runpytest_inprocess(*arguments, *strict, "--doctest-modules")
    result.assert_outcomes(passed=3, skipped=1)
    result.stdout.fnmatch_lines(["qvl: model embedded (default)"])
    result.stdout.no_fnmatch_line("*does QLoRA*")


def test_by_module_beside_the_entry_point_is_pytests_own_error(pytester, unrelated):
    """Documented: ``-p pytest_qvl.plugin`` is for runs without autoload."""
    result = pytester.runpytest_subprocess("-p", "pytest_qvl.plugin")
    assert result.ret != 0
    result.stderr.fnmatch_lines(["*Plugin already registered*"])


@pytest.mark.parametrize("ini", ["strict = true", 'addopts = ["--strict-markers"]'])
def test_strict_runs_know_the_marks(pytester, run_light, ini):
    pytester.makepyprojecttoml(f"[tool.pytest]\n{ini}\nfilterwarnings = ['error']")
    pytester.makepyfile("import pytest\n@pytest.mark.gpu\ndef test_it(qvl_model): assert qvl_model == 'embedded'")
    run_light().assert_outcomes(passed=1)


def test_marks_are_listed(pytester):
    result = pytester.runpytest_inprocess("--markers")
    result.stdout.fnmatch_lines(["@pytest.mark.gpu: the test executes on CUDA"])


def test_two_workers(run_apart, unrelated):
    result = run_apart("-n", "2", "--doctest-modules", "-W", "error", plugins=["xdist"])
    result.assert_outcomes(passed=3, skipped=1)


def test_a_benchmark_beside(pytester, run_light):
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    pytester.makepyfile("def test_it(benchmark, qvl_model): assert benchmark(len, qvl_model) == 8")
    run_light().assert_outcomes(passed=1)


def test_noise_of_other_packages_is_silenced_narrowly(pytester, run_light):
    pytester.makepyfile(
        """
    import logging, warnings, pytest
    def noise(message="`torch.jit.script_method` is deprecated. Please", module="torch.jit._script"):
        warnings.warn_explicit(message, DeprecationWarning, "x.py", 1, module=module)
    def test_beside_a_model(qvl_model, caplog):
        noise()
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward from %s", 1)
        assert not caplog.records
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load anything else")
        assert len(caplog.records) == 1
    def test_another_message(qvl_model): noise(message="`torch.jit.load` is deprecated")
    def test_another_module(qvl_model): noise(module="mine")
    def test_no_model(): noise()
    """
    )
    result = run_light("-W", "error", "-rf")
    result.assert_outcomes(passed=1, failed=3)
    result.stdout.fnmatch_lines_random(
        [f"FAILED *::test_{n}*" for n in ("another_message", "another_module", "no_model")]
    )
    pytester.makepyprojecttoml('[tool.pytest]\nfilterwarnings = ["error"]')
    run_light().assert_outcomes(passed=2, failed=2)
