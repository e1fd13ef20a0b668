"""``shipped``: the reference records in the package, and which of them a run is compared with."""

from __future__ import annotations

import json
import re
import runpy
from copy import deepcopy
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import jsonschema
import pytest

from pytest_qvl.cli import main
from pytest_qvl.records.base import DECISIVE, base_record, shipped_records
from pytest_qvl.records.compare import compare
from pytest_qvl.records.stored import RecordError, read_record, verdicts
from pytest_qvl.suite import SUITE_VERSION

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads(files("pytest_qvl").joinpath("report", "record.schema.json").read_text(encoding="utf-8"))


@pytest.fixture
def shipped():
    return shipped_records()


def test_references_are_green_valid_and_say_nothing_of_where_they_were_made(shipped):
    assert shipped
    for record in shipped:
        jsonschema.Draft202012Validator(SCHEMA).validate(record)
        assert (record["exit_status"], record["suite"], record["environment"]["commit"]) == (0, SUITE_VERSION, None)
        assert not [word for word in json.dumps(record).split('"') if word.startswith("/")]
        judged = verdicts(record).values()
        assert {one.state for one in judged} == {"kept", "not judged"}
        assert [one.check for one in judged if one.answers], "made by code that did not record answers"


def test_the_suite_still_has_every_test_of_a_reference(shipped):
    """Else a first comparison would call a check gone that was renamed here."""
    known = json.loads((ROOT / "tests" / "plugin" / "public_names.json").read_text(encoding="utf-8"))["tests"]
    names = {name.partition("::")[2] for name in known}
    for record in shipped:
        assert {entry["test"] for entry in record["checks"]} <= names


def test_a_reference_is_the_nearest_by_versions(shipped, monkeypatch):
    old, new = deepcopy(shipped[-1]), deepcopy(shipped[-1])
    old["environment"]["packages"]["transformers"] = "4.57.6"
    monkeypatch.setattr("pytest_qvl.records.base.shipped_records", lambda _: [old, new])
    run = deepcopy(old)
    run["environment"]["packages"]["peft"] = "99"
    assert base_record("shipped", run) is old
    assert compare(base_record("shipped", run), run).versions[0].endswith("→ 99")
    run["environment"]["packages"]["transformers"] = new["environment"]["packages"]["transformers"]
    assert base_record("shipped", run) is new
    run["environment"]["packages"]["torch"] = run["environment"]["packages"]["torch"].partition("+")[0] + "+cu126"
    assert base_record("shipped", run) is new


@pytest.mark.parametrize(
    ("version", "nearest"),
    [
        ("4.57.6", "4.57.6"),
        ("4.60.0", "4.57.6"),
        ("5.16.0", "5.17.0"),
        ("5.18.2", "5.17.0"),
        ("5.20.0", "5.17.0"),  # as far from both: what an upgrade changed is asked more often
        ("5.22.0", "5.23.0"),
        ("5.99.0", "5.24.0"),
        ("5.24.0+mine", "5.24.0"),
        ("unknown", "4.57.6"),
    ],
)
def test_without_a_reference_of_the_same_version_the_nearest_counts(shipped, monkeypatch, version, nearest):
    made = []
    for name in ("4.57.6", "5.17.0", "5.23.0", "5.24.0"):
        made.append(deepcopy(shipped[0]))
        made[-1]["environment"]["packages"]["transformers"] = name
    monkeypatch.setattr("pytest_qvl.records.base.shipped_records", lambda _: made)
    run = deepcopy(shipped[0])
    run["environment"]["packages"]["transformers"] = version
    assert base_record("shipped", run)["environment"]["packages"]["transformers"] == nearest


def test_what_an_upgrade_changed_is_said_and_is_no_regression(shipped):
    """Each with the next: all are green, so nothing that is held to a limit may have got worse."""
    for old, new in pairwise(shipped):
        found = compare(old, new)
        assert found.regressions == ()
        assert [line.split(" ")[0] for line in found.versions if line.split(" ")[0] in DECISIVE]


def test_a_reference_is_named_by_a_version(shipped, capsys):
    packages = shipped[0]["environment"]["packages"]
    name = f"shipped:transformers{packages['transformers']}-torch{packages['torch'].partition('+')[0]}"
    assert base_record(name, shipped[0]) in shipped
    with pytest.raises(RecordError, match=r"no reference is shipped for 'transformers9', but for transformers\d"):
        base_record("shipped:transformers9", shipped[0])
    with pytest.raises(RecordError, match="no reference is shipped for 'peft0.2'"):
        base_record("shipped:peft0.2", shipped[0])
    assert main(["compare", name, "shipped:transformers9"]) == 2
    assert "no reference is shipped for 'transformers9'" in capsys.readouterr().err


def test_the_reference_that_the_help_names_is_shipped(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    (name,) = re.findall(r"shipped:[\w.]+", capsys.readouterr().out)
    assert shipped_records(name)


def test_no_reference_is_shipped_for_another_model():
    with pytest.raises(RecordError, match="no reference is shipped for synthetic:qwen2.5-vl-7b on cuda"):
        base_record("shipped", read_record(ROOT / "docs" / "records" / "h200-qwen2.5-vl-7b.json"))


def test_a_reference_is_made_of_a_record(shipped, tmp_path):
    tool = runpy.run_path(str(ROOT / "tools" / "reference_record.py"))
    made = tool["reference"]({**shipped[0], "command": ["pytest", "/home/me"]})
    assert made == shipped[0]
    with pytest.raises(SystemExit, match="exit status 1"):
        tool["reference"]({**shipped[0], "exit_status": 1})
