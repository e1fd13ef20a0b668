"""Lease, GPU failures and session verdicts, in real pytest processes on a machine whose GPUs are made up.

Torch and the driver's library are stand-ins (``machine/``), first on the path; everything else is the real plugin.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

import pytest_qvl
from pytest_qvl.gpu.nvml import Nvml

ROOT = Path(pytest_qvl.__file__).parents[1]
GIB = 1 << 30
ALWAYS = ("-p", "qvl", "-p", "xdist", "-p", "no:cacheprovider", "--qvl-record", "record.json")
MODEL = """
import os, pytest, torch
GIB = 1 << 30
@pytest.fixture(scope="session")
def qvl_lora_model(qvl_target):
    yield torch.Tensor(GIB)
"""
HOLDER = """
import time
from pytest_qvl.gpu.lease import acquire
from pytest_qvl.gpu.nvml import Gpu
from pytest_qvl.gpu.visible import Visible
lease = acquire(Visible((Gpu("GPU-aaaa"),)))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def machine(pytester, monkeypatch):
    """Describe the machine, then run pytest on it."""
    path = [str(Path(__file__).parent / "machine"), str(ROOT), os.environ.get("PYTHONPATH")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    monkeypatch.setenv("QVL_GPU_LEASES", str(pytester.path / "leases"))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # other plugins' imports take longer than these runs
    for name in ("QVL_GPU_LEASE", "QVL_GPU_SESSION", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)

    def run(*args, gpus=(("GPU-aaaa", 0),), **description):
        monkeypatch.setenv("MACHINE", json.dumps({"gpus": gpus, **description}))
        return pytester.runpytest_subprocess(*ALWAYS, *args)

    return run


@pytest.fixture
def holder(machine):
    """A process of another run that holds the first GPU."""
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def record(pytester):
    return json.loads((pytester.path / "record.json").read_text())


def said(result):
    """Lines of the plugin below the header and the versions."""
    lines = [line for line in result.outlines if line.startswith(("qvl: ", "qvl session: "))]
    return [line for line in lines[1:] if not line.startswith("qvl: transformers ")]


# -- the lease -----------------------------------------------------------------------------------------------

USES = """
import os, pathlib, pytest, sys
def held(): return pathlib.Path(os.environ["QVL_GPU_LEASES"], "GPU-aaaa.lock").read_text()
def test_a_cpu(): assert not pathlib.Path(os.environ["QVL_GPU_LEASES"]).exists()
@pytest.mark.gpu
@pytest.mark.skip
def test_b_skipped(): pass
def test_c_model(qvl_target):
    if qvl_target.device == "cuda":
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-aaaa"
        assert f'"pid": {os.getpid()},' in held()
    else:
        assert not pathlib.Path(os.environ["QVL_GPU_LEASES"]).exists()
def test_d_afterwards(): assert held()
"""


def test_the_first_gpu_test_takes_the_lease_and_the_session_gives_it_back(machine, pytester):
    pytester.makepyfile(USES)
    result = machine()
    result.assert_outcomes(passed=4, skipped=1)
    assert said(result) == ["qvl: GPU lease: NVIDIA T4 (GPU-aaaa)"]
    assert (pytester.path / "leases" / "GPU-aaaa.lock").read_text() == ""
    assert record(pytester)["leases"] == [
        {"name": "NVIDIA T4", "index": 0, "waited": 0.0, "process": "", "busy": False}
    ]


def test_a_build_without_cuda_asks_nobody(machine, pytester):
    pytester.makepyfile(
        "import sys\ndef test_it(qvl_target): pass\ndef test_last(): assert 'pynvml' not in sys.modules"
    )
    result = machine("-rs", "--qvl-device", "cuda", cuda=None)
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*needs CUDA: this PyTorch is a CPU build"])
    assert not (pytester.path / "leases").exists()


def test_without_a_gpu_the_reason_is_exact(machine, pytester, monkeypatch):
    pytester.makepyfile("def test_it(qvl_target): pass")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    machine("-rs", "-m", "gpu").stdout.fnmatch_lines(
        ["SKIPPED*needs CUDA: CUDA_VISIBLE_DEVICES is empty: the caller allows no GPU"]
    )


OWN = "import os, pytest\n@pytest.mark.gpu\ndef test_own(): print('SEES', os.environ.get('CUDA_VISIBLE_DEVICES'))\n"


@pytest.mark.parametrize(
    ("arguments", "more", "sees"),
    [
        ([], "", "None"),
        (["-m", "gpu"], "", "GPU-aaaa"),
        ([], "def test_model(qvl_target): pass", "GPU-aaaa"),
    ],
    ids=["nobody asked", "asked for", "beside a model"],
)
def test_a_gpu_test_without_a_model_leases_where_the_run_is_about_gpus(machine, pytester, arguments, more, sees):
    pytester.makepyfile(OWN + more)
    machine("-s", *arguments).stdout.fnmatch_lines([f"*SEES {sees}"])


def test_who_holds_the_gpu_too_long_is_named_once(machine, pytester, holder):
    pytester.makepyfile("import pytest\n@pytest.mark.parametrize('n', range(3))\ndef test_it(qvl_target, n): pass")
    result = machine("-m", "gpu", "--qvl-gpu-patience", "0")
    result.assert_outcomes(errors=3)
    told = f"no GPU became free within 0 s: NVIDIA T4 (GPU-aaaa) is held by process {holder.pid} "
    assert [line.startswith(told) for line in result.outlines].count(True) == 1
    assert [line.startswith("not run: see the error of ") for line in result.outlines].count(True) == 2
    result.stdout.fnmatch_lines(["*or raise the patience (--qvl-gpu-patience)"])


def test_waiting_is_seen_from_a_worker_and_ends_with_the_holders_death(machine, pytester, holder, monkeypatch):
    pytester.makepyfile("def test_it(qvl_target): pass")
    monkeypatch.setenv("MACHINE", json.dumps({"gpus": [["GPU-aaaa", 0]]}))
    command = [sys.executable, "-m", "pytest", *ALWAYS, "-m", "gpu", "-n", "1", "--qvl-gpu-patience", "60"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=pytester.path, **pipes) as run:
        waiting = next(line for line in run.stderr if "qvl" in line)
        holder.kill()
        output, more = run.communicate(timeout=60)
    assert waiting.startswith("qvl: gw0: waiting for a GPU (at most 60 s; 0 s so far): NVIDIA T4 (GPU-aaaa) is held by")
    assert f"process {holder.pid} " in waiting
    assert "qvl: gw0: got NVIDIA T4 (GPU-aaaa) after " in more
    assert "qvl: GPU lease (gw0): NVIDIA T4 (GPU-aaaa)" in output
    assert "1 passed" in output


CROWD = """
import os, pathlib, pytest, signal, time
@pytest.mark.parametrize("n", range(8))
def test_it(qvl_target, worker_id, n):
    time.sleep(0.05)
    lock = pathlib.Path(os.environ["QVL_GPU_LEASES"], os.environ["CUDA_VISIBLE_DEVICES"] + ".lock")
    assert f'"pid": {os.getpid()},' in lock.read_text()
    pathlib.Path("seen.txt").open("a").write(f"{worker_id} {os.environ['CUDA_VISIBLE_DEVICES']}\\n")
    crash = pathlib.Path("crash.txt")
    if n == 0 and crash.exists():
        crash.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
"""


TWO_BACKENDS = """
import os, pathlib, time
HERE = pathlib.Path(__file__).parent
def test_meets_the_other(qvl_target, qvl_backend):
    assert os.environ["CUDA_VISIBLE_DEVICES"] in ("GPU-aaaa", "GPU-bbbb")
    (HERE / f"{qvl_backend}.met").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    until = time.monotonic() + 20
    while len(list(HERE.glob("*.met"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1)  # so that the other sees this one's file too
    (HERE / f"{qvl_backend}.met").unlink()
    assert time.monotonic() < until, "alone"
"""
OTHER = """
from pytest_qvl.models import backends
backends.BACKENDS["other"] = backends.Registration("other:Nothing", devices=("cuda",))
"""
BOTH_BACKENDS = ("--qvl-backend", "transformers", "--qvl-backend", "other")


@pytest.mark.parametrize(
    ("gpus", "together"), [(("GPU-aaaa", "GPU-bbbb"), True), pytest.param(("GPU-aaaa",), False, marks=pytest.mark.slow)]
)
def test_backends_run_together_where_each_has_a_gpu(machine, pytester, gpus, together):
    pytester.makepyfile(other=OTHER, test_two=TWO_BACKENDS if together else TWO_BACKENDS.replace("20", "1"))
    result = machine("-m", "gpu", "-p", "other", *BOTH_BACKENDS, gpus=[(gpu, 0) for gpu in gpus])
    result.assert_outcomes(**({"passed": 2} if together else {"failed": 2}))
    leases = record(pytester)["leases"]
    assert {lease["process"] for lease in leases} == {"transformers", "other"}
    assert {lease["index"] for lease in leases} == set(range(len(gpus)))


def test_auto_means_one_worker_per_gpu_and_each_has_its_own(machine, pytester):
    pytester.makepyfile(CROWD)
    result = machine("-m", "gpu", "-n", "auto", gpus=[["GPU-aaaa", 0], ["GPU-bbbb", 0]])
    result.assert_outcomes(passed=8)
    seen = set((pytester.path / "seen.txt").read_text().splitlines())
    assert len(seen) == len({line.split()[1] for line in seen}) == 2
    assert {line.split()[-1] for line in said(result)} == {"(GPU-aaaa)", "(GPU-bbbb)"}


def test_more_workers_than_gpus_take_turns_and_a_killed_one_gives_way(machine, pytester):
    pytester.makepyfile(CROWD)
    (pytester.path / "crash.txt").touch()
    result = machine("-m", "gpu", "-n", "2", "--qvl-gpu-patience", "0")
    assert result.parseoutcomes()["failed"] == 1
    assert result.parseoutcomes()["passed"] == 7
    result.stdout.fnmatch_lines(["*worker 'gw*' crashed while running *test_it*"])


NESTS = """
import os, subprocess, sys
def test_it(qvl_target):
    command = [sys.executable, "-m", "pytest", "-p", "qvl", "-m", "gpu", "--qvl-gpu-patience", "0", "test_inner.py"]
    if "INNER" not in os.environ:
        subprocess.run(command, env={**os.environ, "INNER": "1"}, check=True)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-aaaa"
"""


def test_a_nested_run_uses_its_ancestors_gpu(machine, pytester):
    pytester.makepyfile(test_inner=NESTS)
    machine("-m", "gpu").assert_outcomes(passed=1)


def test_cuda_asked_too_early_leases_what_cuda_computes_on(machine, pytester):
    pytester.makeconftest("import torch\ntorch.cuda.is_available()")
    pytester.makepyfile("def test_it(qvl_target): pass")
    result = machine("-m", "gpu", gpus=[["GPU-aaaa", 8 * GIB], ["GPU-bbbb", 0]])
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        [
            "qvl: this process holds the lease of NVIDIA T4 (GPU-bbbb) but CUDA computes on GPU-aaaa: *; leasing that*",
            "qvl: GPU lease: NVIDIA T4 (GPU-aaaa)",
            "qvl:   busy when it was leased: 8.00 GiB by trainer (pid 7)",
        ]
    )
    assert record(pytester)["leases"][0]["busy"] is True


