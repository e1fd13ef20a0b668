"""The one-kernel digest on CUDA is the digest that the CPU computes."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA: no CUDA device is visible")
    return torch


def test_digests_on_cuda_equal_those_on_the_cpu(torch):
    from pytest_qvl.models.fingerprint import digests

    torch.manual_seed(0)
    tensors = {f"bytes {n}": torch.randint(0, 255, (n,), dtype=torch.uint8) for n in (1, 7, 8, 9, 2**18 + 3, 2**20)}
    tensors |= {
        "float": torch.randn(33, 5),
        "bf16": torch.randn(1000).bfloat16(),
        "strided": torch.randn(64, 64)[:, ::3],
    }
    on_cuda = {}
    for name, tensor in tensors.items():
        moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
        on_cuda[name] = moved.copy_(tensor)
    assert digests(on_cuda.items()) == digests(tensors.items())


def test_one_changed_byte_of_a_large_tensor_is_seen(torch):
    from pytest_qvl.models.fingerprint import digests

    tensor = torch.zeros(2**26 + 5, dtype=torch.uint8, device="cuda")
    before = digests([("t", tensor)])
    for place in (0, 2**25, 2**26 + 4):
        tensor[place] = 1
        assert digests([("t", tensor)]) != before
        tensor[place] = 0
    assert digests([("t", tensor)]) == before
