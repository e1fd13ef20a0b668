"""What checks find out on its way from a test to the terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

KEEPS = """
    def judge(name, value):
        from pytest_qvl.evidence import Judge
        judge = Judge(name, "promise")
        judge.at_most("drift", value, 1.0, else_say="the logits drift")
        return judge.verdict()
"""


def said(result):
    """Lines of the plugin below the header and the versions."""
    lines = [line for line in result.outlines if line.startswith("qvl: ")]
    return [line for line in lines[1:] if not line.lower().startswith("qvl: transformers ")]


def test_a_users_own_checks_take_one_line_per_model(pytester, run_light):
    pytester.makepyfile(
        KEEPS
        + """
    import pytest
    from pytest_qvl.evidence import CannotJudge, CheckFailed
    def test_kept(qvl_target): judge("alignment", 0.5); judge("causality", 0.5)
    def test_broken(qvl_target): judge("label_mask", 2.0)
    def test_expected(qvl_target):
        with pytest.raises(CheckFailed): judge("adapter_census", 2.0)
    @pytest.mark.xfail
    def test_known(qvl_target): judge("adapter_neutrality", 2.0)
    def test_undecided(qvl_target): raise CannotJudge("a uniform picture")
    def test_own_skip(qvl_target): pytest.skip("not today")
    def test_own_failure(qvl_target): assert False
    def test_without_target(): judge("alignment", 0.5)
    def test_unrelated(): pass
    """
    )
    result = run_light()
    result.assert_outcomes(passed=4, failed=2, skipped=2, xfailed=1)
    assert said(result) == [
        "qvl: embedded on cpu: BROKEN: label_mask, 2 checks kept, 1 not judged (undecided: a uniform picture)",
        "qvl: models of the tests' own: 1 check kept",
    ]
    result.stdout.no_fnmatch_line("*does QLoRA*")


def test_nothing_is_said_where_nothing_was_found(pytester, run_light):
    pytester.makepyfile("def test_it(qvl_model): pass\ndef test_unrelated(): pass")
    result = run_light()
    assert said(result) == []
    result.stdout.no_fnmatch_line("*does QLoRA*")


def test_what_cannot_be_judged_is_a_skip_with_its_reason_wherever_it_shows(pytester, run_light):
    pytester.makepyfile(
        """
    import pytest
    from pytest_qvl.evidence import CannotJudge
    @pytest.fixture(scope="session")
    def qvl_reference(): raise CannotJudge("the reference needs 16.6 GiB")
    def test_one(qvl_reference): pass
    def test_other(qvl_reference): pass
    """
    )
    result = run_light("-rs")
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["SKIPPED [[]*not judged: the reference needs 16.6 GiB"])


def test_a_failed_check_ends_its_traceback_where_the_test_called_it(pytester, run_real):
    pytester.makepyfile(
        """
    def test_it(qvl_lora_model):
        from peft import LoraConfig
        from pytest_qvl import checks
        checks.adapter_census(qvl_lora_model, LoraConfig(target_modules=["q_proj"]))
    """
    )
    result = run_real()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [">   *checks.adapter_census(*", "E   *pytest_qvl.evidence.CheckFailed: *", "*.py:4: CheckFailed"]
    )
    assert "verdict(" not in result.stdout.str()
    assert "verdict(" in run_real("--full-trace").stdout.str()


def test_evidence_travels_from_workers(pytester, run_apart):
    pytester.makepyfile(
        KEEPS
        + "    def test_a(qvl_target): judge('alignment', 0.5)\n    def test_b(qvl_target): judge('causality', 2.0)\n"
    )
    result = run_apart("-n", "2", "--qvl-device", "cpu", "--qvl-record", "record.json", plugins=["xdist"])
    result.stdout.fnmatch_lines(["qvl: embedded on cpu: BROKEN: causality, 1 check kept"])
    assert '"drift"' in (pytester.path / "record.json").read_text()


SHOWS = """
    from pytest_qvl.session.keys import CONSOLE_KEY
    def test_it(pytestconfig): pytestconfig.stash[CONSOLE_KEY].progress("loading the model")
