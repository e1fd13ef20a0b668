"""The shipped suite is collected whatever the user's ini says, and says which overrides do not reach it."""

from __future__ import annotations

import json

import pytest

SUITE = ("--pyargs", "pytest_qvl.suite")


def suite_tests(result):
    return [line for line in result.outlines if "::test_" in line]


@pytest.fixture(scope="module")
def expected():
    """Names of the suite's test functions, read from its files."""
    import re
    from pathlib import Path

    import pytest_qvl.suite

    (folder,) = map(Path, pytest_qvl.suite.__path__)
    texts = [file.read_text(encoding="utf-8") for file in folder.glob("test_*.py")]
    return {name for text in texts for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}


@pytest.mark.parametrize(
    "ini",
    [
        "",
        'python_files = ["check_*.py"]',
        'python_functions = ["check_*"]\npython_classes = ["Check*"]',
        'strict = true\nfilterwarnings = ["error"]\nnorecursedirs = ["suite", "site-packages"]',
        'addopts = ["--import-mode=importlib"]\ntestpaths = ["elsewhere"]',
    ],
)
def test_the_suite_is_collected_under_any_ini(pytester, run_light, expected, ini):
    pytester.makepyprojecttoml(f"[tool.pytest]\n{ini}\n")
    result = run_light("--collect-only", "-q", *SUITE)
    assert result.ret == 0
    found = suite_tests(result)
    assert {line.partition("::")[2].partition("[")[0] for line in found} == expected
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    "arguments", [["{folder}"], ["{folder}/test_vision.py"], ["--pyargs", "pytest_qvl.suite.test_vision"]]
)
def test_named_by_path_or_module_nothing_is_collected_twice(pytester, run_light, arguments):
    from pytest_qvl.session.suite_collection import FOLDER

    pytester.makeini("[pytest]\npython_files = check_*.py")
    result = run_light("--collect-only", "-q", *(a.format(folder=FOLDER) for a in arguments), "-k", "vision_stability")
    assert len(suite_tests(result)) == 1


def test_an_empty_suite_is_an_error(pytester, run_light, run_apart):
    pytester.makepyfile("def test_own(): pass")
    empty = ("--ignore-glob", "/*/suite/test_*", ".", *SUITE)
    result = run_light(*empty)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["pytest_qvl.suite: nothing was collected here, so nothing would be proved; *"])
    result = run_apart(*empty, "-n", "2", plugins=["xdist"])
    result.assert_outcomes(errors=1, passed=1)
    assert result.ret != 0
    result.stdout.no_fnmatch_line("*INTERNALERROR*")


@pytest.mark.parametrize("selection", [["-k", "own"], ["-m", "gpu"], ["--deselect", "{suite}"], ["--lf"]], ids=str)
def test_what_the_user_deselects_is_no_error(pytester, run_light, selection):
    from pytest_qvl.session.suite_collection import FOLDER

    pytester.makepyfile("def test_own(): assert False")
    run_light("test_what_the_user_deselects_is_no_error.py")
    arguments = [argument.format(suite=FOLDER) for argument in selection]
    result = run_light("--collect-only", *arguments, ".", *SUITE)
    assert result.ret in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)


STAND_IN = """
    import pytest
    @pytest.fixture(scope="session")
    def qvl_quantized_model(): return object()
    @pytest.fixture(scope="session")
    def qvl_processor(): return "{where}"
    @pytest.fixture(scope="session")
    def row_samples(): return []
"""
ONE = ("-k", "quantization_census or test_own", "--tb=line")


def test_overrides_reach_the_suite_from_the_rootdir_and_from_a_module(pytester, run_light, real_stack):
    see = "    def pytest_fixture_setup(fixturedef): print('SETUP', fixturedef.argname, fixturedef.func.__module__)\n"
    pytester.makeini("[pytest]")
    pytester.makeconftest(STAND_IN + see)
    result = run_light("-s", *ONE, *SUITE)
    result.stdout.fnmatch_lines(["*SETUP qvl_quantized_model conftest*"])
    pytester.makeconftest("")
    pytester.makepyfile(overriding=STAND_IN + see)
    pytester.syspathinsert()
    result = run_light("-s", "-p", "overriding", *ONE, *SUITE)
    result.stdout.fnmatch_lines(["*SETUP qvl_quantized_model overriding*"])


