"""``--qvl-known-failures``: strict, by check and condition; entries that are stale, unmatched or expired are named."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest

from pytest_qvl.records.known_failures import KnownFailuresError, read_known_failures
from pytest_qvl.releases import installed

BREAKS = """
import pytest
from pytest_qvl.evidence import CheckFailed, Evidence
@pytest.fixture(scope="session")
def qvl_quantized_model(): raise {error}
"""
BROKEN = "CheckFailed(Evidence('quantization_census', 'p', problems=('two in 16 bits',)))"
CENSUS = ("--pyargs", "pytest_qvl.suite", "-k", "quantization_census", "--qvl-record", "r.json")
ENTRY = '[[known]]\ncheck = "quantization_census"\nreason = "a defect"\n'


@pytest.fixture
def run(pytester, run_light, with_torch):
    """Run one check, which fails so, with these entries."""

    def run(*entries, error=BROKEN):
        pytester.makeconftest(BREAKS.format(error=error))
        Path("known.toml").write_text("".join(ENTRY + entry + "\n" for entry in entries))
        return run_light(*CENSUS, "--qvl-known-failures", "known.toml")

    return run


def states():
    record = json.loads(Path("r.json").read_text(encoding="utf-8"))
    return [(one["reason"], one["state"]) for one in record["known_failures"]]


def test_a_broken_verdict_is_expected(run):
    result = run(f'versions = {{ transformers = "=={installed("transformers")}" }}\ndevice = "cpu"\nmodel = "emb*"')
    result.assert_outcomes(xfailed=1)
    assert result.ret == 0
    assert states() == [("a defect [known.toml#1]", "as expected")]
    result.stdout.fnmatch_lines(["qvl: known failures: 1 as expected"])
    result.stdout.no_fnmatch_line("*quantized where it should be*kept*")


def test_an_error_is_not_expected(run):
    result = run("", error="OSError('no disk')")
    result.assert_outcomes(errors=1)
    assert states() == [("a defect [known.toml#1]", "not run")]


def test_conditions_that_do_not_hold_expect_nothing(run):
    result = run(
        'versions = { transformers = "<1" }',
        'backend = "unsloth"',
        'device = "cuda"',
        'card = "*T4*"',
        'model = "qwen*"',
        'parameters = ["left"]',
        "expires = 2020-01-01",
    )
    result.assert_outcomes(errors=1)
    assert [state for _, state in states()] == ["does not apply", *["unmatched"] * 5, "expired"]
    result.stdout.fnmatch_lines(
        [
            "qvl: known failure unmatched: a defect ?known.toml#2?: it means no test of the suite; correct*",
            "qvl: known failure expired: a defect ?known.toml#7?: it does nothing any more; remove*",
            "qvl: known failures: 1 does not apply",
        ]
    )


def test_what_k_takes_away_was_meant(run):
    run(
        ENTRY.replace("[[known]]", "[[known]] # the same for another check").replace("quantization_census", "causality")
    )
    assert states() == [("a defect [known.toml#1]", "as expected"), ("a defect [known.toml#2]", "not run")]


def test_a_check_that_holds_makes_its_entry_stale(pytester, run_real):
    Path("known.toml").write_text(ENTRY)
    result = run_real(*CENSUS, "--qvl-known-failures", "known.toml")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert states() == [("a defect [known.toml#1]", "stale")]
    result.stdout.fnmatch_lines(
        ["qvl: known failure stale: a defect ?known.toml#1?: the check holds; remove the entry"]
    )


def test_a_known_failure_of_a_simulated_card(pytester):
    (entry,) = read_known_failures(_written(pytester, ENTRY + 'card = "*T4*"'), pytester.path).entries
    assert entry.covers("quantization_census", "", lambda: ("Tesla T4",))
    assert not entry.covers("quantization_census", "", lambda: ("NVIDIA H100",))


def test_parameters_are_whole_words(pytester):
    (entry,) = read_known_failures(_written(pytester, ENTRY + 'parameters = ["left"]'), pytester.path).entries
    assert entry.covers("quantization_census", "embedded-cpu-left", tuple)
    assert not entry.covers("quantization_census", "embedded-cpu-lefthand", tuple)


def test_an_entry_holds_until_its_day(pytester):
    (entry,) = read_known_failures(_written(pytester, ENTRY + "expires = 2027-01-31"), pytester.path).entries
    assert not entry.expired(date(2027, 1, 30))
    assert entry.expired(date(2027, 1, 31))


def test_a_reason_of_several_lines_is_one(pytester):
    text = ENTRY.replace('"a defect"', '"""\na\n  defect\n"""')
    (entry,) = read_known_failures(_written(pytester, text), pytester.path).entries
    assert entry.expected == "a defect [known.toml#1]"


def test_files_of_one_name_keep_their_entries(pytester, run_light):
    pytester.makepyfile("def test_it(): pass")
    for folder in ("a", "b"):
        (pytester.mkdir(folder) / "known.toml").write_text(ENTRY)
    named = (word for folder in ("a", "b") for word in ("--qvl-known-failures", f"{folder}/known.toml"))
    run_light(*named, "--qvl-record", "r.json")
    assert states() == [("a defect [known.toml#1]", "not run"), ("a defect [known.toml#1 (2)]", "not run")]


def test_a_package_brings_its_own(pytester, monkeypatch):
    (pytester.mkpydir("brings") / "known.toml").write_text(ENTRY)
    monkeypatch.syspath_prepend(pytester.path)
    assert read_known_failures("brings:known.toml", pytester.path).entries[0].place == "known.toml#1"


def _written(pytester, text):
    (pytester.path / "known.toml").write_text(text)
    return "known.toml"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("known = ", "is no TOML"),
        ("[[knwon]]", "not 'knwon'"),
        ("known = 3", "every entry is a table"),
        (ENTRY.replace("reason", "because"), "unknown key 'because'; known: check, reason"),
        ('[[known]]\ncheck = "causality"', "needs 'reason'"),
        (ENTRY.replace("census", "censsus"), "did you mean 'quantization_census'?"),
        (ENTRY + "backend = 3", "backend = 3 is no text"),
        (ENTRY + 'device = "gpu"', "device = 'gpu' is none of cpu, cuda"),
        (ENTRY + 'expires = "soon"', "expires = 'soon' is no date"),
        (ENTRY + 'parameters = "left"', "is no list of words"),
        (ENTRY + 'versions = { peft = "new" }', "peft = 'new' is no range of versions"),
        (ENTRY + "versions = { peft = 1 }", "peft = 1 is no range of versions"),
        (ENTRY + 'versions = "new"', "versions is no table"),
    ],
)
def test_what_an_entry_cannot_be_is_refused_in_one_sentence(pytester, text, says):
    with pytest.raises(KnownFailuresError) as error:
        read_known_failures(_written(pytester, text), pytester.path)
    assert says in str(error.value)
    assert "known.toml" in str(error.value)


@pytest.mark.parametrize("name", ["nowhere.toml", "no_such_package_of_mine:known.toml"])
def test_a_file_that_is_not_there_is_named(pytester, name):
    with pytest.raises(KnownFailuresError, match=name):
        read_known_failures(name, pytester.path)
