"""Faults make no tensor without saying where: one made on the CPU cannot meet a model on CUDA."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest

from pytest_qvl import faults
from pytest_qvl.faults.case import Case
from pytest_qvl.faults.subject import Subject, embedded

FOLDER = Path(faults.__file__).parent
FACTORIES = {
    *("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm"),
    *("tensor", "zeros"),
}


# Functions that make tensors on the CPU, and why they are right to.
ON_THE_CPU = {
    **dict.fromkeys(
        ("data.py:column", "data.py:pack", "tools.py:padded"),
        "rows as a collator makes them, before they go to the model",
    ),
    "generation.py:generate": "a number for Python, from the stream that the seed is for",
    "weights.py:draw": "a tensor of a checkpoint's file",
    "isa_used.py:_compute_verbosely": "asks which instructions the CPU runs",
    "tensors.py:_changed": "drawn on the CPU so that a seed means the same on every device, and copied",
}


def without_device(source: str) -> list[str]:
    """Functions in which ``torch`` makes a tensor of its own without being told where, once for each."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [
        [each.name for each in functions if each.lineno <= node.lineno <= (each.end_lineno or 0)][-1]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in FACTORIES
        and "device" not in [keyword.arg for keyword in node.keywords]
    ]


def test_the_search_finds_what_it_is_for() -> None:
    makes = ("torch.arange(3)", "torch.arange(3, device=x.device)", "torch.zeros_like(x)")
    source = "import torch\n" + "".join(f"def f{number}(x):\n    return {made}\n" for number, made in enumerate(makes))
    assert without_device(source) == ["f0"]


def test_every_tensor_says_where_it_is_made() -> None:
    found = {f"{file.name}:{name}" for file in FOLDER.rglob("*.py") for name in without_device(file.read_text("utf-8"))}
    assert found == set(ON_THE_CPU)


def test_a_subject_is_checked_where_it_is_named() -> None:
    assert Subject.of("embedded") == embedded()
    assert Subject.of("embedded").is_default
    assert not Subject.of("embedded", "cuda").is_default
    assert Subject.of("synthetic:qwen2.5-vl-3b", "cuda").label == "qwen2.5-vl-3b × CUDA"
    with pytest.raises(ValueError, match="device 'tpu' is not one of cpu, cuda"):
        Subject.of("embedded", "tpu")
    with pytest.raises(ValueError, match="'float64' is not one of"):
        Subject.of("embedded", dtype="float64")


def test_a_batch_goes_where_the_model_is_and_stays_a_leaf() -> None:
    """On the meta device, which stands for one that this machine need not have."""
    from pytest_qvl.models.sources.embedded import embedded_model_dir
    from pytest_qvl.models.sources.processors import load_processor
    from pytest_qvl.samples import scenes

    somewhere = SimpleNamespace(device="meta")
    grad = [lambda batch, _: {**batch, "pixel_values": batch["pixel_values"].requires_grad_(True)}]
    rows = scenes(0, 1, ["colour"])
    case = Case(None, load_processor(embedded_model_dir()), None, None, rows, rows, None, None, somewhere)
    case.collators = grad
    batch = case.batch()
    assert {tensor.device.type for tensor in batch.values()} == {"meta"}
    assert batch["pixel_values"].is_leaf
    assert batch["pixel_values"].requires_grad
