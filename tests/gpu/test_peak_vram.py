"""``peak_vram`` on a real GPU: it passes, and fails for what stays beside the model and for a phase above its limit."""

from __future__ import annotations

import pytest

from pytest_qvl import checks
from pytest_qvl.evidence import CheckFailed
from pytest_qvl.faults import apply, healthy_case
from pytest_qvl.faults.matrix.panel import PASS, judge
from pytest_qvl.faults.subject import Subject
from pytest_qvl.vram.meter import Meter

pytestmark = pytest.mark.gpu
MiB = 2**20


@pytest.fixture(scope="module")
def case(torch):
    case = healthy_case(subject=Subject.of("embedded", "cuda"))
    yield case
    case.model = None


def test_a_healthy_model_passes(case):
    assert judge(case, "peak_vram").outcome == PASS


def test_memory_left_beside_the_model_is_a_finding(case):
    with apply("memory-left-beside-the-model", case) as damaged:
        said = judge(damaged, "peak_vram")
    assert said.noticed
    assert "are allocated beside the model's own" in said.message


def test_a_phase_above_its_limit_is_a_finding(case):
    batches = case.batch(), case.batch(padding_side="right", answers=True)
    with pytest.raises(CheckFailed, match=r"train step needs .* \(allocated\), .* above the limit"):
        checks.peak_vram(case.model, *batches, Meter(), limit=MiB, of="allocated")
