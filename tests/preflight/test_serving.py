"""What vLLM serves of an adapter, by the release that will serve it."""

from __future__ import annotations

import pytest
from preflight_corpus import Workshop

from pytest_qvl.preflight import preflight
from pytest_qvl.preflight.questions import serving


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("serving"))


@pytest.mark.parametrize(
    ("version", "state"), [(None, "not judged"), ("0.31.0", "red"), ("0.32.0", ""), ("0.33.1.dev4", "")]
)
def test_ranks_of_their_own_are_served_since_0_32(shop, monkeypatch, version, state):
    monkeypatch.setattr(serving, "installed", {"vllm": version}.get)
    adapter = shop.adapter("qwen2_5_vl", rank_pattern={"q_proj": 4})
    report = preflight(shop.base("qwen2_5_vl"), adapter, runtime="vllm")
    assert [finding.state for finding in report if finding.name == "vllm-patterns"] == [state] * bool(state)
    assert [finding.name for finding in report.red] == ["vllm-patterns"] * (state == "red")


def test_biases_of_b_are_not_served(shop):
    adapter = shop.adapter("qwen2_vl", lora_bias=True, target_modules=["q_proj"])
    report = preflight(shop.base("qwen2_vl"), adapter, runtime="vllm")
    assert "does not serve lora_bias" in next(f.line for f in report.red if f.name == "vllm-unsupported")
