"""How a finding says what was found."""

from __future__ import annotations

from pytest_qvl.evidence import Evidence
from pytest_qvl.training.findings import Finding, GuardError


def test_problems_that_are_not_listed_are_counted():
    problems = tuple(f"tensor {number} is off" for number in range(10))
    evidence = Evidence("gradients", "gradients are finite", problems=problems, notes=("of 56 tensors",))
    said = str(GuardError([Finding(evidence, 1, "before step 2 is taken")]))
    assert said.startswith(
        "training stopped by gradients, before step 2 is taken: tensor 0 is off\nalso: tensor 1 is off"
    )
    assert "also: tensor 7 is off\nalso: 2 more problems of the same kind\nnote: of 56 tensors" in said
    assert "tensor 8" not in said
