"""``pytest-qvl data``: rows of a data set through a collator, what was found, and refusals in one sentence."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qvl.cli import main

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = """
from pytest_qvl.samples import scenes


def row(sample):
    user = [*({"type": "image"} for _ in sample.images), {"type": "text", "text": sample.question}]
    said = [{"type": "text", "text": sample.answer}]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": said}]
    return {"messages": messages, "images": list(sample.images)}


def rows():
    return [row(sample) for sample in scenes(0, 1, cell=14)]


class Collator:
    def __init__(self, processor):
        self.processor = processor

    def __call__(self, rows):
        texts = [self.processor.apply_chat_template(row["messages"], tokenize=False) for row in rows]
        images = [image for row in rows for image in row["images"]]
        batch = self.processor(text=texts, images=images or None, padding=True, return_tensors="pt")
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch


def without_labels(processor):
    collator = Collator(processor)
    return lambda rows: {name: value for name, value in collator(rows).items() if name != "labels"}


def broken(rows):
    raise KeyError("image")


empty, number, text = [], 3, lambda rows: "text"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(SCRIPT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["data", *arguments])
    return code, *capsys.readouterr()


def test_the_suites_own_rows_are_sound(capsys: Any) -> None:
    code, out, _ = run(capsys, "--rows", "4")
    assert code == 0
    assert "batch 0 (rows 0, 3, 6, 9): nothing found" in out
    assert out.endswith("0 findings in 1 batches of 4 rows\n")


def test_what_a_collator_gets_wrong_is_said_once_for_each_kind(capsys: Any, folder: Path) -> None:
    code, out, _ = run(
        capsys, "--dataset", "mine.py:rows", "--collator", "mine.py:Collator", "--rows", "5", "--batch-size", "3"
    )
    assert code == 1
    assert out.count("whole-row-learned: row 0, token ") == out.count("(also row 1, token ") == 2
    assert "cause:    labels are a copy of input_ids" in out
    assert out.endswith("5 findings in 2 batches of 5 rows\n")


def test_json_has_all_of_it(capsys: Any, folder: Path) -> None:
    code, out, _ = run(
        capsys, "--dataset", "mine:rows", "--collator", "mine:without_labels", "--inference", "--rows", "2", "--json"
    )
    assert code == 0
    [batch] = json.loads(out)["batches"]
    assert (batch["rows"], batch["findings"], batch["figures"]["rows"]) == ([0, 9], [], 2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dataset", "mine"], "--dataset 'mine' has no form MODULE:NAME, such as train.py:dataset or my.data:rows"),
        (["--dataset", "mine.py:nothing"], "mine.py:nothing cannot be imported: AttributeError: "),
        (["--dataset", "mine.py:empty"], "--dataset mine.py:empty has no rows"),
        (["--dataset", "mine.py:number"], "--dataset mine.py:number gives a value of type int: rows have len() and"),
        (["--dataset", "mine.py:rows"], "--collator is needed: rows of mine.py:rows are of type dict"),
        (["--dataset", "mine.py:rows", "--collator", "mine.py:number"], "--collator mine.py:number is of type int"),
        (["--dataset", "mine.py:rows", "--collator", "mine.py:broken"], "raised KeyError: 'image' on rows 0, 3, 6, 9"),
        (["--dataset", "mine.py:rows", "--collator", "mine.py:text"], "returned a value of type str: a batch is a map"),
        (["--dataset", "mine.py:rows", "--collator", "mine.py:without_labels"], "without labels: add them, or ask for"),
        (["--rows", "0"], "--rows must be at least 1, got 0"),
        (["--batch-size", "-1"], "--batch-size must be at least 1, got -1"),
        (["--model", "nobody"], "model 'nobody' is unknown"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_input_is_one_sentence(capsys: Any, folder: Path, arguments: list[str], says: str) -> None:
    code, out, error = run(capsys, *arguments, *([] if "--rows" in arguments else ["--rows", "4"]))
    assert (code, out) == (2, "")
    assert error.startswith("pytest-qvl data: error: ")
    assert says in error
    assert error.count("\n") == 1
