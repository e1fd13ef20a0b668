"""The second column of the matrix: the reference recorded after the damage, as a user's is."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from pytest_qvl.faults import catalogue
from pytest_qvl.faults.common_mode import reads_reference, same_outcome, unshared
from pytest_qvl.faults.matrix.by_model import by_model
from pytest_qvl.faults.matrix.figure import AFTER, cells
from pytest_qvl.faults.matrix.page import page
from pytest_qvl.faults.matrix.results import After, Result, Row, summary
from pytest_qvl.faults.matrix.runner import assembled, complete
from pytest_qvl.faults.matrix.work import Done, Plan, Task, tasks
from pytest_qvl.faults.subject import embedded

READER, OTHER = "vision_stability", "causality"
BEFORE = {READER: "caught", OTHER: "pass"}
SHARED, LIBRARY, ADAPTER = "windows-never-applied", "scatter-off-by-one", "adapter-of-another-base"


def row(after: After | None = None, **more: object) -> Row:
    plain = {"check": READER, "outcomes": dict(BEFORE), "named": True, "smoke": "pass", **more}
    return Row.from_dict({**plain, "after": None if after is None else asdict(after)})


@pytest.mark.parametrize(
    ("found", "checks"),
    [
        (row(), None),
        (row(same="it reads no reference"), (READER,)),
        (row(same="no reference can have it", named=False), (READER,)),
        (row(After({READER: "caught"}, named=True)), (READER,)),
        (row(After({READER: "pass", "alignment": "cannot judge"})), ()),
        (row(After({READER: "pass"}), outcomes={READER: "caught", OTHER: "caught"}), (OTHER,)),
        (row(After({READER: "pass", "alignment": "refused"})), ("alignment",)),
        (row(After(broken="KeyError: 'x'")), ()),
        (row(After(), missing="CPU only"), None),
    ],
)
def test_who_catches_a_fault_that_is_in_the_reference_too(found: Row, checks: tuple[str, ...] | None) -> None:
    assert found.caught_after == checks


def test_a_fault_is_run_again_only_where_its_outcome_may_differ() -> None:
    faults = catalogue()
    assert same_outcome(faults[SHARED]) == ""
    assert same_outcome(faults[LIBRARY]) == "feature_scatter reads no reference"
    assert same_outcome(faults[ADAPTER]) == unshared(faults[ADAPTER]) == "a reference is recorded without the adapter"
    assert not unshared(faults[LIBRARY])
    asked = [task.key for task in tasks(Plan(embedded())) if task.part == "after"]
    assert asked == [name for name, fault in faults.items() if not same_outcome(fault)]
    assert SHARED in asked
    assert all(reads_reference(faults[name].check) for name in asked)
    assert len(asked) < len(faults) / 4
    assert not any(task.part == "after" for task in tasks(Plan(embedded(), named_only=True)))


def test_both_outcomes_stand_in_the_record_and_come_back() -> None:
    plan = Plan(embedded(), (SHARED, LIBRARY))
    done = [
        Done(Task("fault", SHARED), asdict(row()), 1.0),
        Done(Task("fault", LIBRARY), asdict(row(same="feature_scatter reads no reference")), 1.0),
    ]
    unfinished = assembled(plan, done, "CPU")
    assert not complete(plan, unfinished)
    assert not unfinished.after
    after = After({READER: "pass", "alignment": "pass"}, said="nothing")
    result = assembled(plan, [*done, Done(Task("after", SHARED), asdict(after), 2.0)], "CPU")
    assert complete(plan, result)
    assert result.rows[SHARED].after == after
    assert Result.from_dict(result.as_dict()) == result
    assert result.after == {SHARED: (), LIBRARY: (READER,)}


def results(*after: After | None) -> Result:
    names = list(catalogue())
    rows = {
        name: row(one) if one else row(same="no reference can have it") for name, one in zip(names, after, strict=False)
    }
    return Result("d", {}, rows=rows)


def test_page_figure_and_totals_show_the_second_column() -> None:
    result = results(None, After({READER: "pass"}), After({READER: "pass", OTHER: "caught"}), After(named=True))
    _, missed, *_ = result.rows
    assert "3 of 4 with the reference recorded after the damage" in summary(result)
    assert "3 judged again, the others' outcomes do not depend on it; 1 by another check" in summary(result)
    assert f"missed: {missed}\n" in summary(result) + "\n"
    table = page(result)
    assert "| caught by | reference after | also by |" in table
    assert [kinds[AFTER] for kinds in cells(result).values()] == ["named", "missed", "caught", "named"]
    lines = {name: next(line for line in table.splitlines() if line.startswith(f"| `{name}`")) for name in result.rows}
    assert [line.split(" | ")[3] for line in lines.values()] == ["same", "**missed**", OTHER, READER]
    assert len({line.count(" | ") for line in lines.values()}) == 1
    assert "| caught with the reference recorded after the damage | 3 of 4 |" in by_model([result])
    assert f"| `{missed}` | {catalogue()[missed].check} | caught; reference after: missed |" in by_model([result])


def test_a_record_without_the_column_is_shown_without_it() -> None:
    old = asdict(row())
    del old["after"], old["same"]
    result = Result("d", {}, rows={SHARED: Row.from_dict(old)})
    assert "with the reference recorded after the damage, as a user's is: not run" in page(result)
    assert "reference after" not in page(result)
    assert AFTER not in cells(result)[SHARED]
    assert "| caught with the reference recorded after the damage | not run |" in by_model([result])


def test_a_fault_that_is_missed_or_breaks_on_the_reference_is_no_success() -> None:
    assert not results(After(broken="KeyError: 'x'")).good
    assert not results(After({READER: "pass"})).good
    assert results(After(named=True)).good
    assert results(After({READER: "pass", OTHER: "caught"})).good
