"""Healthy variations under every instruction set: what is offered, what is not, and that the choice takes effect."""

from __future__ import annotations

import json
import threading
import time
from itertools import chain
from pathlib import Path

import pytest

from pytest_qvl.cli import main
from pytest_qvl.faults.matrix import healthy_panel
from pytest_qvl.faults.matrix.healthy import DTYPES, THOUGHTS, variations
from pytest_qvl.faults.matrix.healthy_child import Judged
from pytest_qvl.faults.matrix.healthy_panel import Child
from pytest_qvl.faults.matrix.healthy_plan import START, Schedule, expected_cost, spread
from pytest_qvl.faults.matrix.healthy_record import BEGIN, COMMAND, END, Outcome, block_of, markdown, record, shown
from pytest_qvl.faults.matrix.isa import Cpu, Setting, settings
from pytest_qvl.faults.matrix.isa_used import ATEN_NAMES, Used

DOCS = Path(__file__).parents[2] / "docs"

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
    assert len(everywhere) == len(set(everywhere)) == (4 * 3 + 1) * 2
    assert all(not setting.lacks(AMX) for setting in everywhere)
    offered = [str(s) for s in everywhere if not s.lacks(OLD)]
    assert offered == [
        f"oneDNN AVX2, ATen {aten}, {threads}" for aten in ("default", "avx2") for threads in ("1 thread", "2 threads")
    ]
    assert Setting("AVX512_CORE_AMX", "avx2", 1).lacks(OLD)[-3:] == ("amx_tile", "amx_int8", "amx_bf16")
    assert settings("native") == [Setting("", "", 1)]


def offered_by(cpu: Cpu) -> list[Setting]:
    return [setting for setting in settings("all") if not setting.lacks(cpu)]


def test_every_variation_goes_to_one_offered_setting_and_few_to_slow_ones() -> None:
    chosen = offered_by(AMX)
    shares = spread(1000, chosen)
    assert sorted(chain(*shares.values())) == list(range(1000))
    slow = {s for s in chosen if s.threads > 1 or s.aten == "default"}
    assert min(len(shares[s]) for s in chosen if s not in slow) > 9 * max(len(shares[s]) for s in slow)
    every = variations(1000)
    for numbers in shares.values():
        assert len(numbers) >= 8
        assert any("alignment" in every[number].checks for number in numbers)
        assert len({every[number].dtype for number in numbers}) == 3
    assert [len(numbers) for numbers in spread(3, offered_by(OLD)).values()] == [1, 1, 1, 0]
    assert {s: sorted(numbers) for s, numbers in spread(5, settings("native")).items()} == {
        Setting("", "", 1): list(range(5))
    }
    assert spread(5, []) == {}


def test_two_threads_take_two_jobs_and_come_first_and_the_end_is_shared() -> None:
    one, two = Setting("AVX2", "avx2", 1), Setting("AVX2", "avx2", 2)
    schedule = Schedule({one: range(10, 40), two: [1, 18, 3]}, jobs=3)
    assert [schedule.begin(), schedule.begin()] == [two, one]
    longest_first = sorted([1, 18, 3], key=lambda number: -expected_cost(variations(19)[number]))
    assert longest_first != [1, 18, 3]
    assert [schedule.number(two) for _ in range(4)] == [*longest_first, None]
    schedule.end(two)
    assert schedule.begin() == one  # worth a second process, and a third ...
    assert schedule.begin() == one
    costs = [expected_cost(variations(40)[schedule.number(one) or 0]) for _ in range(30)]
    assert costs == sorted(costs, reverse=True)
    assert schedule.begin() is None
    few = Schedule({one: range(START)}, jobs=2)
    few.begin()
    few.number(one)
    ended = threading.Timer(0.05, lambda: [few.number(one) for _ in range(START)] and few.end(one))
    ended.start()
    assert few.begin() is None  # ... but the last few are not: it waits


def test_nothing_is_handed_out_when_the_time_is_up_or_a_process_broke() -> None:
    one = Setting("AVX2", "avx2", 1)
    assert Schedule({one: [1, 2]}, 1, time.monotonic()).begin() is None
    schedule = Schedule({one: [1, 2]}, 1)
    assert schedule.begin() == one
    schedule.end(one, broken=True)
    assert schedule.begin() is None


