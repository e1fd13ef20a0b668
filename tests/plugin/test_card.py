"""``--qvl-card``: what is set on a GPU, once and undone; said in the header and the record; forecast on the CPU."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from pytest_qvl.promises import PROMISES
from pytest_qvl.session.device import Device
from pytest_qvl.session.errors import UserError
from pytest_qvl.session.gpu_access import GpuAccess
from pytest_qvl.vram.cap import allocator_bytes
from pytest_qvl.vram.cards import card
from pytest_qvl.vram.meter import Meter

GiB = 1024**3
T4 = card("t4")
SIMULATED = (
    "memory cap of Tesla T4 simulated on CUDA: the allocator may reserve 14.03 GiB (14.56 GiB less 546 MiB for the CUDA "
    "context), attention kernels efficient, math"
)


class Gpu:
    """What torch is asked to do on a GPU of ``total`` bytes."""

    def __init__(self, monkeypatch, total):
        import torch

        self.asked = []
        # Leasing a GPU and starting CUDA on it is the business of test_gpu_session.py.
        monkeypatch.setattr(GpuAccess, "need_cuda", lambda access: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=0: (total, total))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device=0: 1.0, raising=False)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *asked: self.asked.append(asked))

    def kernels(self):
        import torch

        cuda = torch.backends.cuda
        enabled = {
            "flash": cuda.flash_sdp_enabled(),
            "efficient": cuda.mem_efficient_sdp_enabled(),
            "math": cuda.math_sdp_enabled(),
            "cudnn": cuda.cudnn_sdp_enabled(),
        }
        return {name for name, on in enabled.items() if on}


@pytest.fixture
def gpu(monkeypatch, with_torch):
    return Gpu(monkeypatch, 140 * GiB)


@pytest.fixture
def device(pytestconfig):
    def make(chosen):
        settings = SimpleNamespace(card=chosen, gpu_patience=0.0, source=lambda name: "--qvl-card")
        meter = Meter()
        made = Device(settings, GpuAccess(pytestconfig, settings, meter, print), meter)
        made.meter = meter
        return made

    return make


def test_a_card_is_set_up_once_and_undone(gpu, device):
    before, simulating = gpu.kernels(), device(T4)
    assert gpu.asked == []
    simulating.set_up()
    simulating.set_up()
    assert gpu.asked == [(allocator_bytes(T4) / (140 * GiB), 0)]
    assert gpu.kernels() == {"efficient", "math"}
    assert simulating.meter.context == T4.context_bytes
    assert simulating.default_dtype("cuda") == "float16"
    assert simulating.default_dtype("cpu") == "bfloat16"
    simulating.close()
    assert gpu.asked[1:] == [(1.0, 0)]
    assert gpu.kernels() == before


def test_without_a_card_the_kernels_of_the_gpu_itself_are_pinned(gpu, device):
    before, plain = gpu.kernels(), device(None)
    plain.set_up()
    assert gpu.kernels() == {"flash", "efficient", "math"}
    assert gpu.asked == []
    assert plain.meter.context is None
    assert plain.default_dtype("cuda") == "bfloat16"
    plain.close()
    assert gpu.kernels() == before


def test_a_card_bigger_than_the_gpu_is_refused_and_nothing_is_set(monkeypatch, with_torch, device):
    gpu = Gpu(monkeypatch, 8 * GiB)
    before, too_big = gpu.kernels(), device(T4)
    with pytest.raises(
        UserError, match="--qvl-card: t4 has 14.03 GiB for the allocator and this GPU only 8.00 GiB"
    ) as a:
        too_big.set_up()
    with pytest.raises(UserError) as b:
        too_big.set_up()
    assert a.value is b.value  # so that the session points from the second test to the first
    too_big.close()
    assert (gpu.asked, gpu.kernels()) == ([], before)


def test_a_card_bigger_than_the_gpu_is_one_clear_error(monkeypatch, with_torch, pytester):
    Gpu(monkeypatch, 8 * GiB)
    pytester.makepyfile(
        """
        def test_a(qvl_target): pass
        def test_b(qvl_target): pass
        """
    )
    result = pytester.runpytest_inprocess("--qvl-card", "t4", "--qvl-device", "cuda")
    result.assert_outcomes(errors=2)
    said = [line for line in result.outlines if "t4 has 14.03 GiB for the allocator and this GPU only" in line]
    assert len([line for line in said if line.startswith("E ") or not line.startswith("ERROR")]) == 1
    result.stdout.fnmatch_lines(["*not run: see the error of *test_a*"])


ON_BOTH = """
    import pytest
    def test_dtype(qvl_compute_dtype, qvl_card, qvl_target):
        print("DTYPE", qvl_target.device, qvl_compute_dtype, qvl_card)
    def test_request(_qvl_load_request): pass
"""


def test_the_header_and_the_record_say_what_is_simulated(gpu, pytester):
    pytester.makepyfile(ON_BOTH)
    result = pytester.runpytest_inprocess("-s", "--qvl-card", "T4", "--qvl-record", "out.json", "-k", "dtype")
    result.stdout.fnmatch_lines(["qvl: model embedded (default), card t4 (--qvl-card)*", f"qvl: {SIMULATED}"])
    result.stdout.fnmatch_lines_random(["*DTYPE cpu bfloat16 t4", "*DTYPE cuda float16 t4"])
    record = json.loads((pytester.path / "out.json").read_text(encoding="utf-8"))
    assert "card t4 (--qvl-card)" in record["settings"]
    assert SIMULATED in record["settings"]
    assert "memory cap" not in pytester.runpytest_inprocess("--qvl-card", "t4", "--qvl-device", "cpu").stdout.str()


def test_a_dtype_that_the_card_lacks_is_refused_where_the_card_is_simulated(gpu, pytester, real_stack):
    pytester.makeconftest(
        """
        import pytest
        @pytest.fixture(scope="session")
        def qvl_compute_dtype(): return "bfloat16"
        """
    )
    pytester.makepyfile(ON_BOTH)
    result = pytester.runpytest_inprocess("--qvl-card", "t4", "-k", "request")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["qvl_compute_dtype: t4 has no bfloat16 *; use float16 or auto"])


SUITE = ("--pyargs", "pytest_qvl.suite", "-k", "forecast_fits_card", "-rs")


@pytest.mark.slow
def test_the_suite_forecasts_for_the_card_on_the_cpu(pytester, run_real):
    result = run_real(*SUITE, dtype="auto")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*not judged: forecast_fits_card: no card was named: --qvl-card t4 forecasts for one"])
    result = run_real(*SUITE, "--qvl-card", "t4", dtype="auto")
    result.assert_outcomes(passed=1)
    promise = next(promise for promise in PROMISES if "forecast_fits_card" in promise.checks)
    partly = f"partly judged  (1 of {len(promise.checks)} checks)"
    result.stdout.fnmatch_lines(
        [f"*{promise.number}  {promise.title}*{partly} forecast for Tesla T4 0.* GiB (<= 14.03 GiB)"]
    )
