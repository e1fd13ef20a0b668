"""Running the matrix: pieces, partial results, verdicts and the page of several models."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from pytest_qvl.cli import main
from pytest_qvl.faults import catalogue
from pytest_qvl.faults.matrix import pool, runner, work
from pytest_qvl.faults.matrix.by_model import by_model, ordered, read_record
from pytest_qvl.faults.matrix.doses import GRADED
from pytest_qvl.faults.matrix.freshness import Definitions, deciding_definitions
from pytest_qvl.faults.matrix.graded import Graded, Smallest, smallest_doses
from pytest_qvl.faults.matrix.panel import Verdict, all_checks
from pytest_qvl.faults.matrix.results import PART_OF_ANOTHER, Result, Row, summary
from pytest_qvl.faults.matrix.runner import assembled, complete, run
from pytest_qvl.faults.matrix.work import Done, Plan, Task, tasks
from pytest_qvl.faults.subject import Subject, embedded

TWO = ("scatter-off-by-one", "rank-halved")
SYNTHETIC = Subject.of("synthetic:qwen2.5-vl-3b", "cuda")


def found(check: str, outcome: str = "caught", **more: object) -> dict[str, object]:
    row = Row(check=check, outcomes={check: outcome}, named=outcome == "caught")
    return {**vars(row), **more}


@pytest.fixture
def plan() -> Plan:
    return Plan(embedded(), TWO, named_only=True)


@pytest.fixture
def doing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Work that only notes what it was asked for."""
    asked: list[str] = []

    def do(plan: Plan, task: Task) -> Done:
        asked.append(task.key)
        if task.part == "health":
            return Done(task, {"outcome": "pass", "message": ""}, 1.0)
        return Done(task, found(catalogue()[task.key].check), 2.0)

    monkeypatch.setattr(runner, "do", do)
    return asked


def test_variations_are_made_of_the_embedded_model_and_doses_of_every_one() -> None:
    parts = [task.part for task in tasks(Plan(embedded()))]
    assert parts.count("fault") == len(catalogue())
    assert parts.count("variation") == work.VARIATIONS
    assert parts.count("dose") == len(GRADED)
    assert {task.part for task in tasks(Plan(SYNTHETIC))} == {"health", "fault", "after", "dose"}
    assert {task.part for task in tasks(Plan(SYNTHETIC, named_only=True))} == {"health", "fault", "dose"}
    assert {task.part for task in tasks(Plan(embedded(), TWO))} == {"health", "fault"}


def test_a_matrix_without_its_doses_is_not_complete() -> None:
    plan = Plan(SYNTHETIC, named_only=True)
    result = Result("d", {}, rows=dict.fromkeys(catalogue(), Row()))
    assert not complete(plan, result)
    result.doses = [{"defect": graded.defect} for graded in GRADED]
    assert complete(plan, result)


def test_doses_alone_are_a_record_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def do(_plan: Plan, task: Task) -> Done:
        asked.append(task.part)
        if task.part == "health":
            return Done(task, {"outcome": "pass", "message": ""}, 0.0)
        defect = GRADED[int(task.key)].defect
        return Done(task, [{"defect": defect, "check": "alignment", "caught": "", "missed": [], "undecided": "u"}], 1.0)

    monkeypatch.setattr(runner, "do", do)
    out = tmp_path / "doses.json"
    chosen = ["faults", "--matrix", "--doses-only", "--jobs", "1", "--model", "embedded:qwen3-vl", "--out", str(out)]
    assert main(chosen) == 0
    checks = {check for graded in GRADED for check in graded.checks}
    assert asked == ["health"] * len(checks) + ["dose"] * len(GRADED)
    assert f"{GRADED[0].defect}, by alignment: not judged" in capsys.readouterr().out
    assert (read_record(out).rows, len(read_record(out).doses)) == ({}, len(GRADED))
    assert main([*chosen, "--named-only"]) == 2
    assert "--named-only says which faults and checks run, and --doses-only that none do" in capsys.readouterr().err


def test_a_dose_is_no_dose_where_the_check_fails_without_a_fault(plan: Plan) -> None:
    dose = {"defect": "eps", "check": "layer_arithmetic", "caught": "1e-6", "missed": [], "undecided": ""}
    done = [
        Done(Task("health", "layer_arithmetic"), {"outcome": "caught", "message": "ill"}, 0.0),
        Done(Task("dose", "0"), [dose], 0.0),
    ]
    (found,) = assembled(plan, done, "CPU").doses
    assert (found["caught"], found["undecided"]) == ("", "the model without a fault fails this check")


