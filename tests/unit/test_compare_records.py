"""Comparing records: each change is named, noise is none, and what cannot be compared is refused in one sentence."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from copy import deepcopy
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest

from pytest_qvl.cli import main
from pytest_qvl.evidence import Figure
from pytest_qvl.records.compare import FLIPS, KINDS, REGRESSIONS, Change, Comparison, compare, figure_change
from pytest_qvl.records.compare_output import as_markdown, as_text, escaped
from pytest_qvl.records.flips import sign_test
from pytest_qvl.records.markdown import run_markdown
from pytest_qvl.records.stored import NEWEST, RecordError, read_record, targets, verdicts
from pytest_qvl.report.record import SCHEMA

RECORDS = Path(__file__).parents[2] / "docs" / "records"
EMBEDDED = RECORDS / "h200-embedded.json"
OLDEST = RECORDS / "h100-embedded.json"  # version 1
JUDGED = [c["check"] for c in json.loads(EMBEDDED.read_text(encoding="utf-8"))["checks"] if "figures" in c]


@pytest.fixture
def record():
    return read_record(EMBEDDED)


def entry(record, check):
    return next(one for one in record["checks"] if one["check"] == check)


def kinds(old, new):
    return [(change.kind, change.check, change.what) for change in compare(old, new).changes]


def broken(record, check):
    changed = deepcopy(record)
    entry(changed, check).update(problems=["it broke"], outcome="failed")
    return changed


def test_a_run_against_itself_has_not_changed(record):
    found = compare(record, deepcopy(record))
    assert (found.changes, found.versions) == ((), ())
    assert found.compared == len(verdicts(record)) > 40
    assert found.verdict.startswith("nothing changed: ")


@pytest.mark.parametrize("check", sorted(set(JUDGED)))
def test_the_check_that_broke_is_named_and_no_other(record, check):
    assert kinds(record, broken(record, check)) == [("new failure", check, "")]
    assert kinds(broken(record, check), record) == [("fixed", check, "")]
    assert kinds(broken(record, check), broken(record, check)) == []


def test_the_promise_that_others_build_on_comes_first(record):
    changed = broken(broken(broken(record, "layer_arithmetic"), "feature_scatter"), "greedy_is_argmax")
    broke = ["feature_scatter", "greedy_is_argmax", "layer_arithmetic"]
    assert [check for _, check, _ in kinds(record, changed)] == broke


def test_a_verdict_that_got_lost_is_a_regression(record):
    lost, gone, error = (deepcopy(record) for _ in range(3))
    one = entry(lost, "causality")
    for key in ("promise", "figures", "problems", "notes", "table"):
        del one[key]
    one["not_judged"] = "no image"
    gone["checks"].remove(entry(gone, "causality"))
    error["checks"].remove(entry(error, "causality"))
    target, test = entry(record, "causality")["target"], entry(record, "causality")["test"]
    error["errors"].append({"target": target, "test": test, "when": "call", "check": "causality", "text": "OSError"})
    for changed, kind in ((lost, "lost"), (gone, "gone"), (error, "lost")):
        found = compare(record, changed)
        assert [(one.kind, one.check) for one in found.regressions] == [(kind, "causality")]
    gone["command"] += ["-k", "not causality"]
    assert kinds(record, gone) == []


def test_a_session_that_leaks_is_a_failure(record):
    changed = deepcopy(record)
    changed["session"][0].update(state="BROKEN", text="1 GiB stayed\nmore")
    ((kind, name, _),) = kinds(record, changed)
    assert (kind, name) == ("new failure", "leak")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (Figure("drift", 0.004, 0.02, "<="), Figure("drift", math.nan, 0.02, "<="), "worse"),
        (Figure("drift", math.nan, 0.02, "<="), Figure("drift", math.nan, 0.02, "<="), None),
        (Figure("rank", 1.5), Figure("rank", math.nan), None),
        (Figure("peak", 1.5, unit="GiB"), Figure("peak", math.nan, unit="GiB"), "worse"),
        (Figure("drift", 0.004, 0.02, "<="), Figure("drift", 0.004, "x", "<="), "changed"),
        (Figure("drift", 0.04, 0.02, ">="), Figure("drift", 0.004, 0.02, "<="), "changed"),
        (Figure("drift", 0.004, 0.02, "<="), Figure("drift", 0.0085, 0.02, "<="), None),
        (Figure("drift", 0.004, 0.02, "<="), Figure("drift", 0.015, 0.02, "<="), "worse"),
        (Figure("drift", 0.015, 0.02, "<="), Figure("drift", 0.004, 0.02, "<="), "better"),
        (Figure("drift", 0.004, 0.02, "<="), Figure("drift", 0.0005, 0.0025, "<="), None),  # of another dtype
        (
            Figure("norm: largest error / limit", 0.1, 1.0, "<="),
            Figure("norm: largest error / limit", 1, 1, "<="),
            None,
        ),
        (Figure("margin / reference", 1.01, 0.9, ">="), Figure("margin / reference", 0.99, 0.9, ">="), None),
        (Figure("margin / reference", 1.01, 0.9, ">="), Figure("margin / reference", 0.91, 0.9, ">="), "worse"),
        (Figure("margin / reference", 0.91, 0.9, ">="), Figure("margin / reference", 1.01, 0.9, ">="), "better"),
        (Figure("answers lost", 0, 8, "<="), Figure("answers lost", FLIPS - 1, 8, "<="), None),
        (Figure("answers lost", 0, 8, "<="), Figure("answers lost", FLIPS, 8, "<="), "worse"),
        (Figure("in NF4", 28, 28, "=="), Figure("in NF4", 36, 36, "=="), "changed"),
        (Figure("dtype", "float32"), Figure("dtype", "bfloat16"), "changed"),
        (Figure("tokens", "1 " * 40), Figure("tokens", "2 " * 40), None),
        (Figure("peak", 7.0, unit="GiB"), Figure("peak", 7.1, unit="GiB"), None),
        (Figure("peak", 7.0, unit="GiB"), Figure("peak", 7.2, unit="GiB"), "worse"),
        (Figure("peak", 0.04, unit="GiB"), Figure("peak", 0.1, unit="GiB"), None),  # less than 64 MiB
        (Figure("time", 1.0, 9.0, "<=", "s"), Figure("time", 8.0, 9.0, "<=", "s"), None),
        (
            Figure("smallest loss within 40 steps", 1.0, 5.0, "<="),
            Figure("smallest loss within 40 steps", 4.9, 5.0, "<="),
            None,
        ),
        (
            Figure("derivative of the worst layer, off 1 by", 0.01, 0.1, "<="),
            Figure("derivative of the worst layer, off 1 by", 0.06, 0.1, "<="),
            None,
        ),
        (Figure("alone against batch", 0.0625, 0.168, "<="), Figure("alone against batch", 0.0, 0.2852, "<="), None),
        (
            Figure("generation without cache against plain forward", 0.0, 0.25, "<="),
            Figure("generation without cache against plain forward", 0.2, 0.25, "<="),
            None,
        ),
        (Figure("steps", 24), Figure("steps", 3), None),
        (Figure("off by", 0.0, 0.0, "<="), Figure("off by", 0.0, 0.1, "<="), None),
        (Figure("off by", float("inf"), 1.0, "<="), Figure("off by", 0.0, 1.0, "<="), None),
    ],
    ids=str,
)
def test_a_figure_moves_by_more_than_noise_or_not(old, new, expected):
    assert figure_change(old, new) == expected


def test_a_figure_is_named_with_both_values(record):
    changed = deepcopy(record)
    figure = next(f for f in entry(changed, "peak_vram")["figures"] if f["name"] == "prefill: peak allocated")
    figure["value"] += 1
    (change,) = compare(record, changed).changes
    assert (change.kind, change.check, change.what) == ("worse", "peak_vram", "prefill: peak allocated")
    assert change.new.startswith("1.0") and change.old.endswith(" GiB")


def answered(record, states, first=0):
    """The record with answers to samples in a row: r(ight), l(ost), g(ained), w(rong)."""
    changed = deepcopy(record)
    words = [{"r": "right", "l": "lost", "g": "gained", "w": "wrong"}[letter] for letter in states]
    entry(changed, "alignment")["answers"] = {f"{number:08x}": word for number, word in enumerate(words, first)}
    figure = next(f for f in entry(changed, "alignment")["figures"] if f["name"] == "answers lost less gained")
    figure["value"] = states.count("l") - states.count("g")
    return changed


def answers_told(old, new):
    return [(c.kind, c.what, c.new.partition("; ")[2]) for c in compare(old, new).changes]


@pytest.mark.parametrize(
    ("one_way", "other_way", "chance"),
    [(0, 0, 1), (5, 0, 1 / 16), (6, 0, 1 / 32), (6, 6, 1), (7, 1, 18 / 256), (8, 1, 20 / 512), (1, 8, 20 / 512)],
)
def test_the_sign_test_is_exact(one_way, other_way, chance):
    assert sign_test(one_way, other_way) == pytest.approx(chance, rel=1e-12)


def test_the_sign_test_takes_more_flips_than_a_float_can_count():
    assert sign_test(1100, 10) < 1e-300
    assert sign_test(600, 600) == 1
    assert sign_test(560, 490) == pytest.approx(0.033, rel=0.02)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("r" * 60, "r" * 54 + "l" * 6, ("worse", "6 lost and 0 gained of the same 60 samples (p = 0.031)")),
        ("r" * 54 + "l" * 6, "r" * 60, ("better", "0 lost and 6 gained of the same 60 samples (p = 0.031)")),
        ("r" * 60, "r" * 55 + "l" * 5, None),
        # Ten either way: as many right as before, whatever flipped.
        ("r" * 30 + "l" * 10, "l" * 10 + "r" * 20 + "g" * 10, None),
        ("r" * 40 + "w", "l" * 8 + "r" * 32 + "g", ("worse", "8 lost and 1 gained of the same 41 samples (p = 0.039)")),
        # As many against the reference: none lost against the last run counts.
        ("r" * 40 + "l" * 8, "r" * 40 + "l" * 8, None),
        ("r" * 40 + "l" * 6, "l" * 6 + "r" * 40, None),
    ],
)
def test_answers_to_the_same_samples_are_compared_sample_by_sample(record, old, new, expected):
    found = answers_told(answered(record, old), answered(record, new))
    assert found == ([] if expected is None else [(expected[0], "answers", expected[1])])


def test_answers_to_other_samples_are_compared_by_each_runs_own_reference(record):
    gained, lost = answered(record, "r" * 57 + "g" * 3), answered(record, "r" * 57 + "l" * 3, first=100)
    said = "flips: 6 for worse and 0 for better, each run against its own reference (p = 0.031)"
    assert answers_told(gained, lost) == [("worse", "answers", said)]
    assert answers_told(answered(record, "r" * 57 + "l" * 3), lost) == []
    shifted = answered(record, "r" * 54 + "l" * 16, first=10)
    assert answers_told(answered(record, "r" * 70), shifted)[0][2].startswith("6 lost and 0 gained of the same 60")


def test_a_record_without_answers_is_compared_by_counts(record):
    new = answered(record, "r" * 54 + "l" * 6)
    record = deepcopy(record)
    entry(record, "alignment").pop("answers", None)
    assert kinds(record, new) == [("worse", "alignment", "answers lost less gained")]


def test_a_checkpoint_of_another_name_is_the_same_subject(record):
    def named(name):
        return json.loads(
            json.dumps(record)
            .replace("embedded on cuda", f"local:/x/{name} on cuda")
            .replace("[embedded-", f"[{name}-")
        )

    found = compare(named("first"), named("second"))
    assert found.changes == ()
    assert found.versions == ("model local:/x/first on cuda → local:/x/second on cuda",)


def test_a_target_that_only_one_record_has_is_not_silently_passed_over(record):
    both = deepcopy(record)
    other = json.loads(json.dumps(record["checks"]).replace("embedded on cuda", "embedded on cpu"))
    both["checks"] += other
    assert compare(both, record).verdict.endswith("compared; not compared: embedded on cpu (not in the new record)")
    assert compare(record, both).verdict.endswith("compared; not compared: embedded on cpu (not in the old record)")


def test_what_else_differs_is_said(record):
    changed = deepcopy(record)
    changed["environment"]["packages"]["transformers"] = "5.18.0"
    del changed["environment"]["packages"]["triton"]
    assert compare(record, changed).versions == ("transformers 5.17.0 → 5.18.0", "triton 3.6.0 → none")


def with_subject(record, **facts):
    changed = deepcopy(record)
    changed["subjects"] = [{"target": "embedded on cuda", **facts}]
    return changed


def test_what_cannot_be_compared_is_refused(record):
    def refused(old, new, says):
        with pytest.raises(RecordError) as error:
            compare(old, new)
        assert says in str(error.value) and "\n" not in str(error.value)

    refused(record, {**record, "exit_status": 2}, "interrupted")
    refused({**record, "suite": 1}, {**record, "suite": 2}, "judges differently")
    seven, three = (read_record(RECORDS / f"h200-qwen2.5-vl-{size}b.json") for size in (7, 3))
    refused(three, seven, "no model in common")
    refused(with_subject(record, family="Qwen2.5-VL"), with_subject(record, family="Qwen3-VL"), "Qwen3-VL")
    refused(record, {**record, "checks": [], "errors": []}, "no model in common")
    empty = {**record, "checks": [], "errors": [], "session": []}
    refused(empty, deepcopy(empty), "no check in common")


def test_samples_and_lora_that_differ_are_named(record):
    old = with_subject(record, samples={"count": 6, "digest": "a"}, lora={"r": 16}, adapter=None)
    new = with_subject(record, samples={"count": 6, "digest": "b"}, lora={"r": 8}, adapter="c")
    found = compare(old, new)
    assert sorted(found.versions) == [
        "lora of embedded on cuda r 16 → r 8",
        "samples of embedded on cuda count 6, digest a → count 6, digest b",
    ]


def test_counts_of_other_samples_are_no_change(record):
    changed = deepcopy(record)
    figure = next(f for f in entry(changed, "feature_scatter")["figures"] if f["name"] == "visual tokens")
    figure.update(value=170, limit=170)
    assert kinds(record, changed) == [("changed", "feature_scatter", "visual tokens")]
    samples = [with_subject(each, samples={"count": 6, "digest": d}) for each, d in ((record, "a"), (changed, "b"))]
    assert kinds(*samples) == []


def test_records_of_the_first_version_are_converted():
    for file in RECORDS.glob("h*.json"):
        data = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(data, dict) and str(data.get("schema")).startswith("pytest-qvl/record/"):
            found = read_record(file)
            assert found["suite"] == data.get("suite")
            assert list(found["environment"]["packages"])[0] == "pytest-qvl"
            assert compare(found, found).verdict.startswith("nothing changed")
    assert targets(read_record(OLDEST)) == ["embedded on cuda"]


def test_the_newest_version_is_the_one_that_is_written():
    assert SCHEMA.endswith(f"/{NEWEST}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "No such file"),
        ("{", "is no JSON"),
        ("[]", "is no record of a run"),
        ('{"schema": "pytest-qvl/faults/1"}', "is no record of a run"),
        ('{"schema": "pytest-qvl/record/99"}', "upgrade pytest-qvl"),
        ('{"schema": "pytest-qvl/record/2", "started": "x"}', "is a record without 'seconds'"),
    ],
)
def test_a_file_that_is_no_record_is_refused(tmp_path, capsys, text, says):
    file = tmp_path / "r.json"
    if text is not None:
        file.write_text(text)
    assert main(["compare", str(EMBEDDED), str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line and str(file) in line


def places(value, *above):
    """Every place in a record, the first one of each list."""
    yield above
    names = value if isinstance(value, dict) else range(bool(value)) if isinstance(value, list) else ()
    for name in names:
        yield from places(value[name], *above, name)


def read_and_shown(file, healthy):
    """Read a record and show it everywhere, or ``None`` where it is refused."""
    try:
        found = read_record(file)
    except RecordError:
        return None
    with suppress(RecordError):
        as_text(compare(healthy, found))
    with suppress(RecordError):
        as_text(compare(found, healthy))
    return run_markdown(found)


@pytest.mark.parametrize("odd", ["missing", None, [], math.nan, 10**400, "<b>"], ids=["missing", *"0[n1<"])
def test_a_record_that_was_edited_is_refused_or_shown(tmp_path, odd):
    data = json.loads(EMBEDDED.read_text(encoding="utf-8"))
    for name in ("checks", "seconds_by_test", "promises", "session"):
        del data[name][1:]
    file = tmp_path / "r.json"
    file.write_text(json.dumps(data))
    healthy, refused = read_record(file), 0
    for *above, last in filter(None, list(places(data))):
        inner = reduce(getitem, above, data)
        was = inner[last]
        inner[last] = odd
        if odd == "missing":
            del inner[last]
        file.write_text(json.dumps(data))
        refused += read_and_shown(file, healthy) is None
        if isinstance(inner, list) and odd == "missing":
            inner.insert(last, was)
        else:
            inner[last] = was
    assert refused > 10


def test_an_edited_record_is_refused_by_place_and_value(tmp_path, record):
    file = tmp_path / "r.json"
    record["checks"][1]["figures"][0]["value"] = [1]
    file.write_text(json.dumps(record))
    with pytest.raises(RecordError, match=r"checks\[1\].*\[1\], not .*cut short or edited; run again"):
        read_record(file)
    file.write_text("[" * 100_000)
    with pytest.raises(RecordError, match="is no JSON"):
        read_record(file)


def test_a_key_of_a_later_release_is_read_over(tmp_path, record):
    later = deepcopy(record)
    later["environment"]["moon"] = entry(later, "causality")["figures"][0]["colour"] = "red"
    file = tmp_path / "r.json"
    file.write_text(json.dumps(later))
    assert compare(record, read_record(file)).changes == ()


def test_what_strangers_said_starts_no_line_of_its_own(tmp_path, capsys, record):
    evil = "x\r\n::error::y\x1b[31m\u2028::z"
    changed = broken(record, "causality")
    entry(changed, "causality")["problems"] = [evil]
    text = as_text(compare(record, changed))
    assert len(text.splitlines()) == 3 and "\x1b" not in text
    changed["checks"] = [{**one, "target": evil} for one in changed["checks"]]
    file = tmp_path / "r.json"
    file.write_text(json.dumps(changed))
    assert main(["compare", str(EMBEDDED), str(file)]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "\x1b" not in said


def test_what_went_wrong_outside_any_test_is_a_failure(record):
    changed = deepcopy(record)
    changed["problems"] = ["the process of unsloth died"]
    (change,) = compare(record, changed).regressions
    assert str(change) == "(outside any test): the process of unsloth died"
    assert compare(changed, deepcopy(changed)).changes == ()


def test_a_verdict_on_the_session_alone_is_nothing_in_common(record):
    other = deepcopy(record)
    half = len(record["checks"]) // 2
    names = {one["check"] for one in record["checks"][:half]}
    record["checks"] = [one for one in record["checks"] if one["check"] in names]
    other["checks"] = [one for one in other["checks"] if one["check"] not in names]
    other["command"] += ["-k", "others"]
    assert record["session"] and other["session"]
    with pytest.raises(RecordError, match="no check in common"):
        compare(record, other)


def test_a_fault_that_was_injected_is_told(record):
    changed = deepcopy(record)
    changed["fault"] = {"name": "loss-summed"}
    assert compare(record, changed).versions == ("injected fault none → loss-summed",)


def test_exit_codes_say_what_changed(tmp_path, capsys, record):
    def code(new, *arguments):
        file = tmp_path / "new.json"
        file.write_text(json.dumps(new))
        return main(["compare", str(EMBEDDED), str(file), *arguments])

    assert code(record) == code(record, "--fail-on", "any") == 0
    assert code(broken(record, "causality")) == 1
    more = deepcopy(record)
    more["checks"].append({**entry(record, "causality"), "test": "another"})
    assert (code(more), code(more, "--fail-on", "any")) == (0, 1)
    capsys.readouterr()
    code(broken(record, "causality"), "--format", "json")
    told = json.loads(capsys.readouterr().out)
    assert [(c["kind"], c["check"], c["regression"]) for c in told["changes"]] == [("new failure", "causality", True)]


def test_markdown_shows_strangers_words_as_text(record):
    change = Change("new failure", "t", "c", "x[<b>|`a`\n\x1b[31m]", "", "kept", "BROKEN: ![i](http://e)")
    found = as_markdown(Comparison((change,), ("model [a](b) → c",), 1))
    assert "<b>" not in found and "\x1b" not in found and "](" not in found.replace("\\](", "")
    row = next(line for line in found.splitlines() if line.startswith("| **new failure**"))
    assert row.replace("\\|", "").count("|") == 6
    assert escaped("a|b") == "a\\|b"


def test_every_kind_is_a_regression_or_not_one():
    assert set(REGRESSIONS) < set(KINDS)