def test_a_collator_of_the_users_own_is_judged(pytester, run_real):
    """Left-padded, on the CPU, with the answers of the last two rows exchanged."""
    pytester.makeconftest(
        """
    import pytest
    from dataclasses import replace
    from pytest_qvl.samples import make_batch
    @pytest.fixture(scope="session")
    def qvl_training_batch(qvl_processor):
        def collate(samples):
            *rest, one, other = samples
            swapped = [*rest, replace(one, answer=other.answer), replace(other, answer=one.answer)]
            return make_batch(qvl_processor, swapped, answers=True)
        return collate
    """
    )
    result = run_real("-k", "training_collation", *SUITE)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*is taught *(of row * where its answer is *keep each answer with its own prompt*"])


@pytest.mark.parametrize("order", [("own", *SUITE), (*SUITE, "own")], ids=["before", "after"])
def test_an_override_that_does_not_reach_the_suite_is_named(pytester, run_light, real_stack, order):
    pytester.makeini("[pytest]")
    pytester.makeconftest(STAND_IN)
    pytester.makepyfile(**{"own/conftest": STAND_IN, "own/test_own": "def test_own(qvl_quantized_model): pass"})
    result = run_light(*ONE, *order, "-W", "default")
    lines = [line for line in result.outlines if "overrides qvl_quantized_model" in line]
    assert len(lines) == 1
    assert f"{pytester.path}/own/conftest.py overrides qvl_quantized_model for the tests below it, but not" in lines[0]
    result = run_light(*ONE, *order, "-W", "error")
    result.stdout.fnmatch_lines(["E *OverrideWarning: *own/conftest.py overrides qvl_quantized_model*"])
    result.stdout.no_fnmatch_line("*INTERNALERROR*")


def test_an_override_in_a_test_module_is_its_own_affair(pytester, run_light, real_stack):
    pytester.makeconftest(STAND_IN)
    pytester.makepyfile(test_own=STAND_IN + "    def test_own(qvl_quantized_model): pass\n")
    assert "for the tests below it" not in run_light(*ONE, ".", *SUITE).stdout.str()


VARIANTS = """
    import pytest
    @pytest.fixture(scope="session", params=["first", pytest.param(2.5, id="second")])
    def qvl_adapter(request): return request.param
    @pytest.fixture(scope="session", params=[object()])
    def anything(request): pass
    @pytest.fixture(scope="session")
    def qvl_quantized_model(qvl_target, qvl_adapter, anything): pytest.fail(f"with {qvl_adapter}", pytrace=False)
"""


def test_each_parameter_of_an_overriding_fixture_has_a_table_of_its_own(pytester, run_light):
    pytester.makeini("[pytest]")
    pytester.makeconftest(VARIANTS)
    result = run_light(
        "-k", "checkpoint_complete or (mrope_positions and not (training or videos))", "--qvl-record", "r.json", *SUITE
    )
    result.assert_outcomes(errors=6)
    result.stdout.fnmatch_lines(
        [
            "embedded on cpu, qvl_adapter first, anything0",
            "       error: mrope_positions: Failed: with first",
            "embedded on cpu, qvl_adapter second, anything0",
            "       error: mrope_positions: Failed: with 2.5",
        ]
    )
    promises = json.loads((pytester.path / "r.json").read_text())["promises"]
    assert len({promise["target"] for promise in promises}) == 2


CRASHING = """
    import os, pytest
    @pytest.fixture(scope="session")
    def qvl_quantized_model(qvl_target): {setup}
    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(item): {call}
"""
CRASH, PASS = "os._exit(1)", "pass"


@pytest.mark.parametrize(("setup", "call"), [(CRASH, PASS), (PASS, CRASH)], ids=["setup", "call"])
def test_a_check_whose_worker_crashed_is_an_error_of_its_promise(pytester, run_apart, setup, call):
    pytester.makeini("[pytest]")
    pytester.makepyfile(crashing=CRASHING.format(setup=setup, call=call))
    arguments = ("-n", "1", "--qvl-device", "cpu", "-k", "checkpoint_complete", "--qvl-record", "r.json")
    result = run_apart(*arguments, *SUITE, plugins=["crashing", "xdist"])
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "*does QLoRA leave the model seeing?*",
            "embedded on cpu",
            "    1  quantized where it should be * error",
            "       error: checkpoint_complete: worker 'gw0' crashed while running *",
            "   verdict: could not be judged: *",
        ]
    )
    record = json.loads((pytester.path / "r.json").read_text())
    assert (record["promises"][0]["target"], record["promises"][0]["state"]) == ("embedded on cpu", "error")
    assert {key for one in record["seconds_by_test"] for key in one} <= {"target", "test", "setup"}