@pytest.mark.parametrize(
    ("arguments", "environment", "workers"),
    [
        (["-m", "gpu"], {}, 3),
        (["-m", "gpu and not slow"], {}, 3),
        (["--qvl-require-gpu"], {}, 3),
        (["--qvl-device", "cuda"], {}, 3),
        (["-m", "gpu"], {"CUDA_VISIBLE_DEVICES": ""}, 1),
        (["-m", "not gpu"], {}, 11),
        ([], {}, 11),
        (["-m", "gpu"], {"PYTEST_XDIST_AUTO_NUM_WORKERS": "7"}, 7),
    ],
    ids=str,
)
def test_auto_is_answered_only_where_gpus_were_asked_for(pytester, monkeypatch, arguments, environment, workers):
    monkeypatch.setattr("pytest_qvl.gpu.visible.driver", Nvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1,GPU-2,GPU-3")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # What xdist says when it is left to xdist.
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(11))
    monkeypatch.setitem(sys.modules, "psutil", None)
    config = pytester.parseconfigure("-n", "auto", *arguments)
    assert config.hook.pytest_xdist_auto_num_workers(config=config) == workers


# -- --qvl-require-gpu ---------------------------------------------------------------------------------------

REQUIRED = (
    MODEL
    + """
@pytest.mark.gpu
def test_marked(): pass
@pytest.mark.gpu
def test_starts_cuda(): torch.cuda.init()
@pytest.mark.gpu
def test_works(): torch.Tensor(1)
@pytest.mark.gpu
@pytest.mark.xfail(reason="known")
def test_known():
    torch.Tensor(1)
    assert False
def test_not_marked(): torch.Tensor(1)
def test_on_a_model(qvl_lora_model): pass
"""
)


