"""Figures hold or not, verdicts raise or not, and evidence survives its way to the record."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_qvl.evidence import CheckFailed, Evidence, Figure, Judge, Table, collecting, printable, show

NUMBERS = st.integers(-(10**12), 10**12) | st.floats(allow_nan=False)
VALUES = NUMBERS | st.text(max_size=8) | st.booleans()


@pytest.mark.parametrize(
    ("value", "relation", "limit", "holds"),
    [
        (1.0, "<=", 1.0, True),
        (1.1, "<=", 1.0, False),
        (1.0, ">=", 1.0, True),
        (0.9, ">=", 1.0, False),
        (3, "==", 3, True),
        ("nf4", "==", "fp4", False),
        (math.nan, "<=", 1.0, False),
        (math.nan, ">=", 1.0, False),
        (math.nan, "==", math.nan, False),
        (math.inf, "<=", 1.0, False),
        (-math.inf, ">=", 1.0, False),
        (5, "", None, True),
        (math.nan, "", None, True),
    ],
)
def test_a_figure_holds(value, relation, limit, holds):
    assert Figure("x", value, limit, relation).holds is holds


def test_utilisation_grows_towards_the_limit():
    utilisations = [Figure("x", value, 10.0, "<=").utilisation for value in (0.0, 1.0, 9.0, 10.0, 11.0)]
    assert utilisations == [0.0, 0.1, 0.9, 1.0, math.inf]
    assert [Figure("x", value, 10.0, ">=").utilisation for value in (20.0, 10.0, 9.0)] == [0.5, 1.0, math.inf]
    assert Figure("x", 3, 3, "==").utilisation == 0.0
    assert Figure("x", 3).utilisation < 0
    assert Figure("x", 0, 0, "<=").utilisation == 0.0


def test_the_worst_figure_is_the_one_nearest_to_its_limit():
    figures = (Figure("reported", 9), Figure("far", 1.0, 10.0, "<="), Figure("near", 9.0, 10.0, "<="))
    assert Evidence("c", "p", figures).worst == figures[2]
    assert Evidence("c", "p").worst is None


@pytest.mark.parametrize(
    ("value", "shown"), [(1234567, "1,234,567"), (0.123456, "0.1235"), (True, "True"), ("nf4", "nf4"), (1e-9, "1e-09")]
)
def test_numbers_are_shown_short(value, shown):
    assert show(value) == shown


def test_a_figure_reads_as_a_sentence():
    assert str(Figure("drift", 0.5, 1.0, "<=", "nat")) == "drift 0.5 nat (<= 1 nat)"
    assert str(Figure("layers", 28)) == "layers 28"


def test_a_table_is_aligned():
    assert str(Table(("group", "n"), (("vision", 20), ("head", None)))) == "group   n\n------  --\nvision  20\nhead"


def test_a_verdict_without_problems_is_evidence():
    judge = Judge("c", "p")
    assert judge.equal("layers", 28, 28, else_say="layers differ")
    judge.report("seconds", 0.5, "s")
    judge.note("nothing to see")
    evidence = judge.verdict(("a",), [("b",)])
    assert evidence.ok
    assert [figure.name for figure in evidence.figures] == ["layers", "seconds"]
    assert evidence.notes == ("nothing to see",)
    assert evidence.table == Table(("a",), (("b",),))


def test_a_broken_promise_says_what_by_how_much_and_against_what():
    judge = Judge("c", "p")
    assert not judge.at_most("drift", 2.0, 1.0, else_say="the logits drift", unit="nat")
    assert not judge.at_least("share", 0.5, 0.9, else_say="too few")
    judge.problem("and something else")
    judge.note("by the way")
    with pytest.raises(CheckFailed) as caught:
        judge.verdict(("token",), [(7,)])
    assert str(caught.value).splitlines() == [
        "the logits drift [drift 2 nat (<= 1 nat)]",
        "also: too few [share 0.5 (>= 0.9)]",
        "also: and something else",
        "note: by the way",
        "",
        "token",
        "-----",
        "7",
    ]
    assert isinstance(caught.value, AssertionError)
    assert not caught.value.evidence.ok


def test_many_problems_are_counted_not_listed():
    judge = Judge("c", "p", problems=[f"problem {i}" for i in range(20)])
    with pytest.raises(CheckFailed) as caught:
        judge.verdict()
    lines = str(caught.value).splitlines()
    assert lines[0] == "problem 0"
    assert lines[-1] == "also: 12 more problems of the same kind"
    assert len(lines) == 9


def test_verdicts_are_collected_kept_and_broken_alike_and_only_inside():
    with collecting() as outer:
        Judge("first", "p").verdict()
        with collecting() as inner:
            with pytest.raises(CheckFailed):
                Judge("second", "p", problems=["broken"]).verdict()
        Judge("third", "p").verdict()
    Judge("fourth", "p").verdict()
    assert [e.check for e in outer] == ["first", "third"]
    assert [e.check for e in inner] == ["second"]


FIGURES = st.builds(
    Figure,
    name=st.text(max_size=8),
    value=VALUES,
    limit=st.none() | VALUES,
    relation=st.sampled_from(["", "=="]),
    unit=st.text(max_size=3),
)


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        Evidence,
        check=st.text(max_size=8),
        promise=st.text(max_size=8),
        figures=st.lists(FIGURES, max_size=4).map(tuple),
        problems=st.lists(st.text(max_size=8), max_size=3).map(tuple),
        notes=st.lists(st.text(max_size=8), max_size=3).map(tuple),
        table=st.none() | st.builds(Table, st.tuples(st.text(max_size=4)), st.tuples(st.tuples(st.none() | VALUES))),
    )
)
def test_evidence_survives_json(evidence):
    assert Evidence.from_dict(json.loads(json.dumps(evidence.as_dict()))) == evidence


def test_every_one_of_many_counts_the_right_ones_and_says_how_many_are_off():
    judge = Judge("check", "promise")
    assert judge.every("right", range(56), [], else_say=lambda off: pytest.fail("nothing is off"))
    assert not judge.every("right", range(56), "abc", else_say=lambda off: f"{off} are off")
    assert judge.figures == [Figure("right", 56, 56, "=="), Figure("right", 53, 56, "==")]
    assert judge.problems == ["3 of 56 are off [right 53 (== 56)]"]


@pytest.mark.parametrize("text", ["::error::no", "reply\n \t::add-mask::a", "reply\n\n::debug::a", "a ##[error]b"])
def test_what_strangers_said_is_no_workflow_command(text):
    """The runner trims a line before it looks for ``::``, and finds the older ``##[`` anywhere in it."""
    said = printable(text)
    assert not any(line.strip().startswith("::") or "##[" in line for line in said.splitlines())
    assert said.replace("\\", "") == text


@pytest.mark.parametrize("text", ["tests/test_a.py::test_b", "a: :b", "# # [x]", "line\n  text"])
def test_what_commands_nothing_stays_as_it_is(text):
    assert printable(text) == text
