"""Settings of torch that change what a product is computed in: all exact inside the block, all as before after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_qvl.checks.support.layers.exact import exact_products

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MATMUL = torch.backends.cuda.matmul
NEWER = hasattr(MATMUL, "fp32_precision")


def readings() -> list[Any]:
    """Every setting, with what reading it raises in its place."""
    read: list[Callable[[], Any]] = [
        torch.get_float32_matmul_precision,
        torch._C._get_cublas_allow_bf16_reduced_precision_reduction,
        lambda: MATMUL.allow_tf32,
        lambda: torch.backends.cudnn.allow_tf32,
    ]
    if NEWER:
        read += [lambda: MATMUL.fp32_precision, lambda: torch.backends.cudnn.conv.fp32_precision]
    found = []
    for each in read:
        try:
            found.append(each())
        except RuntimeError as error:
            found.append(type(error))
    return found


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    with exact_products():
        yield


def set_newer(value: str) -> None:
    MATMUL.fp32_precision = value


def set_sums(value: bool) -> None:
    MATMUL.allow_bf16_reduced_precision_reduction = value


@pytest.mark.parametrize(
    ("change", "value"),
    [
        (torch.set_float32_matmul_precision, "high"),
        (torch.set_float32_matmul_precision, "medium"),
        (set_sums, False),
        (set_sums, True),
        pytest.param(set_newer, "tf32", marks=pytest.mark.skipif(not NEWER, reason="needs torch 2.9")),
    ],
)
def test_settings_of_either_interface_are_put_back(change: Callable[[Any], None], value: Any) -> None:
    change(value)
    before = readings()
    with exact_products():
        if NEWER:
            assert MATMUL.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert not MATMUL.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
        assert not MATMUL.allow_bf16_reduced_precision_reduction
    assert readings() == before


def test_autocast_is_off_inside() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with exact_products():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