@pytest.mark.parametrize(
    ("selected", "idle"),
    [
        ("works", None),
        pytest.param("known", None, marks=pytest.mark.slow),
        ("on_a_model and cuda", None),
        pytest.param("marked or works", None, marks=pytest.mark.slow),
        ("marked and not not_marked", 1),
        ("starts_cuda or marked", 2),
        ("not_marked", 0),
    ],
)
def test_a_required_gpu_is_one_that_was_seen_to_work(machine, pytester, selected, idle):
    pytester.makepyfile(REQUIRED)
    result = machine("--qvl-require-gpu", "-k", selected)
    assert result.ret == (pytest.ExitCode.OK if idle is None else pytest.ExitCode.TESTS_FAILED)
    line = "qvl: --qvl-require-gpu: no GPU test was executed"
    expected = f"{line}: {idle} marked gpu ran and allocated nothing on CUDA" if idle else line
    assert [one for one in result.outlines if one.startswith(line)] == ([] if idle is None else [expected])


@pytest.mark.parametrize(("selected", "status"), [pytest.param("", 0, marks=pytest.mark.slow), ("marked", 1)])
def test_a_required_gpu_is_counted_over_workers(machine, pytester, selected, status):
    pytester.makepyfile(REQUIRED)
    result = machine("-n", "2", "--qvl-require-gpu", "-k", selected, gpus=(("GPU-aaaa", 0), ("GPU-bbbb", 0)))
    assert result.ret == status