class Pretended:
    """Stands for a process, which takes seconds to start; the real one is held by the test below."""

    dies_at: int | None = None
    alarm_at: int | None = None

    def __init__(self, setting: Setting, *, seed: int, model: str) -> None:
        aten, onednn = ATEN_NAMES.get(setting.aten, "AVX2"), f"Intel {setting.onednn or 'AVX2'}"
        self.setting, self.used = setting, Used(aten, onednn, "", setting.threads)

    def __enter__(self) -> Pretended:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def greet(self) -> None: ...

    def kill(self) -> None: ...

    def judge(self, number: int) -> Judged:
        if number == self.dies_at:
            raise healthy_panel.ChildEnded(f"{self.setting}: the process ended with -9: Killed (variation #{number})")
        alarms = [f"#{number}: embedded, causality (caught): moved"] if number == self.alarm_at else []
        return Judged(number, 18, {"alignment": 1}, {"alignment": "no probe"}, alarms, 2.0)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> type[Pretended]:
    class Own(Pretended):
        pass

    monkeypatch.setattr(healthy_panel, "Child", Own)
    monkeypatch.setattr(healthy_panel, "definitions_digest", lambda _model: "0123")  # reads all code: seconds
    monkeypatch.setattr("pytest_qvl.faults.matrix.freshness.definitions_digest", lambda _model: "0123")
    monkeypatch.setattr("pytest_qvl.faults.matrix.isa.this_cpu", lambda: NATIVE)
    return Own


NATIVE = Cpu("a CPU", ())


def judged_in(file: Path) -> list[int]:
    return [json.loads(line)["number"] for line in file.read_text().splitlines()[1:]]