"""


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ([], True),
        (["-s"], True),
        pytest.param(["-p", "no:terminal"], False, marks=pytest.mark.slow),
        (["-q"], False),
        pytest.param(["--capture=sys"], True, marks=pytest.mark.slow),
        (["-n1"], False),
    ],
    ids=str,
)
def test_progress_shows_on_a_terminal(pytester, monkeypatch, arguments, shown):
    pytester.makepyfile(SHOWS)
    ours, theirs = pty.openpty()
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    command = [sys.executable, "-m", "pytest", "-p", "qvl", "-p", "xdist", "-p", "no:cacheprovider", *arguments]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=pytester.path) as process:
        os.close(theirs)
        text = b""
        try:
            while piece := os.read(ours, 4096):
                text += piece
        except OSError:  # the other end is closed
            pass
        assert process.wait() == 0
    os.close(ours)
    assert (b"qvl: loading the model\r\n" in text) == shown


def test_progress_is_silent_where_there_is_no_terminal(pytester, run_light):
    pytester.makepyfile(SHOWS)
    assert "loading" not in run_light("-rA").stdout.str()


CRASHES = """
    import pytest, torch
    from pytest_qvl import checks
    from pytest_qvl.samples import scenes

    @pytest.fixture(scope="module")
    def broken(qvl_batch):
        batch = qvl_batch(scenes(1, 1)[:2])
        return {**batch, "image_grid_thw": batch["image_grid_thw"][:-1]}
    def test_crash(qvl_quantized_model, qvl_processor, broken):
        checks.generation_repeatable(qvl_quantized_model, broken)
    def test_input(qvl_quantized_model, qvl_processor, broken):
        checks.mrope_positions(qvl_quantized_model, broken)
    def test_call(qvl_quantized_model, qvl_processor):
        checks.mrope_positions(qvl_quantized_model)
"""


def test_what_a_message_says_in_full_takes_a_few_lines(pytester, run_real, failures):
    pytester.makepyfile(CRASHES)
    result = run_real()
    result.assert_outcomes(failed=3)
    said = failures(result)
    assert {name: len(lines) <= 6 for name, lines in said.items()} == dict.fromkeys(
        ("test_crash", "test_input", "test_call"), True
    )
    crash = "\n".join(said["test_crash"])
    assert "ModelCrashed: the model's model raised StopIteration" in crash
    assert "note: raised at transformers/models/qwen2_5_vl/modeling_qwen2_5_vl.py:" in crash
    assert "InputError: the batch is malformed: " in said["test_input"][-1]
    assert "InputTypeError: mrope_positions: missing a required argument: 'batch'" in said["test_call"][-1]
    everything = run_real("--tb=long", "-k", "crash").stdout.str()
    assert "The above exception was the direct cause of the following exception" in everything


@pytest.mark.parametrize("value", ["None", "[1]"])
def test_a_batch_fixture_that_is_no_factory_is_named_for_every_test(pytester, run_light, value):
    pytester.makeconftest(f"""
    import pytest
    @pytest.fixture(scope="session")
    def qvl_batch(): return {value}
    """)
    pytester.makepyfile("def test_one(qvl_batch): pass\ndef test_two(qvl_batch): pass")
    result = run_light()
    result.assert_outcomes(errors=2)
    assert result.stdout.str().count("the fixture qvl_batch (conftest.py:2) gives ") >= 1
    result.stdout.no_fnmatch_line("*not callable*")


def test_a_failure_names_the_command_that_explains_its_check(pytester, run_light):
    pytester.makepyfile(
        """
    from pytest_qvl.evidence import CheckFailed, Evidence, Judge
    def judge(check):
        one = Judge(check, "p")
        one.problem("broken")
        return one
    def test_known(): judge("causality").verdict()
    def test_own(): judge("of_my_own").verdict()
    """
    )
    lines = run_light().outlines
    assert [line for line in lines if line.startswith("pytest-qvl")] == ["pytest-qvl explain causality"]
    assert sum("usual causes and fixes" in line for line in lines) == 1


def test_junit_has_a_property_for_every_verdict(pytester, run_light):
    pytester.makepyfile(
        """
    from pytest_qvl.evidence import Judge
    def judged(check, drift):
        judge = Judge(check, "a promise")
        judge.at_most("drift", drift, 1.0, else_say="it drifts")
        judge.verdict()
    def test_it():
        judged("causality", 0.25)
        judged("label_mask", 2.0)
    def test_plain(): pass
    """
    )
    run_light("--junitxml", "out.xml")
    cases = ET.parse(pytester.path / "out.xml").iter("testcase")
    found = {case.get("name"): [(p.get("name"), p.get("value")) for p in case.iter("property")] for case in cases}
    verdicts = [("qvl_causality", "kept: drift 0.25 (<= 1)"), ("qvl_label_mask", "BROKEN: drift 2 (<= 1)")]
    assert found == {"test_it": verdicts, "test_plain": []}