# -- out of memory, and broken for good ----------------------------------------------------------------------

FAILS = """
import pytest, torch
GIB = 1 << 30
def test_a_greedy(qvl_target, qvl_vram):
    kept = torch.Tensor(10 * GIB)
    with qvl_vram.phase("train step"):
        torch.Tensor(7 * GIB)
@pytest.fixture
def roomy(qvl_target): return torch.Tensor(15 * GIB)
def test_b_has_room(roomy): pass
@pytest.mark.xfail
def test_c_known(qvl_target): torch.Tensor(20 * GIB)
@pytest.fixture
def too_big(qvl_target): return torch.Tensor(20 * GIB)
def test_d_set_up(too_big): pass
def test_e_caught(qvl_target):
    with pytest.raises(torch.OutOfMemoryError): torch.Tensor(20 * GIB)
"""


def test_out_of_memory_is_a_verdict_and_the_next_test_has_room(machine, pytester):
    pytester.makepyfile(FAILS)
    result = machine("-m", "gpu", "--junitxml=out.xml", "-rfE", gpus=[["GPU-aaaa", 3 * GIB]])
    result.assert_outcomes(passed=2, failed=1, errors=1, xfailed=1)
    verdict = "out of GPU memory in phase 'train step': 7.00 GiB were asked for; torch holds 10.00 GiB of the card; "
    verdict += "other processes hold 3.00 GiB by trainer (pid 7)"
    set_up = "out of GPU memory in setup: 20.00 GiB were asked for; "
    assert [line.partition("): ")[2] for line in said(result) if "out of GPU" in line][0] == verdict
    result.stdout.fnmatch_lines(
        ["*OutOfMemoryError*", "*- GPU -*", verdict.replace("[", "[[]"), "FAILED *test_a_greedy*"]
    )
    found = record(pytester)["gpu_failures"]
    assert [(f["kind"], f["when"]) for f in found] == [("out of memory", "call"), ("out of memory", "setup")]
    assert found[1]["text"].startswith(set_up)
    xml = ET.parse(pytester.path / "out.xml")
    assert [f.get("message") for f in xml.iter("failure")] == [verdict]
    assert set_up in next(xml.iter("error")).get("message")


