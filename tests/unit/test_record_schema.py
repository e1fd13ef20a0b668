"""The schema of the record: all that a run can find out fits it, what is no record does not."""

from __future__ import annotations

import dataclasses
import json
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import jsonschema
import pytest

from pytest_qvl.evidence import Evidence, Figure, Relation, Table
from pytest_qvl.report.injected_fault import InjectedFault
from pytest_qvl.report.process_results import KnownFailureState, LeasedGpu, ProcessResults, SeenProbe, Subject, Verdict
from pytest_qvl.report.record import SCHEMA, Record, RunRecord
from pytest_qvl.report.report_data import Finding, GpuFailure, Kind, LimitOutcome, add_to_report
from pytest_qvl.report.run_results import ResultsBuilder
from pytest_qvl.report.states import STATES
from pytest_qvl.vram.usage import Usage

RECORDS = Path(__file__).parents[2] / "docs" / "records"


def schema_of(version):
    """The newest version's has a name without a number."""
    name = "record.schema.json" if version == SCHEMA else f"record-{version.rsplit('/', 1)[1]}.schema.json"
    return json.loads(files("pytest_qvl").joinpath("report", name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def schema():
    return schema_of(SCHEMA)


@pytest.fixture(scope="module")
def valid(schema):
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema).is_valid


def phase(backend="transformers", when="call", outcome="passed", longrepr=None, **data):
    made = pytest.TestReport("a::test_x[0]", ("a", 0, "x"), {}, outcome, longrepr, when, duration=0.5)
    found = Finding(f"7b on cuda by {backend}", "7b on cuda", backend, "peak_vram", **data)
    add_to_report(made, finding=found)
    return made


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A record with something under each of its keys."""
    file = tmp_path_factory.mktemp("record") / "r.json"
    figures = Figure("drift", float("nan"), 1.0, "<="), Figure("dtype", "bfloat16"), Figure("whole", True, True, "==")
    table = Table(("phase", "GiB"), (("prefill", 1.5),))
    evidence = Evidence("peak_vram", "p", figures, ("too much",), ("a note",), table, {"logits": [0.5]})
    builder = ResultsBuilder()
    for backend in ("transformers", "unsloth"):
        made = phase(backend, outcome="failed", evidence=(evidence, Evidence("alignment", "p")))
        limits = (LimitOutcome("a::test_x", 7, "fit", "call", 8, "", marked=True),)
        add_to_report(made, limits=limits, gpu_failure=GpuFailure("broken", "CUDA is broken", "a::test_x"))
        skipped = ("a", 0, "Skipped: not judged: no")
        reports = (
            phase(backend, when="setup"),
            made,
            phase(backend, outcome="skipped", longrepr=skipped, not_judged=(("alignment", "no"),)),
            phase(backend, when="teardown", outcome="failed"),
        )
        for one in reports:
            builder.pytest_runtest_logreport(one)
        gpu = LeasedGpu("H100 (GPU-a)", "H100", 0, 1.5, "7 GiB by x")
        verdicts = (Verdict("leak", "BROKEN", "1 GiB stayed"),)
        unknown = Usage("load", reason="the driver does not tell", error="OSError")
        whole = Usage("session", 2.5, "", 7, 8, 9, "device", 1)
        subject = Subject(
            *(f"7b on cuda by {backend}", "cuda", backend, "7b", "0" * 16, "c0ffee", "Qwen2.5-VL", "1" * 16),
            {"type": "nf4", "double": True, "compute_dtype": "float16"},
            {"target_modules": "q_proj"},
            "2" * 16,
            {"count": 6, "digest": "0" * 16},
            {"cpu_capability": "AVX2", "threads": 1, "cuda": None},
        )
        known = (("a reason [k.toml#1]", "not run"),)
        probe = SeenProbe("7b on cuda", "colour", "q", "a", ("data:image/png;base64,AA",), {"NF4": "b"})
        found = ProcessResults(whole, (unknown,), gpu, verdicts, subjects=(subject,), known=known, probes=(probe,))
        builder.add_process(ProcessResults.from_dict(found.as_dict()).started_by(backend))
    builder.set_fault(InjectedFault("vision-thaws", "The tower trains.", "frozen_vision", "recorded after the damage"))
    builder.add_problem("no GPU test was executed")
    config = SimpleNamespace(rootpath=file.parent, invocation_params=SimpleNamespace(args=["-q"]))
    setting = {"name": "qvl_seed", "value": "0", "source": "default"}
    record = Record(file, RunRecord(builder, ["model 7b (default)"], [setting]))
    list(record.pytest_sessionfinish(SimpleNamespace(config=config, exitstatus=1)))
    return json.loads(file.read_text(encoding="utf-8"))


def test_all_that_a_run_can_find_out_fits(valid, everything):
    assert [key for key, value in everything.items() if value in ({}, [])] == []
    assert {entry["target"] for entry in everything["checks"]} == {
        f"7b on cuda by {b}" for b in ("transformers", "unsloth")
    }
    assert everything["tests"] == {"failed": 2, "skipped": 2, "error": 2}
    assert valid(everything)
    one = deepcopy(everything["vram"]["processes"][0])
    del one["process"]
    assert valid({**everything, "vram": one})


def places(value, path=()):
    """Every object inside a record."""
    if isinstance(value, dict):
        yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def one_of_each(record):
    """The same with one entry where a list has several of a kind: validating takes its time."""
    slim = {key: value[:1] if isinstance(value, list) else value for key, value in record.items()}
    slim["checks"] = [next(one for one in record["checks"] if key in one) for key in ("figures", "not_judged")]
    slim["vram"] = {key: value for key, value in record["vram"]["processes"][0].items() if key != "process"}
    return slim


def test_a_key_too_many_or_too_few_is_no_record(schema, valid, everything):
    everything = one_of_each(everything)
    assert valid(everything)
    later = set(schema["properties"]) - set(schema["required"])  # older records of the version are without these
    free = {("skipped",), ("environment", "packages"), ("environment", "variables")}  # keys are names of things
    free |= {("probes", 0, "replies"), ("subjects", 0, "lora")}
    some = {("tests",), ("seconds_by_test",)}  # not every outcome or phase is there
    for path in places(everything):
        if path in free:
            continue
        changed = deepcopy(everything)
        at = changed
        for key in path:
            at = at[key]
        at["more"] = 1
        assert not valid(changed), f"{path} took another key"
        del at["more"]
        if path[:1] in some:
            continue
        for key in list(at):
            value = at.pop(key)
            assert valid(changed) if not path and key in later else not valid(changed), f"{path} without {key}"
            at[key] = value
            at[key] = 7 if isinstance(value, dict) else {"of": "another type"}
            assert not valid(changed), f"{path} took another type of {key}"
            at[key] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema",), "pytest-qvl/record/0"),
        (("seconds",), "1.5"),
        (("started",), "yesterday"),
        (("exit_status",), None),
        (("checks", 0, "figures", 0, "relation"), "<"),
        (("promises", 0, "state"), "Kept"),
        (("vram", "processes", 0, "session", "allocated"), 1.5),
        (("vram", "processes", 0, "session", "process"), "unknown"),
    ],
    ids=lambda value: str(value[-1]) if isinstance(value, tuple) else "",
)
def test_a_wrong_value_is_no_record(valid, everything, path, value):
    changed = deepcopy(everything)
    changed["vram"] = {"processes": [{"process": "x", "session": {**vars(Usage("s"))}, "phases": []}]}
    assert valid(changed)
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    assert not valid(changed)


def test_words_and_keys_are_those_of_the_code(schema):
    def properties(name):
        return schema["$defs"][name]["properties"]

    def entries(name):
        return schema["properties"][name]["items"]["properties"]

    assert schema["$id"].split(":")[1:] == SCHEMA.split("/")
    assert schema["properties"]["schema"]["const"] == schema["title"] == SCHEMA
    assert tuple(entries("promises")["state"]["enum"]) == STATES
    assert tuple(entries("gpu_failures")["kind"]["enum"]) == get_args(Kind)
    assert tuple(properties("figure")["relation"]["enum"]) == get_args(Relation)
    assert tuple(entries("known_failures")["state"]["enum"]) == get_args(KnownFailureState)
    for kind, of in (
        (Usage, properties("usage")),
        (Figure, properties("figure")),
        (Verdict, entries("session")),
        (LimitOutcome, entries("limits")),
        (Subject, entries("subjects")),
        (SeenProbe, entries("probes")),
    ):
        assert list(of) == [field.name for field in dataclasses.fields(kind)]


def test_everything_is_described(schema):
    def undescribed(name, node):
        if isinstance(node, dict):
            named = node.get("properties", {}).items()
            yield from (f"{name}.{key}" for key, one in named if not {"description", "$ref", "const"} & set(one))
            for key, one in node.items():
                yield from undescribed(f"{name}.{key}", one)

    assert list(undescribed("record", schema)) == []


def test_every_version_keeps_its_schema():
    """A new version moves ``record.schema.json`` to ``record-N.schema.json``, so that old records stay readable."""
    kind, newest = SCHEMA.rsplit("/", 1)
    for number in range(1, int(newest) + 1):
        kept = schema_of(f"{kind}/{number}")
        jsonschema.Draft202012Validator.check_schema(kept)
        assert kept["properties"]["schema"]["const"] == kept["title"] == f"{kind}/{number}"
        assert kept["$id"].split(":")[1:] == kept["title"].split("/")


def test_the_documentation_names_the_version():
    assert f"now `{SCHEMA}`" in (RECORDS.parent / "ci.md").read_text(encoding="utf-8")


def test_committed_records_are_valid_by_the_schema_of_their_version():
    validators = {}
    for file in RECORDS.glob("*.json"):
        found = json.loads(file.read_text(encoding="utf-8"))
        version = found.get("schema", "") if isinstance(found, dict) else ""
        if version.startswith(SCHEMA.rsplit("/", 1)[0]):
            by_version = validators.setdefault(version, jsonschema.Draft202012Validator(schema_of(version)))
            assert [error.message for error in by_version.iter_errors(found)] == [], file.name
    assert validators