def test_a_dose_that_a_check_cannot_judge_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = {"alignment": "cannot judge", "adapter_census": "pass"}
    monkeypatch.setattr(
        "pytest_qvl.faults.matrix.graded.judge", lambda _case, check: Verdict(outcomes[check], f"{check} said")
    )
    defect = Graded("d", tuple(outcomes), (("1", lambda _: nullcontext()), ("2", lambda _: nullcontext())))
    monkeypatch.setattr("pytest_qvl.faults.matrix.graded.damaged", lambda case, _dose: nullcontext(case))
    nothing: Any = None
    assert smallest_doses(nothing, defect) == [
        Smallest("d", "alignment", "", (), "alignment said"),
        Smallest("d", "adapter_census", "", ("1", "2")),
    ]


def test_named_only_asks_the_healthy_model_what_the_faults_are_held_to(plan: Plan) -> None:
    asked = [task.key for task in tasks(plan) if task.part == "health"]
    assert set(asked) == {"feature_scatter", "adapter_census", *work.CHEAP}


def test_a_run_that_is_cut_off_goes_on_where_it_was(plan: Plan, doing: list[str], tmp_path: Path) -> None:
    file = tmp_path / "out.json.part"
    first = run(plan, partial=file, minutes=0)
    assert not first.rows
    assert not complete(plan, first)
    assert doing == []
    run(plan, partial=file)
    everything = list(doing)
    assert everything[-2:] == list(TWO)[::-1] or everything[-2:] == list(TWO)
    cut = file.read_text().splitlines()[:-1]
    file.write_text("\n".join([*cut, '{"part": "fault", "ke']))
    doing.clear()
    result = run(plan, partial=file)
    assert doing == everything[-1:]
    assert complete(plan, result)
    assert result.good


def test_results_of_another_run_are_refused(plan: Plan, doing: list[str], tmp_path: Path) -> None:
    file = tmp_path / "out.json.part"
    run(plan, partial=file)
    with pytest.raises(ValueError, match="holds the results of another run"):
        run(Plan(embedded("float32"), TWO, named_only=True), partial=file)


def test_a_fault_that_was_changed_is_done_again_and_nothing_else(
    plan: Plan, doing: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, now = tmp_path / "out.json.part", deciding_definitions()
    run(plan, partial=file)
    doing.clear()
    changed = Definitions(now.common, {**now.faults, "rank-halved": "another"})
    monkeypatch.setattr(runner, "deciding_definitions", lambda _model: changed)
    assert complete(plan, run(plan, partial=file))
    assert doing == ["rank-halved"]
    assert not run(plan, partial=file).rows["rank-halved"].missing
    assert doing == ["rank-halved"], "and once"
    monkeypatch.setattr(runner, "deciding_definitions", lambda _model: Definitions("another", now.faults))
    with pytest.raises(ValueError, match="holds the results of another run"):
        run(plan, partial=file)


def test_what_fails_without_a_fault_tells_nothing_about_faults(plan: Plan) -> None:
    done = [
        Done(Task("health", "feature_scatter"), {"outcome": "caught", "message": "ill"}, 0.0),
        Done(Task("fault", "scatter-off-by-one"), found("feature_scatter"), 0.0),
        Done(Task("fault", "rank-halved"), found("adapter_census"), 0.0),
    ]
    result = assembled(plan, done, "CPU")
    assert result.rows["scatter-off-by-one"].verdict == "not judged"
    assert result.rows["rank-halved"].verdict == "caught"
    assert result.ill == {"feature_scatter": "caught: ill"}
    assert not result.good


@pytest.mark.parametrize(("outcome", "good"), [("pass", True), ("cannot judge", False)])
def test_the_embedded_model_has_to_be_judged_by_every_check(plan: Plan, outcome: str, good: bool) -> None:
    done = [Done(Task("health", "alignment"), {"outcome": outcome, "message": "no knowledge"}, 0.0)]
    assert (not assembled(plan, done, "CPU").ill) is good
    assert not assembled(Plan(SYNTHETIC), done, "GPU").ill


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (Row(check="a", outcomes={"a": "caught"}, named=True), "caught"),
        (Row(check="a", outcomes={"a": "refused"}), "other words"),
        (Row(check="a", outcomes={"a": "pass", "b": "caught"}), "missed"),
        (Row(check="a", outcomes={"a": "crashed"}), "missed"),
        (Row(check="a", outcomes={"a": "cannot judge"}), "not judged"),
        (Row(check="a", missing="needs knowledge"), "not carried"),
        (Row(check="a", broken="RuntimeError: two devices"), "broken"),
    ],
)
def test_verdicts(row: Row, verdict: str) -> None:
    assert row.verdict == verdict
    result = Result("d", {}, rows={"x": row})
    assert result.good is (verdict in ("caught", "not carried"))


