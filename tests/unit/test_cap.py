"""What a card cap asks of torch, with torch's real switches; tests/gpu shows that the cap holds."""

from __future__ import annotations

import pytest

from pytest_qvl.evidence import CannotJudge
from pytest_qvl.vram.cap import allocator_bytes, attention_kernels, capped, compute_dtype, pinned_attention
from pytest_qvl.vram.cards import card

GiB = 1024**3


def test_a_t4_leaves_fourteen_gib_for_the_allocator():
    t4 = card("t4")
    assert 14.0 * GiB < allocator_bytes(t4) < 14.3 * GiB
    assert allocator_bytes(t4) == t4.usable_bytes - t4.context_bytes


@pytest.mark.parametrize(
    ("name", "kernels"),
    [("t4", ("efficient", "math")), ("a100-40gb", ("flash", "efficient", "math"))],
)
def test_attention_kernels_are_those_the_card_has(name, kernels):
    assert attention_kernels(card(name).compute_capability) == kernels


def test_no_generation_uses_a_kernel_that_only_newer_ones_have():
    assert "cudnn" not in attention_kernels((9, 0))
    assert attention_kernels((8, 0)) == attention_kernels((8, 9)) == attention_kernels((9, 0))
    assert attention_kernels((7, 5)) == attention_kernels((7, 0))


@pytest.mark.parametrize("before", [True, False])
def test_kernels_are_pinned_and_put_back(before):
    cuda = pytest.importorskip("torch").backends.cuda

    def switches():
        return (
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
        )

    original = switches()
    cuda.enable_flash_sdp(before)
    cuda.enable_math_sdp(before)
    found = switches()
    try:
        with pinned_attention((7, 5)) as kernels:
            assert kernels == ("efficient", "math")
            assert switches() == (False, True, True, False)
        assert switches() == found
        with pinned_attention((8, 0)):
            assert switches() == (True, True, True, False)
        assert switches() == found
    finally:
        cuda.enable_flash_sdp(original[0])
        cuda.enable_math_sdp(original[2])


def test_compute_dtype_is_what_the_card_has():
    assert compute_dtype(card("t4")) == "float16"
    assert compute_dtype(card("a100-40gb")) == "bfloat16"
    assert compute_dtype(card("t4"), "float32") == "float32"
    assert compute_dtype(card("a100-40gb"), "bfloat16") == "bfloat16"
    with pytest.raises(ValueError, match=r"t4 has no bfloat16 .* use float16 or auto"):
        compute_dtype(card("t4"), "bfloat16")


def test_without_cuda_there_is_nothing_to_cap():
    if pytest.importorskip("torch").cuda.is_available():
        pytest.skip("CUDA is available")
    with (
        pytest.raises(CannotJudge, match="the memory of t4 can only be simulated on a GPU"),
        capped(card("t4")),
    ):
        pytest.fail("must not run")