def test_a_run_goes_on_where_it_was(
    pretended: type[Pretended], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "healthy.json"
    part = tmp_path / "healthy.json.part"
    pretended.dies_at = 3
    command = ["faults", "--healthy", "6", "--out", str(out), "--jobs", "1"]
    assert main(command) == 1
    first = judged_in(part)
    assert 3 not in first
    assert not json.loads(out.read_text())["complete"]
    assert "the process ended with -9: Killed (variation #3)" in capsys.readouterr().out
    with part.open("a") as stream:
        stream.write('{"setting": "as the ma')  # cut off while it was written
    pretended.dies_at = None
    assert main([*command, "--minutes", "1e-9"]) == 3
    assert judged_in(part) == first
    assert "unfinished: " in capsys.readouterr().out
    assert main(command) == 0
    assert not part.exists()
    data = json.loads(out.read_text())
    assert data["complete"]
    assert data["settings"][0]["numbers"] == list(range(6))
    assert data["settings"][0]["judged"] == 6 * 18
    assert data["settings"][0]["undecided"] == {"alignment": 6}


def test_another_cpu_goes_on_under_the_settings_that_it_offers(
    pretended: type[Pretended], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "healthy.json"
    command = ["faults", "--healthy", "60", "--isa", "all", "--out", str(out), "--jobs", "1"]
    monkeypatch.setattr("pytest_qvl.faults.matrix.isa.this_cpu", lambda: AMX)
    pretended.dies_at = 7
    assert main(command) == 1
    begun = judged_in(tmp_path / "healthy.json.part")
    assert 0 < len(begun) < 60
    pretended.dies_at = None
    monkeypatch.setattr("pytest_qvl.faults.matrix.isa.this_cpu", lambda: OLD)
    assert main(command) == 0
    data = json.loads(out.read_text())
    assert data["complete"]
    assert sorted(chain(*(one["numbers"] for one in data["settings"]))) == list(range(60))
    later = [one for one in data["settings"] if OLD.model in one["cpus"]]
    assert later
    assert all(one["onednn"] == "AVX2" and one["aten"] != "avx512" for one in later)


def test_what_is_not_judged_when_the_time_is_up_is_ended_and_left(
    pretended: type[Pretended], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    killed = threading.Event()

    def judge(self: Pretended, number: int) -> Judged:
        assert killed.wait(10)
        raise healthy_panel.ChildEnded("the process ended with -9")

    monkeypatch.setattr(pretended, "judge", judge)
    monkeypatch.setattr(pretended, "kill", lambda self: killed.set())
    monkeypatch.setattr(healthy_panel, "GRACE", 0.1)
    out = tmp_path / "healthy.json"
    assert main(["faults", "--healthy", "2", "--out", str(out), "--minutes", "0.02", "--jobs", "1"]) == 3
    assert killed.is_set()
    assert json.loads(out.read_text())["settings"][0]["broken"] == []


def test_results_of_another_run_are_refused(
    pretended: type[Pretended], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "healthy.json"), "--minutes", "1e-9"]
    assert main(["faults", "--healthy", "6", *out]) == 3
    assert main(["faults", "--healthy", "7", *out]) == 2
    assert "holds the results of another run" in capsys.readouterr().err


def test_an_alarm_is_shown_recorded_and_exits_with_1(
    pretended: type[Pretended], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "healthy.json"
    pretended.alarm_at = 2
    assert main(["faults", "--healthy", "4", "--out", str(out)]) == 1
    shown = capsys.readouterr()
    assert "FALSE ALARM under as the machine is, 1 thread: #2: embedded, causality (caught): moved" in shown.out
    assert "a CPU: 1 false alarms over 4 healthy variations (72 checks) under 1 of 1 settings" in shown.out
    assert main(["faults", "--table", str(out)]) == 0
    block = capsys.readouterr().out
    assert (
        "**1 false alarms over 4 healthy variations**: 72 verdicts of checks under 1 of 1 settings, on a CPU" in block
    )
    assert "| as the machine is | as the machine is | 1 | Intel AVX2 | AVX2 | 4 | 72 | 4 | 1 |" in block
    assert "- Not judged by `alignment` 4 times: no probe" in block
    assert "- False alarm: #2: embedded, causality (caught): moved" in block
    docs = tmp_path / "docs"
    docs.mkdir()
    table = ["faults", "--table", str(out), "--docs", str(docs)]
    assert main(table) == 2
    (docs / "checks.md").write_text("# Checks\n")
    assert main(table) == 2
    assert "has no place for the healthy variations" in capsys.readouterr().err
    (docs / "checks.md").write_text(f"# Checks\n\n{BEGIN.format('old')}\nold\n{END}\n\nMore.\n")
    assert main(table) == 0
    assert (docs / "checks.md").read_text() == f"# Checks\n\n{block}\nMore.\n"


def test_settings_that_are_not_offered_are_shown_and_recorded() -> None:
    absent = Outcome(Setting("AVX512_CORE", "avx2", 2), missing=("avx512f",))
    assert "oneDNN AVX512_CORE, ATen avx2, 2 threads  not offered (no avx512f)" in shown([absent], OLD)
    data = json.loads(json.dumps(record([absent], OLD, 0)))
    assert data["cpu"] == {"model": "an old CPU", "flags": ["sse4_2", "avx2", "fma"]}
    assert "| AVX512_CORE | avx2 | 2 | not offered by this CPU: no avx512f | | | | | |" in markdown(data).replace(
        "|  ", "| "
    )


def test_a_record_of_two_machines_has_the_releases_of_each() -> None:
    outcome = Outcome(Setting("", "", 1))
    used = Used("AVX2", "Intel AVX2", "", 1)
    for number, (cpu, torch) in enumerate([("CPU one", "2.13.0"), ("CPU two", "2.12.1"), ("CPU one", "2.13.0")]):
        judged = Judged(number=number, judged=1, undecided={}, why={}, alarms=[], seconds=1.0)
        outcome.add(judged, used, cpu, {"torch": torch})
    data = json.loads(json.dumps(record([outcome], OLD, 3)))
    both = [{"cpu": "CPU one", "torch": "2.13.0"}, {"cpu": "CPU two", "torch": "2.12.1"}]
    assert data["settings"][0]["versions"] == both
    assert "on CPU one, with torch 2.13.0; on CPU two, with torch 2.12.1." in markdown(data)


def test_a_setting_takes_effect_in_its_process() -> None:
    """The only test that starts a real one: what it computes with, and how it says that it was killed."""
    setting = Setting("AVX2", "default", 1)
    with Child(setting, seed=0) as child:
        child.greet()
        assert child.used.aten == "DEFAULT"
        assert "AVX2" in child.used.onednn
        assert child.used.contradicts(setting) == ""
        child.kill()
        with pytest.raises(healthy_panel.ChildEnded, match=r"ended with -9: .*\(variation #0\)"):
            child.judge(0)


AMX_WORDS = "Intel AVX-512 with float16, Intel DL Boost and bfloat16 support and Intel AMX with bfloat16 support"


@pytest.mark.parametrize(
    ("setting", "used", "says"),
    [
        (Setting("AVX512_CORE_AMX", "avx512", 1), Used("AVX512", AMX_WORDS, "brg_matmul:avx512_core_amx", 1), ""),
        (Setting("", "", 1), Used("AVX512", AMX_WORDS, "", 1), ""),
        (
            Setting("AVX512_CORE_AMX", "avx512", 1),
            Used("AVX512", "Intel AVX2", "", 1),
            "oneDNN computes with Intel AVX2",
        ),
        (Setting("AVX2", "avx2", 1), Used("AVX2", AMX_WORDS, "", 1), f"oneDNN computes with {AMX_WORDS}"),
        (Setting("AVX2", "avx2", 1), Used("DEFAULT", "Intel AVX2", "", 1), "torch computes with DEFAULT"),
        (Setting("AVX2", "avx2", 2), Used("AVX2", "Intel AVX2", "", 1), "torch computes with 1 threads"),
    ],
)
def test_a_setting_without_effect_is_named(setting: Setting, used: Used, says: str) -> None:
    assert used.contradicts(setting).startswith(says)
    assert bool(used.contradicts(setting)) is bool(says)


def test_the_documentation_has_the_figures_of_the_record() -> None:
    block = block_of((DOCS / "checks.md").read_text(encoding="utf-8"))
    record_file = DOCS / "records" / "healthy-cpu.json"
    if not record_file.exists():
        assert "No record is committed yet" in block
        return
    data = json.loads(record_file.read_text(encoding="utf-8"))
    assert block == markdown(data), f"run {COMMAND}"
    assert data["complete"]
    assert all(not setting["alarms"] and not setting["broken"] for setting in data["settings"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--isa", "all"], "--isa says where the variations of --healthy run: give both"),
        (["--healthy", "0"], "--healthy is a number of variations from 1, not 0"),
        (["--healthy", "5", "--matrix"], "--healthy takes no --matrix"),
        (["--healthy", "5", "--out", "/no/such/r.json"], "--out: there is no folder '/no/such': make it first"),
        (["--healthy", "5", "--minutes", "0"], "--minutes is a time above 0, not 0"),
        (["--healthy", "5", "--jobs", "0"], "--jobs is a number of processes from 1, not 0"),
    ],
)
def test_nonsense_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert main(["faults", *arguments]) == 2
    assert capsys.readouterr().err == f"pytest-qvl faults: error: {says}\n"


def test_variations_of_a_named_model_are_of_it_alone() -> None:
    of_it, usual = variations(40, "embedded:qwen3.5"), variations(40)
    assert {one.model for one in of_it} == {"embedded:qwen3.5"} and not any(one.family for one in of_it)
    assert any(one.family for one in usual) and {one.model for one in usual} == {"embedded"}
    assert str(of_it[0]).startswith("#0: embedded:qwen3.5, bfloat16")


def test_a_model_whose_template_thinks_is_taught_thoughts_in_every_way() -> None:
    every, usual = variations(200, "embedded:qwen3.5"), variations(200)
    assert {one.thoughts for one in usual} == {""}
    of_knowledge = (one for one in every if "alignment" in one.checks)
    for chosen in (
        {one.thoughts for one in of_knowledge},
        *({o.thoughts for o in every if o.dtype == d} for d in DTYPES),
    ):
        assert chosen == set(THOUGHTS)
    assert str(every[4]).endswith("thoughts taught")