BREAKS = """
import pytest, torch
def test_a_fine(qvl_target): pass
def test_b_breaks(qvl_target):
    if qvl_target.device == "cuda":
        torch.cuda.trouble = "CUDA error: device-side assert triggered"
        {how}
def test_c_after(qvl_target): pass
@pytest.mark.gpu
def test_d_own(): raise RuntimeError("a traceback")
"""


@pytest.mark.parametrize("how", ["pass", "torch.cuda.synchronize()"], ids=["unnoticed", "noticed"])
def test_what_breaks_cuda_is_named_and_the_rest_is_not_run(machine, pytester, how):
    pytester.makepyfile(test_x=BREAKS.format(how=how))
    result = machine("-rfE")
    result.assert_outcomes(passed=4, failed=1, errors=2)
    broken = "CUDA error: device-side assert triggered"
    by = "test_x.py::test_b_breaks[embedded-cuda]"
    not_run = f"not run: CUDA was broken by {by}: {broken}"
    assert sum(line == not_run for line in result.outlines) == 2
    assert "a traceback" not in result.stdout.str()
    assert f"qvl: {by} broke CUDA (call): {broken}; 2 later GPU tests were not run" in said(result)
    kinds = [f["kind"] for f in record(pytester)["gpu_failures"]]
    assert sorted(kinds) == ["broken", "not run", "not run"]
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_what_breaks_cuda_in_one_backend_leaves_the_others_results(machine, pytester):
    how = "if qvl_backend == 'other': torch.cuda.synchronize()"
    text = BREAKS.replace('qvl_target.device == "cuda"', 'qvl_backend == "other"').replace(
        "_breaks(", "_breaks(qvl_backend, "
    )
    pytester.makepyfile(other=OTHER, test_x=text.format(how=how).partition("@pytest.mark.gpu")[0])
    result = machine("-m", "gpu", "-p", "other", *BOTH_BACKENDS)
    result.assert_outcomes(passed=4, failed=1, errors=1)
    broken = "test_x.py::test_b_breaks[embedded-cuda-other] broke CUDA (call): CUDA error: device-side assert triggered"
    assert f"qvl: {broken}; 1 later GPU test was not run" in said(result)
    assert sorted(f["kind"] for f in record(pytester)["gpu_failures"]) == ["broken", "not run"]


METERED = (
    MODEL
    + """
def test_it(qvl_lora_model, qvl_vram):
    with qvl_vram.phase("mine"): torch.Tensor(2 * GIB)
"""
)


@pytest.mark.parametrize(
    ("how", "processes"),
    [
        ((), None),
        pytest.param(("-n", "1"), ["gw0"], marks=pytest.mark.slow),
        (("-p", "other", *BOTH_BACKENDS), ["transformers", "other"]),
    ],
    ids=["alone", "worker", "backends"],
)
def test_the_record_has_vram_by_phase_of_every_process(machine, pytester, how, processes):
    pytester.makepyfile(other=OTHER, test_x=METERED)
    machine("-m", "gpu", *how).assert_outcomes(passed=len(processes or [""]))
    vram = record(pytester)["vram"]
    found = [vram] if processes is None else vram["processes"]
    assert processes is None or [one["process"] for one in found] == processes
    for one in found:
        assert one["session"]["allocated"] == 3 * GIB
        assert [(phase["name"], phase["allocated"]) for phase in one["phases"]] == [("mine", 3 * GIB)]


