"""A GPU's fused 4-bit kernels, redone operation by operation: where they round, and that their own claim allows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pytest_qvl.checks.support.layers.linears import FEW_ROWS, packed_of, weights_of_kernels
from pytest_qvl.checks.support.layers.tally import Tally, error_over_limit
from pytest_qvl.oracles import elementary, nf4

DTYPES = [torch.bfloat16, torch.float16]
SHAPE = (256, 3584)


@pytest.fixture(scope="module")
def module() -> Any:
    """A linear layer in NF4 with double quantization, of as many inputs as a 7B model has."""
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(SHAPE[1], SHAPE[0], bias=False, quant_type="nf4", compress_statistics=True)
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) / SHAPE[1] ** 0.5
    made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    return made.to("cpu")


def inputs(rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn((rows, SHAPE[1]), generator=torch.Generator().manual_seed(1)).to(dtype)


def without_tensor_cores(module: Any, x: torch.Tensor) -> torch.Tensor:
    """gemm_4bit_simt.cu: code book, scale, their product and each product with an input in 16 bits; sums in float32."""
    packed = packed_of(module)
    assert packed is not None
    blocks = torch.arange(packed.absmax.numel())
    scales = nf4.block_scales(packed, blocks, fused=True).to(x.dtype).repeat_interleave(packed.blocksize)
    codes = torch.stack((packed.data.flatten() >> 4, packed.data.flatten() & 15), dim=-1).flatten().long()
    weight = (torch.tensor(nf4.CODE_BOOK).to(x.dtype)[codes] * scales).view(packed.shape)
    return torch.stack([(row * weight).float().sum(-1) for row in x]).to(x.dtype)


def claims(module: Any, x: torch.Tensor, device: str) -> list[Any]:
    kernels = weights_of_kernels(module, 0, SHAPE[0], x.dtype, inputs=len(x), fused=device != "cpu")
    return [elementary.linear(x, weight, None, x.dtype, products_rounded_to=rounded) for weight, rounded in kernels]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_may_be_multiplied_without_tensor_cores(module: Any, dtype: torch.dtype) -> None:
    x = inputs(2, dtype)
    got = without_tensor_cores(module, x)
    usual, fused, few = (error_over_limit(got, claim) for claim in claims(module, x, "cuda"))
    # In float16 the limit of a float32 sum of 3,584 products is larger than all of these roundings.
    assert (dtype == torch.float16) == (min(usual, fused) < 1)
    assert 0.05 < few < 0.9
    tally = Tally()
    assert tally.hold_to_one("product", "here", got, claims(module, x, "cuda"), lambda _expected: "")
    assert tally.operations["product"].worst == (usual if dtype == torch.float16 else few)
    assert error_over_limit(1.05 * got, claims(module, x, "cuda")[2]) > 1


def test_many_rows_may_not_and_the_cpu_has_one_kernel(module: Any) -> None:
    assert len(claims(module, inputs(FEW_ROWS, torch.bfloat16), "cuda")) == 3
    assert len(claims(module, inputs(FEW_ROWS + 1, torch.bfloat16), "cuda")) == 2
    assert len(claims(module, inputs(2, torch.float32), "cuda")) == 2
    assert len(claims(module, inputs(2, torch.bfloat16), "cpu")) == 1


def test_a_scale_of_one_multiply_add_is_a_last_place_off_at_most(module: Any) -> None:
    packed = packed_of(module)
    assert packed is not None
    blocks = torch.arange(packed.absmax.numel())
    apart, together = (nf4.block_scales(packed, blocks, fused=fused) for fused in (False, True))
    assert not torch.equal(apart, together)
    assert float((apart / together - 1).abs().max()) <= 2**-22
