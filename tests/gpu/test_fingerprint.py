"""The one-kernel digest on CUDA is the digest that the CPU computes."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.gpu

WORD = 8
BLOCK = 2048 * WORD
STRETCH = 16 * BLOCK
# Around the borders of words, of blocks, and of the stretches that one program reads.
BYTES = [1, 7, 8, 9, 15, 16, 17, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 8, 5 * BLOCK + 3]
BYTES += [STRETCH - 1, STRETCH, STRETCH + 1, STRETCH + 7, STRETCH + 8, 3 * STRETCH + 2 * BLOCK + 5, 2**20]


@pytest.fixture
def tensors(torch):
    torch.manual_seed(0)
    made = {f"{n} bytes": torch.randint(0, 255, (n,), dtype=torch.uint8) for n in BYTES}
    return made | {
        "float": torch.randn(33, 5),
        "bf16": torch.randn(1000).bfloat16(),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0),
        "strided": torch.randn(64, 64)[:, ::3],
        "complex": torch.randn(9, dtype=torch.complex64),
        "conjugate": torch.randn(9, dtype=torch.complex64).conj(),
    }


def test_digests_on_cuda_equal_those_on_the_cpu(torch, tensors):
    from pytest_qvl.models.fingerprint.digests import digests

    on_cuda = {}
    for name, tensor in tensors.items():
        moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
        on_cuda[name] = moved.copy_(tensor)
    assert digests(on_cuda.items()) == digests(tensors.items())


def test_views_that_begin_anywhere(torch):
    from pytest_qvl.models.fingerprint.digests import digests

    octets = torch.randint(0, 255, (5000,), dtype=torch.uint8)
    on_cuda = octets.cuda()
    for start in range(33):
        assert digests([("t", on_cuda[start:])]) == digests([("t", octets[start:])])


def test_one_changed_byte_of_a_large_tensor_is_seen(torch):
    from pytest_qvl.models.fingerprint.digests import digests

    tensor = torch.zeros(2**26 + 5, dtype=torch.uint8, device="cuda")
    before = digests([("t", tensor)])
    for place in (0, 2**25, 2**26 + 4):
        tensor[place] = 1
        assert digests([("t", tensor)]) != before
        tensor[place] = 0
    assert digests([("t", tensor)]) == before


def test_a_fingerprint_that_is_kept_follows_values_and_addresses(torch, tensors):
    from pytest_qvl.models.fingerprint.digests import Fingerprint, digests

    on_cuda = {name: tensor.cuda() for name, tensor in tensors.items()}
    fingerprint = Fingerprint()
    before = fingerprint.read(on_cuda.items())
    table = fingerprint._tables[on_cuda["float"].device]
    assert fingerprint.read(on_cuda.items()) == before
    assert fingerprint._tables[on_cuda["float"].device] is table, "nothing moved, so the table of addresses stays"
    on_cuda["float"].add_(1)
    on_cuda["bf16"] = on_cuda["bf16"].clone()
    del on_cuda["scalar"]
    after = fingerprint.read(on_cuda.items())
    assert after == digests((name, tensor.cpu()) for name, tensor in on_cuda.items())
    assert {name for name in after if after[name] != before[name]} == {"float"}


def test_kept_tables_do_not_keep_tensors(torch):
    from pytest_qvl.models.fingerprint.digests import Fingerprint

    fingerprint = Fingerprint()
    empty = torch.cuda.memory_allocated()
    fingerprint.read([("t", torch.zeros(2**26, dtype=torch.uint8, device="cuda"))])
    assert torch.cuda.memory_allocated() - empty < 2**20