def test_a_process_that_dies_is_one_sentence(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import Future
    from concurrent.futures.process import BrokenProcessPool

    class Pool:
        def __init__(self, *arguments: object, **options: object) -> None: ...

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *exception: object) -> None: ...

        def submit(self, *arguments: object) -> Future[Done]:
            future: Future[Done] = Future()
            future.set_exception(BrokenProcessPool("terminated abruptly"))
            return future

    monkeypatch.setattr(pool, "ProcessPoolExecutor", Pool)
    with pytest.raises(runner.MatrixStopped, match="give fewer --jobs"):
        run(plan, jobs=2)


def test_a_gpu_that_cannot_be_had_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["faults", "--matrix", "--device", "cuda", "--only", TWO[0]]) == 2
    assert "error: --device cuda: CUDA_VISIBLE_DEVICES is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--matrix", "--only", "scatter-of"], "no fault is called 'scatter-of'"),
        (["--matrix", "--model", "nowhere"], "model 'nowhere' is unknown"),
        (["--matrix", "--named-only", "--docs", "d"], "--docs is about the whole matrix of the embedded model"),
        (["--named-only", "--out", "x"], "--named-only, --out: about the run of --matrix; give both"),
        (["--table", "x.json"], "--table makes pages: say where with --docs FOLDER"),
        (["--table", "x.json", "--matrix"], "give one of them"),
        (["--table", "missing.json", "--docs", "d"], "missing.json: "),
    ],
)
def test_options_that_do_not_go_together(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["faults", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_the_record_is_written_when_it_is_complete(
    doing: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    chosen = ["faults", "--matrix", "--named-only", "--jobs", "1", "--out", str(out), "--only", *TWO]
    assert main([*chosen, "--minutes", "0"]) == 1
    assert not out.exists()
    assert (tmp_path / "r.json.part").exists()
    assert main(chosen) == 0
    assert not (tmp_path / "r.json.part").exists()
    assert read_record(out).caught == 2
    assert "2 of 2 faults caught" in capsys.readouterr().out


def test_the_page_shows_every_record_side_by_side(tmp_path: Path) -> None:
    small = Result("d", {"torch": "2"}, rows={TWO[0]: Row(check="feature_scatter", named=True)})
    large = Result(
        "d",
        {"torch": "2"},
        model="synthetic:qwen2.5-vl-7b",
        label="qwen2.5-vl-7b × CUDA",
        device="H100",
        rows={TWO[0]: Row(check="feature_scatter", missing="needs | knowledge; none here")},
    )
    for number, result in enumerate((large, small)):
        (tmp_path / f"{number}.json").write_text(json.dumps(result.as_dict()))
    results = ordered(read_record(tmp_path / f"{number}.json") for number in range(2))
    assert results == [small, large]
    page = by_model(results)
    assert "| fault | must be caught by | embedded × CPU | qwen2.5-vl-7b × CUDA |" in page
    assert f"| `{TWO[0]}` | feature_scatter | caught | not carried: needs \\| knowledge |" in page
    assert f"| `{TWO[1]}` | adapter_census | not in the record | not in the record |" in page
    assert "| not carried by this model or device | 0 | 1 |" in page
    assert "The smallest dose" not in page


def test_the_page_shows_the_smallest_doses_side_by_side() -> None:
    eps = {"defect": "eps", "check": "layer_arithmetic", "caught": "1e-5", "missed": ["1e-6"]}
    results = [
        Result("d", {}, label="one", doses=[eps, {**eps, "check": "alignment", "caught": ""}]),
        Result("d", {}, label="two", doses=[{**eps, "check": "alignment", "caught": "", "undecided": "random"}]),
    ]
    page = by_model([*results, Result("d", {}, label="three", rows={TWO[0]: Row(check="feature_scatter")})])
    assert "| fault | must be caught by | three |" in page
    assert "| defect | check | one | two |" in page
    assert "| eps | layer_arithmetic | 1e-5 | not in the record |" in page
    assert "| eps | alignment | none | not judged |" in page
    last = GRADED[-1]
    assert f"| {last.defect} | {last.checks[0]} | not in the record | not in the record |" in page


def test_a_record_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json: no record of faults: its schema is None"):
        read_record(file)


def test_the_page_says_why_a_check_can_have_no_fault_of_its_own() -> None:
    outcomes = {"label_mask": "caught", "batch": "caught", "causality": "caught"}
    result = Result("d", {}, rows={TWO[0]: Row(check="batch", outcomes=outcomes, named=True, smoke="pass")})
    lines = summary(result).splitlines()
    said = next(line for line in lines if line.startswith("checks without a fault that only they catch: "))
    assert f"label_mask ({PART_OF_ANOTHER['label_mask']}), batch, causality" in said
    assert "batch" in PART_OF_ANOTHER["label_mask"]
    assert set(PART_OF_ANOTHER) <= set(all_checks())