# -- leaks ---------------------------------------------------------------------------------------------------

INNOCENT = """
import pytest, torch
GIB = 1 << 30
@pytest.fixture
def batch(qvl_target): return torch.Tensor(GIB)
@pytest.fixture(scope="module")
def trained(qvl_lora_model): return torch.Tensor(GIB)
@pytest.fixture(scope="module")
def two(trained): return [trained, torch.Tensor(GIB)]
def test_a_fixture(qvl_lora_model, batch): pass
def test_b_module(two): pass
def test_c_garbage(qvl_lora_model):
    circle = [torch.Tensor(GIB)]
    circle.append(circle)
def test_d_fails(qvl_lora_model, batch):
    kept = torch.Tensor(GIB)
    assert kept is None
@pytest.fixture(scope="module")
def raises(qvl_lora_model):
    half = torch.Tensor(GIB)
    raise ValueError("half-way")
def test_e_raises(raises): pass
def test_f_raises_again(raises): pass
@pytest.fixture(scope="module")
def raises_in_a_closure(qvl_lora_model):
    half = torch.Tensor(GIB)
    def inner(): raise ValueError(f"half-way of {half.shape}")
    inner()
def test_g_raises_in_a_closure(raises_in_a_closure): pass
def test_h_raises_again(raises_in_a_closure): pass
def test_i_fails_in_a_closure(qvl_lora_model):
    kept = torch.Tensor(GIB)
    def inner(): assert kept is None
    inner()
"""
LEAKS = """
KEPT = []
def test_g_leaks(qvl_lora_model): KEPT.append(torch.Tensor(2 * GIB))
def test_h_innocent(qvl_lora_model): pass
@pytest.fixture(scope="module")
def broken(qvl_lora_model):
    KEPT.append(torch.Tensor(GIB))
    raise ValueError("half-way")
def test_i_set_up(broken): pass
"""


def test_innocent_tests_leak_nothing_and_the_session_says_so(machine, pytester):
    pytester.makeconftest(MODEL)
    pytester.makepyfile(INNOCENT)
    result = machine("-m", "gpu", "--junitxml=out.xml")
    result.assert_outcomes(passed=3, failed=2, errors=4)
    assert " leaks: " not in result.stdout.str()
    assert "qvl session: leak: kept: all memory of models is free again" in said(result)
    assert record(pytester)["session"] == [
        {"name": "leak", "state": "kept", "text": "all memory of models is free again", "process": ""}
    ]
    cases = ET.parse(pytester.path / "out.xml").iter("testcase")
    assert [list(c) for c in cases if (c.get("classname"), c.get("name")) == ("qvl session", "leak")] == [[]]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_leak_is_named_for_its_test_and_for_the_session(machine, pytester, workers):
    pytester.makeconftest(MODEL)
    pytester.makepyfile(test_x=INNOCENT.partition("def test_d")[0] + LEAKS)
    result = machine("-m", "gpu", "--junitxml=out.xml", *(["-n", str(workers)] if workers else []))
    result.assert_outcomes(passed=5, failed=1, errors=3)
    result.stdout.fnmatch_lines(
        [
            "test_x.py::test_g_leaks[[]embedded-cuda] leaks: 2.00 GiB of GPU memory stayed allocated*, after the test and*",
            "  2.00 GiB held by a tensor 2147483648 of uint8, kept by a list in test_x.KEPT",
            "*test_i_set_up[[]embedded-cuda] leaks: 1.00 GiB of GPU memory stayed allocated*, after a load that failed half-way",
            "*qvl session::leak*",
        ]
    )
    assert result.stdout.str().count(" leaks: ") in (2, 4)
    worker = "gw0: " if workers else ""
    assert any(line.startswith(f"qvl session: leak: BROKEN: {worker}3.00 GiB of GPU memory") for line in said(result))
    result.stdout.fnmatch_lines([f"FAILED qvl session::leak - {worker}3.00 GiB*"])
    xml = ET.parse(pytester.path / "out.xml")
    assert next(xml.iter("failure")).get("message").startswith(f"{worker}3.00 GiB of GPU memory stayed allocated (")
    (verdict,) = record(pytester)["session"]
    assert (verdict["state"], verdict["process"]) == ("BROKEN", "gw0" if workers else "")


