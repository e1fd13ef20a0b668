"""Healthy variations under every instruction set: what is offered, what is not, and that the choice takes effect."""

from __future__ import annotations

import json

import pytest

from pytest_qvl.cli import main
from pytest_qvl.faults import healthy_panel
from pytest_qvl.faults.healthy_child import Share
from pytest_qvl.faults.healthy_panel import Outcome, _process, record, run, shown
from pytest_qvl.faults.isa import Cpu, Setting, settings, this_cpu

OLD = Cpu("an old CPU", ("sse4_2", "avx2", "fma"))
AMX = Cpu(
    "a new CPU",
    (
        *(*OLD.flags, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_fp16"),
        *("amx_tile", "amx_int8", "amx_bf16"),
    ),
)


def test_all_settings_are_listed_and_only_offered_ones_run() -> None:
    everywhere = settings("all")
    assert len(everywhere) == len(set(everywhere)) == 5 * 3 * 2
    assert all(not setting.lacks(AMX) for setting in everywhere)
    offered = [str(s) for s in everywhere if not s.lacks(OLD)]
    assert offered == [
        f"oneDNN AVX2, ATen {aten}, {threads}" for aten in ("default", "avx2") for threads in ("1 thread", "2 threads")
    ]
    assert Setting("AVX512_CORE_AMX", "avx2", 1).lacks(OLD)[-3:] == ("amx_tile", "amx_int8", "amx_bf16")
    assert settings("native") == [Setting("", "", 1)]


def test_every_variation_goes_to_one_offered_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    kinds: dict[Setting, set[int]] = {}

    def process(outcome: Outcome, numbers: list[int]) -> None:
        seen.extend(numbers)
        kinds.setdefault(outcome.setting, set()).update(number % 8 for number in numbers)
        outcome.share.variations += len(numbers)

    monkeypatch.setattr(healthy_panel, "_process", process)
    outcomes = run(1000, settings("all"), AMX, 4)
    assert sorted(seen) == list(range(1000))
    assert all(33 <= outcome.share.variations <= 34 for outcome in outcomes)
    assert min(map(len, kinds.values())) >= 6  # every setting meets every dtype and nearly every kind
    old = run(10, settings("all"), OLD, 1)
    assert sum(outcome.share.variations for outcome in old) == 10
    assert sum(bool(outcome.missing) for outcome in old) == 26


def test_what_is_shown_and_recorded() -> None:
    alarmed = Outcome(
        Setting("AVX2", "avx2", 1), share=Share("AVX2", 90, {"alignment": 2}, ["#3, causality: x\x1b"], 5)
    )
    absent = Outcome(Setting("AVX512_CORE", "avx2", 2), missing=("avx512f",))
    dead = Outcome(Setting("AVX2", "default", 1), broken=["the process ended with -9: Killed"])
    text = shown([alarmed, absent, dead], OLD)
    assert "oneDNN AVX2, ATen avx2, 1 thread          5" in text
    assert "oneDNN AVX512_CORE, ATen avx2, 2 threads  not offered (no avx512f)" in text
    assert "FALSE ALARM under oneDNN AVX2, ATen avx2, 1 thread: #3, causality: x\\x1b" in text
    assert "BROKEN the process ended with -9: Killed" in text
    assert text.endswith(
        "an old CPU: 1 false alarms over 5 healthy variations (90 checks) under 1 of 3 settings; 1 not offered by this CPU"
    )
    assert [outcome.green for outcome in (alarmed, absent, dead)] == [False, True, False]
    kept = json.loads(json.dumps(record([alarmed, absent], OLD)))
    assert kept["cpu"] == {"model": "an old CPU", "flags": ["sse4_2", "avx2", "fma"]}
    assert [(s["onednn"], s["offered"]) for s in kept["settings"]] == [
        ("AVX2", True),
        ("AVX512_CORE", False),
    ]
    assert kept["settings"][0]["alarms"] == ["#3, causality: x\x1b"]


def test_a_setting_takes_effect_in_its_process() -> None:
    assert this_cpu().model
    outcome = Outcome(Setting("AVX2", "default", 1))
    _process(outcome, [])
    assert outcome.broken == []
    assert outcome.share.capability == "DEFAULT"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--isa", "all"], "--isa says where the variations of --healthy run: give both"),
        (["--healthy", "0"], "--healthy is a number of variations from 1, not 0"),
        (["--healthy", "5", "--matrix"], "--healthy takes no --matrix"),
        (["--healthy", "5", "--out", "/no/such/r.json"], "--out: there is no folder '/no/such': make it first"),
        (["--healthy", "5", "--jobs", "0"], "--jobs is a number of processes from 1, not 0"),
    ],
)
def test_nonsense_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert main(["faults", *arguments]) == 2
    assert capsys.readouterr().err == f"pytest-qvl faults: error: {says}\n"
