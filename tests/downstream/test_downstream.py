"""A project of somebody else's: the shipped suite and its own tests, and what it is told about its mistakes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent / "project"
SUITE = ("--pyargs", "pytest_qvl.suite")
pytestmark = pytest.mark.slow  # a process that loads the model, each


@dataclass(frozen=True)
class Mistake:
    """A line of the project that somebody gets wrong.

    Attributes:
        file: Which file of the project.
        right: The text that is there.
        wrong: What stands in its place.
        run: What of the run shows it: arguments of pytest.
        says: Regular expression for what the run says.
    """

    file: str
    right: str
    wrong: str
    run: tuple[str, ...]
    says: str


MISTAKES = {
    "the adapter reaches into vision": Mistake(
        "captioner/lora.py",
        r'r".*language_model.*\.(q_proj|v_proj|gate_proj|up_proj|down_proj)"',
        '["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]',
        (*SUITE, "-k", "adapter_census"),
        r"LoRA leaked into vision \(12\): target_modules",
    ),
    "no module has the name that LoRA is to adapt": Mistake(
        "captioner/lora.py",
        "q_proj|v_proj|gate_proj|up_proj|down_proj",
        "wq|wv",
        (*SUITE, "-k", "adapter_census"),
        r"qvl_lora_model: .*\(wq\|wv\) not found in the base model",
    ),
    "the vision tower is quantized": Mistake(
        "captioner/lora.py",
        '["model.visual", "lm_head"]',
        '["visual", "lm_head"]',
        (*SUITE, "-k", "quantization_census"),
        r"vision: 20 of 20 linears are NF4 but must stay 16-bit.*skip list \['visual', 'lm_head'\]",
    ),
    "the base is loaded in 8 bits": Mistake(
        "captioner/lora.py",
        "load_in_4bit=True",
        "load_in_8bit=True",
        (*SUITE, "-k", "quantization_census"),
        "qvl_quantization_config.*4.?bit",
    ),
    "the collator learns the prompt": Mistake(
        "captioner/data.py",
        'line[: self.encode([row], [prompt])["input_ids"].shape[1]] = -100',
        "pass",
        (*SUITE, "-k", "data"),
        "whole-row-learned: .*copy of input_ids",
    ),
    "the collator drops the token types": Mistake(
        "captioner/data.py",
        '        batch["labels"] = labels\n',
        '        batch["labels"] = labels\n        batch.pop("mm_token_type_ids", None)\n',
        (*SUITE, "-k", "data"),
        "types-missing: .*mm_token_type_ids",
    ),
    "the collator collects images in the wrong order": Mistake(
        "captioner/data.py",
        'for image in row["images"]]',
        'for image in row["images"]][::-1]',
        (*SUITE, "-k", "data"),
        "images-exchanged: .*images were collected in another order",
    ),
    "an override has a narrower scope than who uses it": Mistake(
        "conftest.py",
        '@pytest.fixture(scope="session")\ndef qvl_lora_config',
        "@pytest.fixture\ndef qvl_lora_config",
        (*SUITE, "-k", "adapter_census"),
        r"qvl_lora_config.*conftest\.py.*scope",
    ),
    "an override forgets its return": Mistake(
        "conftest.py",
        "    return Collator(qvl_processor)",
        "    Collator(qvl_processor)",
        (*SUITE, "-k", "data"),
        r"qvl_collator.*conftest\.py.*None",
    ),
    "a limit that is no amount of memory": Mistake(
        "conftest.py",
        '"6GiB"',
        '"a lot"',
        (*SUITE, "-k", "peak_vram"),
        "qvl_vram_limit.*a lot",
    ),
    "a model that is not there": Mistake(
        "conftest.py",
        'return "embedded"',
        'return "./checkpoints/best"',
        (*SUITE, "-k", "quantization_census"),
        "qvl_model.*checkpoints/best",
    ),
    "the optimizer was made over the base": Mistake(
        "conftest.py",
        "[p for p in qvl_lora_model.parameters() if p.requires_grad]",
        "[p for p in qvl_lora_model.parameters() if p.is_floating_point() and not p.requires_grad]",
        (*SUITE, "-k", "adapter_census"),
        "optimizer misses 40 of 40 trainable tensors",
    ),
    "a setting that nobody knows": Mistake(
        "pyproject.toml",
        'qvl_device = "cpu"',
        'qvl_devise = "cpu"',
        ("--collect-only",),
        r"ERROR: qvl_devise \(.*pyproject.toml\): pytest-qvl has no such setting; did you mean qvl_device\?",
    ),
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project in a folder of its own."""
    return Path(shutil.copytree(PROJECT, tmp_path / "captioner"))


def run(project: Path, *arguments: str) -> tuple[int, str]:
    """Exit status and output of pytest, as it is started there."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTEST_ADDOPTS", "CI")}
    command = [sys.executable, "-m", "pytest", *arguments]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_healthy_project_is_green(project: Path) -> None:
    status, said = run(project, "tests", *SUITE)
    assert status == 0, said
    assert "kept: 11 of 12 promises kept" in said
    assert "tests/test_captioner.py ..." in said
    assert re.search(r"conftest.py overrides qvl_collator, .*qvl_vram_limit$", said, re.MULTILINE)


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_red_and_named(project: Path, mistake: Mistake) -> None:
    file = project / mistake.file
    text = file.read_text()
    assert text.count(mistake.right) == 1
    file.write_text(text.replace(mistake.right, mistake.wrong))
    status, said = run(project, *mistake.run)
    assert status not in (0, 5), said
    assert re.search(mistake.says, said), said
    assert "INTERNALERROR" not in said
