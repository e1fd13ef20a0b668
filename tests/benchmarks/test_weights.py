"""Reading the digests of all frozen weights, against the memory's copy bandwidth measured beside it.

A copy of 1 GiB (64 MiB on the CPU) reads and writes: its bytes count twice. On CUDA both times are the device's own, by
events, so that Python's share is seen apart, in the benchmark's seconds.
"""

from __future__ import annotations

import statistics
import time

from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.fingerprint.digests import Fingerprint
from pytest_qvl.models.quantized import base_tensors

ROUNDS = 7
COPIED = {"cpu": 2**26, "cuda": 2**30}


def test_fingerprint_of_frozen_weights(benchmark, qvl_vram, qvl_quantized_model, qvl_target):
    """GB/s, and the share of copy bandwidth."""
    import torch

    device = qvl_target.device
    named = list(base_tensors(anatomy(qvl_quantized_model)))
    size = sum(tensor.numel() * tensor.element_size() for _, tensor in named)
    fingerprint = Fingerprint()
    fingerprint.read(named)

    def read_on_the_device():
        if device == "cpu":
            return fingerprint.read(named)
        return [table.sums() for table in fingerprint._tables.values()]

    copying = _seconds(torch, device, _copy(torch, device))
    reading = _seconds(torch, device, read_on_the_device)

    def work():
        with qvl_vram.phase("fingerprint", settle=False):
            fingerprint.read(named)

    qvl_vram.reclaim("before the first round")
    benchmark.pedantic(work, rounds=ROUNDS)
    copied = 2 * COPIED[device] / copying
    benchmark.extra_info.update(
        tensors=len(named),
        gigabytes=size / 1e9,
        gigabytes_per_second=size / reading / 1e9,
        copy_gigabytes_per_second=copied / 1e9,
        share_of_copy_bandwidth=size / reading / copied,
    )


def _copy(torch, device):
    source = torch.zeros(COPIED[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _seconds(torch, device, work):
    work()
    found = []
    for _ in range(ROUNDS):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            work()
            found.append(time.perf_counter() - started)
    return statistics.median(found)
