"""A few of the healthy trainings of ``healthy.py``, which runs as many as are asked for."""

from __future__ import annotations

import pytest

from . import healthy

QUICK = 3


@pytest.mark.parametrize("number", [QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in range(20, 28))])
def test_no_false_alarm(number, bench, monkeypatch):
    monkeypatch.setattr(healthy, "_bench", bench)
    result = healthy.run(number)
    assert result["state"] == "finished", result.get("error") or result["findings"]
    assert not result["not_judged"].keys() - {"quantization_census", "vision_not_backpropagated", "learning_rate"}


def test_runs_are_drawn_by_their_number_and_differ():
    drawn = [healthy.drawn(number) for number in range(100)]
    assert drawn == [healthy.drawn(number) for number in range(100)]
    for name in ("adapter", "dtype", "quantized", "packing", "text_only", "resumes", "side"):
        assert len({run[name] for run in drawn}) > 1, name
    assert {run["arguments"]["optim"] for run in drawn} == set(healthy.OPTIMIZERS)
    assert {run["adapter"] for run in drawn} == set(healthy.ADAPTERS)
