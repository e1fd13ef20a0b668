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


def without_device(source: str) -> list[int]:
    """Lines on which ``torch`` makes a tensor of its own without being told where."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in FACTORIES
        and "device" not in [keyword.arg for keyword in node.keywords]
    ]


def test_the_search_finds_what_it_is_for() -> None:
    source = "import torch\nx = torch.arange(3)\ny = torch.arange(3, device=x.device)\nz = torch.zeros_like(x)\n"
    assert without_device(source) == [2]


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_every_tensor_says_where_it_is_made(file: Path) -> None:
    assert without_device(file.read_text(encoding="utf-8")) == []


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
