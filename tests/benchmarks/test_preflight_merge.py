"""How fast a merged checkpoint is proved, and a base surveyed: bytes a second on weights of true shapes, and peak memory.

The files hold one layer of the 7B's language backbone less its down projection (165 million values), twice: base and merge.
They come from the page cache, so this is the work and not the disk.
"""

from __future__ import annotations

import resource
import sys

import pytest

from pytest_qvl.preflight.files.folder import Folder
from pytest_qvl.preflight.files.headers import read_header
from pytest_qvl.preflight.merged import Place, compare, prove
from pytest_qvl.preflight.survey import _of_weight
from pytest_qvl.preflight.timing import one_thread
from pytest_qvl.preflight.updates import Update
from pytest_qvl.preflight.weights import Weights

SHAPES = {"q_proj": (3584, 3584), "o_proj": (3584, 3584), "gate_proj": (18944, 3584), "up_proj": (18944, 3584)}
RANK, WHOLE = 16, 16.6e9  # bytes of the 7B in 16 bits
ROUNDS = 3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("merge")
    base, merged, adapter = {}, {}, {}
    for name, (rows, columns) in SHAPES.items():
        base[name] = (torch.randn(rows, columns) * 0.02).bfloat16()
        adapter[f"{name}.a"] = torch.randn(RANK, columns) * 0.0096
        adapter[f"{name}.b"] = torch.randn(rows, RANK) * 1e-3
        merged[name] = (base[name].float() + 2 * adapter[f"{name}.b"] @ adapter[f"{name}.a"]).bfloat16()
    for name, tensors in {"base": base, "merged": merged, "adapter": adapter}.items():
        save_file(tensors, folder / f"{name}.safetensors")
    del base, merged, adapter
    return [read_header(Folder(folder), f"{name}.safetensors") for name in ("base", "merged", "adapter")]


def updates(adapter):
    for name in SHAPES:
        yield name, Update(name, "language", adapter[f"{name}.a"], adapter[f"{name}.b"], 2.0, RANK)


def peak_mib():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def test_proof_of_a_merge(benchmark, files):
    import torch

    base, merged, adapter = files
    before, after = Weights(base), Weights(merged)

    def work():
        with torch.no_grad(), one_thread():
            proofs = [prove(u, u.factors(), Place(before, n), Place(after, n)) for n, u in updates(adapter)]
        assert not any(proof.outside for proof in proofs)

    benchmark.pedantic(work, rounds=ROUNDS)
    size = sum(tensor.nbytes for tensor in merged.values())
    speed = size / benchmark.stats.stats.median
    benchmark.extra_info.update(
        megabytes=size / 1e6, megabytes_per_second=speed / 1e6, seconds_for_7b=WHOLE / speed, peak_mib=peak_mib()
    )


def test_tensors_that_are_alike(benchmark, files):
    base = files[0]

    def work():
        assert all(compare(name, tensor, tensor).bytes_equal for name, tensor in base.items())

    benchmark.pedantic(work, rounds=ROUNDS)
    size = sum(tensor.nbytes for tensor in base.values())
    benchmark.extra_info.update(gigabytes_per_second=size / benchmark.stats.stats.median / 1e9, peak_mib=peak_mib())


def test_survey_of_a_base(benchmark, files):
    """Both questions about the adapter's size, from a sample of the rows; 196 modules have an adapter in the 7B."""
    import torch

    base, _, adapter = files
    weights = Weights(base)

    def work():
        with torch.no_grad(), one_thread():
            for name, update in updates(adapter):
                _of_weight(weights, name, update, update.factors())

    benchmark.pedantic(work, rounds=ROUNDS)
    benchmark.extra_info.update(
        milliseconds_per_module=benchmark.stats.stats.median / len(SHAPES) * 1e3, peak_mib=peak_mib()
    )
