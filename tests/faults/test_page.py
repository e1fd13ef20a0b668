"""The committed matrix belongs to the faults, checks, probes and variations of this checkout."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pytest_qvl.cli import main
from pytest_qvl.faults import catalogue
from pytest_qvl.faults.matrix.by_model import NAME, by_model, ordered, read_record
from pytest_qvl.faults.matrix.figure import KINDS, SMOKE, cells, draw_matrix
from pytest_qvl.faults.matrix.freshness import definitions_digest
from pytest_qvl.faults.matrix.page import page
from pytest_qvl.faults.matrix.results import CAUGHT, NOT_CARRIED, Result, Row, faults_in_order
from pytest_qvl.figures import digest_of, drawn_digest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RECORDS = sorted((DOCS / "records").glob("faults-*.json"))


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def faults_of(text: str) -> list[str]:
    """The faults that a page has a row for."""
    return re.findall(r"^\| `([\w-]+)` \|", text, flags=re.MULTILINE)


def made(text: str) -> list[str]:
    """Those of them that were made, so that checks judged them."""
    return re.findall(r"^\| `([\w-]+)` \|(?!.*\| not made here: )", text, flags=re.MULTILINE)


def fresh_records() -> list[Result]:
    """Records of every check on every fault of the embedded model on the CPU, as they are in this checkout."""
    records = [read_record(file) for file in RECORDS]
    return [
        record
        for record in records
        if (record.definitions, record.model, record.device) == (definitions_digest(), "embedded", "CPU")
    ]


def test_the_faults_of_this_checkout_were_held_to_its_checks() -> None:
    """In bfloat16, which the page is made for, or in float32: a CPU without bfloat16 takes a third of the time then."""
    fresh = fresh_records()
    assert fresh, "run pytest-qvl faults --matrix --out docs/records/faults-embedded-cpu.json, and make_pages.py"
    for record in fresh:
        assert set(record.rows) == set(catalogue())
        assert {row.verdict for row in record.rows.values()} <= {CAUGHT, NOT_CARRIED}
        assert all(record.after.values()), "with the reference recorded after the damage, too"
        assert max(len(row.outcomes) for row in record.rows.values()) > 30, "by every check, not by the named alone"
        assert not record.ill


def test_the_committed_page_misses_nothing() -> None:
    text = read("faults.md")
    assert "**missed**" not in text
    assert "0 false alarms over 200 healthy variations" in text
    assert "the same with layer_arithmetic, golden_record, batch aside: none\n" in text


def test_the_committed_pages_have_every_fault_and_no_other() -> None:
    """So none is lost without a word, and none added without being judged."""
    assert faults_of(read(NAME)) == list(faults_in_order())
    page = faults_of(read("faults.md"))
    assert page == [name for name in faults_in_order() if name in page]
    fresh = definitions_digest() in read("faults.md")
    assert not fresh or page == list(faults_in_order())


def test_the_committed_figure_is_that_of_the_record() -> None:
    record = read_record(DOCS / "records" / "faults-embedded-cpu.json")
    assert list(cells(record)) == made(read("faults.md"))
    assert drawn_digest(read("faults.svg")) == digest_of(cells(record)), "run python tools/make_pages.py"
    assert (DOCS / "faults.svg").stat().st_size < 400 * len(cells(record))  # it is part of the repository


def small_result() -> Result:
    """Three faults, one of which was not made."""
    names = list(faults_in_order())[:3]
    row = Row(check="feature_scatter", outcomes={"feature_scatter": "caught"}, named=True, smoke="pass")
    return Result("d", {}, rows={names[0]: row, names[1]: Row(missing="CPU only"), names[2]: row})


def test_a_fault_missing_from_page_or_figure_would_be_seen() -> None:
    result = small_result()
    names = list(result.rows)
    assert faults_of(page(result)) == names
    assert made(page(result)) == [names[0], names[2]]
    assert list(cells(result)) == [names[0], names[2]]


def test_the_figure_names_faults_checks_and_kinds(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    result, file = small_result(), tmp_path / "faults.svg"
    draw_matrix(result, file)
    svg = file.read_text(encoding="utf-8")
    words = {"".join(text.itertext()) for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}
    assert words >= {*cells(result), "feature_scatter", SMOKE, *(meaning for _, meaning in KINDS.values())}
    assert drawn_digest(svg) == digest_of(cells(result))
    draw_matrix(result, file)
    assert file.read_text(encoding="utf-8") == svg, "the same record gives the same bytes"


@pytest.mark.parametrize(
    ("outcomes", "says"),
    [
        ([], "there is nothing to draw"),
        ([{"feature_scatter": "sometimes"}], "no colour stands for the outcomes sometimes"),
        ([{"feature_scatter": "pass"}, {"causality": "pass"}], "the record's rows are of different checks: run '"),
    ],
)
def test_a_record_that_cannot_be_drawn_is_refused(outcomes: list[dict[str, str]], says: str, tmp_path: Path) -> None:
    rows = {name: Row(outcomes=row) for name, row in zip(catalogue(), outcomes, strict=False)}
    with pytest.raises(ValueError, match=says):
        draw_matrix(Result("d", {}, rows=rows), tmp_path / "faults.svg")


@pytest.mark.parametrize("work", [["--matrix"], ["--table", str(DOCS / "records" / "faults-embedded-cpu.json")]])
def test_pages_without_matplotlib_are_refused_before_the_work(
    work: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_qvl.figures.find_spec", lambda _: None)
    monkeypatch.delattr("pytest_qvl.faults.matrix.runner.run")
    assert main(["faults", *work, "--docs", str(tmp_path / "docs")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("error: --docs draws a figure, and matplotlib is not installed: pip install 'matplotlib>=3.9'")
    assert not (tmp_path / "docs").exists()


def test_the_readme_counts_them() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"**And it can fail.** {len(catalogue())} deliberate faults" in readme
    assert "Every check has a fault that only it catches" in " ".join(readme.split())
    for figures in re.findall(
        r"^- (\d+) of (\d+) (?:faults raise|faults caught|with)", read("faults.md"), flags=re.MULTILINE
    ):
        assert all(figure in readme for figure in figures)


@pytest.mark.skipif(not RECORDS, reason="no record of faults is committed")
def test_the_page_by_model_is_that_of_the_records() -> None:
    assert read(NAME) == by_model(ordered(map(read_record, RECORDS)))