LIMITED = """
import pytest, torch
@pytest.mark.limit_vram("1 GiB", of="allocated", scope="session")
@pytest.mark.parametrize("n", range(4))
def test_it(qvl_target, n): torch.Tensor((2 << 30) if n == 0 else 5)
"""


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_session_limit_is_a_verdict_of_the_session(machine, pytester, workers):
    pytester.makepyfile(LIMITED)
    spread = ["-n", "2", "--dist", "each"] if workers else []
    result = machine("-m", "gpu", *spread, gpus=[["GPU-aaaa", 0], ["GPU-bbbb", 0]])
    result.assert_outcomes(passed=4 * (workers or 1), failed=1)
    assert record(pytester)["exit_status"] == result.ret == pytest.ExitCode.TESTS_FAILED
    verdicts = [line for line in said(result) if line.startswith("qvl session: ")]
    assert len(verdicts) == (workers or 1)
    for line in verdicts:
        assert "peak allocated: BROKEN: " in line
        assert "peak allocated 2.00 GiB is 1.00 GiB above the limit of 1.00 GiB in session" in line
    assert f"qvl: vram limits: 0 held, {workers or 1} exceeded, 0 not measured" in said(result)


# -- several backends ----------------------------------------------------------------------------------------


def test_verdicts_of_backends_processes_are_the_runs(machine, pytester):
    pytester.makepyfile(
        other=OTHER,
        test_x=MODEL
        + """
KEPT = []
def test_leaks(qvl_lora_model, qvl_backend):
    if qvl_backend == "other":
        KEPT.append(torch.Tensor(2 * GIB))
@pytest.mark.limit_vram("1.5 GiB", of="allocated", scope="session")
def test_limited(qvl_lora_model): pass
""",
    )
    result = machine("-p", "other", "--qvl-device", "cuda", "--junitxml", "junit.xml", *BOTH_BACKENDS)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    verdicts = {(v["name"], v["process"]): v["state"] for v in record(pytester)["session"]}
    assert verdicts == {
        ("leak", "transformers"): "kept",
        ("leak", "other"): "BROKEN",
        ("peak allocated", "transformers"): "kept",
        ("peak allocated", "other"): "BROKEN",
    }
    assert [lease["process"] for lease in record(pytester)["leases"]] == ["transformers", "other"]
    result.stdout.fnmatch_lines(["qvl: vram limits: 1 held, 1 exceeded, 0 not measured"])
    names = [case.get("name") for case in ET.parse(pytester.path / "junit.xml").iter("testcase")]
    assert sorted(name for name in names if not name.startswith("test_")) == ["leak", "peak allocated"]


@pytest.mark.slow
def test_waiting_in_a_backends_process_is_seen_in_the_one_that_was_started(machine, pytester, holder):
    pytester.makepyfile(other=OTHER, test_x="def test_it(qvl_target): pass")
    result = machine("-p", "other", "--qvl-device", "cuda", "--qvl-gpu-patience", "1", *BOTH_BACKENDS)
    result.assert_outcomes(errors=2)
    for backend in ("transformers", "other"):
        waiting = (
            f"qvl: {backend}: waiting for a GPU (at most 1 s; 0 s so far): NVIDIA T4 (GPU-aaaa) is held by process "
        )
        assert any(line.startswith(f"{waiting}{holder.pid} ") for line in result.outlines)
