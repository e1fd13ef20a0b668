"""The meter, the driver and the card cap against a real GPU: the scripted allocator's claims, checked."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import textwrap

import pytest

from pytest_qvl.evidence import CheckFailed
from pytest_qvl.gpu.lease import SESSION_VARIABLE, TOKEN_VARIABLE
from pytest_qvl.gpu.nvml import ProcessMemory, driver
from pytest_qvl.vram.cap import allocator_bytes, capped
from pytest_qvl.vram.cards import card
from pytest_qvl.vram.limit import hold_limit
from pytest_qvl.vram.meter import Meter

pytestmark = pytest.mark.gpu
MiB = 1024**2


@pytest.fixture
def uuid(torch):
    return f"GPU-{torch.cuda.get_device_properties(0).uuid}"


@pytest.fixture
def meter(torch, uuid):
    return Meter(process=ProcessMemory(uuid))


def block(torch, size):
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def test_the_driver_and_torch_mean_the_same_device(torch, uuid):
    properties = torch.cuda.get_device_properties(0)
    gpu = next(g for g in driver().inventory().gpus if g.uuid == uuid)
    assert gpu.name == properties.name
    assert gpu.compute_capability == (properties.major, properties.minor)
    # Torch counts what the driver leaves to processes.
    assert 0 <= gpu.total - torch.cuda.mem_get_info(0)[1] < 0.02 * gpu.total


def test_the_four_numbers(torch, meter):
    keep = block(torch, 100 * MiB)
    with meter.phase("train") as phase:
        more = block(torch, 400 * MiB)
        del more
    usage = phase.usage
    assert usage.allocated - usage.alive_allocated == 400 * MiB
    assert usage.alive_allocated >= keep.nbytes
    assert usage.reserved >= usage.allocated
    assert usage.reserved - usage.alive_reserved == 400 * MiB
    assert usage.process is not None
    # A context takes hundreds of MiB on every card and every driver seen; less would mean it was not counted.
    if usage.process_source == "process":
        assert 100 * MiB < usage.context < 4096 * MiB
        assert usage.fit == usage.reserved + usage.context


def test_an_inner_phase_takes_nothing_from_the_outer(torch, meter):
    with meter.phase("test") as outer:
        held = block(torch, 300 * MiB)
        with meter.phase("inner") as inner:
            del held
            small = block(torch, 20 * MiB)
        del small
    assert outer.usage.allocated - outer.usage.alive_allocated == 300 * MiB
    assert inner.usage.allocated == inner.usage.alive_allocated


def test_numbers_do_not_depend_on_what_ran_before(torch, meter):
    def matmul(size):
        with meter.phase(f"{size}") as phase:
            square = torch.ones(size, size, device="cuda")
            (square @ square).sum().item()
            del square
        return phase.usage.allocated, phase.usage.reserved

    first = [matmul(256), matmul(4096)]
    second = [matmul(4096), matmul(256)]
    assert first == second[::-1]


def test_the_holder_is_a_line_of_the_test(torch, meter, tmp_path):
    def greedy():
        return block(torch, 500 * MiB)

    with meter.phase("call", keep=lambda usage: True) as phase:
        kept = greedy()
        passing = block(torch, 10 * MiB)
        del passing
    assert phase.holders[0].where.endswith(" block")
    assert phase.holders[0].where.startswith("gpu/test_meter.py:")
    assert phase.holders[0].size == 510 * MiB
    (tmp_path / "snapshot.pickle").write_bytes(pickle.dumps(phase.history.snapshot))
    with pytest.raises(CheckFailed, match=r"at the peak 510 MiB in 2 blocks held by gpu/test_meter\.py"):
        hold_limit(phase, MiB, "allocated")
    del kept
    assert not torch._C._cuda_isHistoryEnabled()


def test_a_history_somebody_else_records_is_left_on(torch, meter):
    torch.cuda.memory._record_memory_history("all", max_entries=1000)
    try:
        with meter.phase("call", keep=lambda usage: False):
            pass
        assert torch._C._cuda_isHistoryEnabled()
    finally:
        torch.cuda.memory._record_memory_history(None)


def test_a_card_cap_is_the_cards_memory(torch):
    t4 = card("t4")
    torch.cuda.empty_cache()
    room = allocator_bytes(t4) - torch.cuda.memory_reserved()
    with capped(t4) as cap:
        fits = block(torch, room - 64 * MiB)
        with pytest.raises(torch.OutOfMemoryError):
            block(torch, 128 * MiB)
        assert "cudnn" not in cap.attention
        assert not torch.backends.cuda.flash_sdp_enabled()
        del fits
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info(0)[0] > room + 1024 * MiB:
        block(torch, room + 256 * MiB)
    torch.cuda.empty_cache()


def in_a_fresh_process(code):
    """Run it as nobody's descendant: without the lease that this session holds."""
    environment = {name: value for name, value in os.environ.items() if name not in (TOKEN_VARIABLE, SESSION_VARIABLE)}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_work_that_breaks_cuda_is_charged_to_its_phase(torch):
    done = in_a_fresh_process(
        """
        import torch
        from pytest_qvl.vram.meter import CudaBroken, Meter
        torch.ones(1, device="cuda")
        meter = Meter()
        try:
            with meter.phase("train"):
                torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")]
        except CudaBroken as error:
            print(error)
        with meter.phase("next") as phase:
            pass
        print(phase.usage.reason)
        """
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("CUDA broke in 'train': "), done.stderr
    assert lines[1].startswith("CUDA broke in 'train': ")


def test_a_lease_is_what_cuda_shows(torch, tmp_path):
    done = in_a_fresh_process(
        f"""
        from pathlib import Path
        from pytest_qvl.gpu.errors import LeaseError
        from pytest_qvl.gpu.lease import acquire
        from pytest_qvl.gpu.nvml import Gpu
        from pytest_qvl.gpu.visible import Visible, visible_gpus
        lease = acquire(visible_gpus(), directory=Path({str(tmp_path / "leases")!r}))
        import torch
        lease.verify()
        assert torch.cuda.device_count() == 1
        torch.ones(1, device="cuda")
        lease.verify()
        lease.release()
        with acquire(visible_gpus(), directory=Path({str(tmp_path / "leases")!r})) as again:
            assert again.gpu.uuid == lease.gpu.uuid
        try:
            acquire(Visible((Gpu("GPU-00000000"),)), directory=Path({str(tmp_path / "leases")!r}))
        except LeaseError as error:
            print(error)
        """
    )
    assert "CUDA already runs in this process, on GPU-" in done.stdout, done.stderr


def test_a_lease_taken_too_late_is_noticed(torch, tmp_path):
    done = in_a_fresh_process(
        f"""
        import torch
        torch.cuda.is_available()
        from pathlib import Path
        from pytest_qvl.gpu.errors import LeaseError
        from pytest_qvl.gpu.lease import acquire
        from pytest_qvl.gpu.nvml import Gpu
        from pytest_qvl.gpu.visible import Visible
        lease = acquire(Visible((Gpu("GPU-00000000"),)), directory=Path({str(tmp_path / "leases")!r}))
        torch.ones(1, device="cuda")
        try:
            lease.verify()
        except LeaseError as error:
            print(error)
        """
    )
    assert "but CUDA computes on " in done.stdout, done.stderr
