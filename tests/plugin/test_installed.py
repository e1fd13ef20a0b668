"""What is installed: told at the start, refused below the range; nobody else is bothered."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_qvl import releases
from pytest_qvl.evidence import CheckFailed, Judge

USES_A_MODEL = "def test_it(qvl_model): pass"
UNRELATED = "def test_it(qvl_vram_limit): pass"
STALE = (
    "Transformers 5.3.0 has this defect: rope_deltas that generate() left behind are used for a later batch without "
    "images; fixed in 5.4.0 (take 5.5.4: until then there is another): https://github.com/huggingface/transformers/issues/44873"
)


@pytest.fixture
def have(monkeypatch):
    """Say that other versions are installed."""

    def say(**versions):
        real = releases.installed
        monkeypatch.setattr(releases, "installed", lambda package: versions.get(package) or real(package))

    return say


def test_versions_are_told(pytester, run_light, have):
    have(transformers="5.17.0", peft="0.21.2", bitsandbytes="0.50.2", torch="2.13.0+cpu")
    pytester.makepyfile(USES_A_MODEL)
    result = run_light()
    result.stdout.fnmatch_lines(["qvl: transformers 5.17.0, peft 0.21.2, bitsandbytes 0.50.2, torch 2.13.0+cpu"])
    result.stdout.no_fnmatch_line("*has this defect*")


def test_a_known_defect_is_one_line(pytester, run_light, have):
    have(transformers="5.3.0")
    pytester.makepyfile(USES_A_MODEL)
    result = run_light("-q")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"qvl: {STALE}"])


def test_what_needs_something_special_is_one_line_for_each_package(pytester, run_light, have):
    have(transformers="5.3.0")
    pytester.makepyfile(USES_A_MODEL)
    result = run_light()
    result.stdout.fnmatch_lines(
        [
            "qvl: Transformers 5.3.0, known to go wrong with a Trainer that accumulates gradients: Accelerate divides by*; with "
            "llm_int8_skip_modules: entries are matched from the start of *, silently; with an adapter saved before *, or crashes",
        ]
    )
    result.stdout.no_fnmatch_line("*5.3.0 has this defect: Accelerate*")
    run_light("-q").stdout.no_fnmatch_line("*known to go wrong*")


@pytest.mark.parametrize(
    ("package", "version", "says"),
    [
        (
            "peft",
            "0.19.1",
            "PEFT 0.19.1, known to go wrong with two adapters, the name of one part of the other's: saving the*",
        ),
        (
            "trl",
            "0.29.0",
            "TRL 0.29.0, known to go wrong with SFT on prompts with images and their completions: mm_token_*",
        ),
        (
            "unsloth_zoo",
            "2026.6.2",
            "Unsloth Zoo 2026.6.2, known to go wrong with UnslothVisionDataCollator on prompts with*",
        ),
    ],
)
def test_packages_around_the_model_are_told_too(pytester, run_light, have, package, version, says):
    have(**{package: version})
    pytester.makepyfile(USES_A_MODEL)
    result = run_light()
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"qvl: {says}"])


def test_a_failure_names_what_has_to_be_used_to_meet_a_defect(have):
    have(transformers="5.3.0")
    judge = Judge("quantization_census", "promise")
    judge.problem("wrong")
    with pytest.raises(CheckFailed, match=r"silently \(llm_int8_skip_modules\); no release has it fixed yet: https"):
        judge.verdict()


@pytest.mark.parametrize("package", ["transformers", "peft", "bitsandbytes", "torch", "accelerate"])
def test_below_the_range_is_refused_in_one_sentence(pytester, run_light, have, package):
    (wanted,) = [versions for name, versions in releases._requirements() if name == package]
    have(**{package: "0.0.1"})
    pytester.makepyfile(USES_A_MODEL)
    result = run_light()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines if line.startswith("ERROR:")]
    assert f"{releases._title(package)} 0.0.1, which is outside its range: pip install '{package}{wanted}'" in line


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_a_refusal_names_the_known_defect_and_runs_no_test(pytester, run_apart, monkeypatch, workers):
    monkeypatch.setenv("QVL_TEST_HAVE", "4.56.2")
    pytester.makeconftest(
        "import os\nfrom pytest_qvl import releases\nreal = releases.installed\n"
        "releases.installed = lambda p: os.environ['QVL_TEST_HAVE'] if p == 'transformers' else real(p)"
    )
    pytester.makepyfile(USES_A_MODEL)
    result = run_apart("--qvl-device", "cpu", *workers, plugins=["xdist"])
    assert result.ret != 0
    text = result.stdout.str() + result.stderr.str()
    assert "pytest-qvl does not work with Transformers 4.56.2" in text
    assert "fixed in 4.57.1" in text
    assert "Traceback" not in text
    assert "passed" not in text


def test_a_session_without_a_model_is_let_alone(pytester, run_light, have):
    have(transformers="4.48.2", torch="1.0")
    pytester.makepyfile(UNRELATED)
    result = run_light()
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*Transformers 4.48.2*")


def test_collecting_refuses_nothing(pytester, run_light, have):
    have(transformers="4.48.2")
    pytester.makepyfile(USES_A_MODEL)
    assert run_light("--collect-only").ret == 0


@pytest.mark.parametrize(
    ("check", "version", "says"),
    [("position_state", "5.3.0", True), ("position_state", "5.4.0", False), ("label_mask", "5.3.0", False)],
)
def test_a_failure_names_the_release_that_mends_it(have, check, version, says):
    have(transformers=version)
    judge = Judge(check, "promise")
    judge.problem("wrong")
    with pytest.raises(CheckFailed) as failed:
        judge.verdict()
    assert (f"note: {STALE}" in str(failed.value)) == says
    assert not Judge(check, "promise").verdict().notes


def test_every_entry_names_checks_that_exist_and_releases_that_are_ordered():
    from packaging.specifiers import SpecifierSet

    from pytest_qvl import checks

    page = (Path(__file__).parents[2] / "docs/releases.md").read_text(encoding="utf-8")
    for defect in releases.DEFECTS:
        assert {*defect.checks} <= {*checks.__all__}
        assert not defect.fixed_in or not SpecifierSet(defect.versions).contains(defect.fixed_in)
        assert defect.thread.startswith("https://github.com/")
        row = f"| {defect.package} {defect.versions} | {defect.summary} ([thread]({defect.thread})) | {defect.fixed_in or 'none yet'} |"
        assert row in page
