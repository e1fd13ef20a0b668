"""The oracle of the gated delta rule: its two orders agree, and so does Transformers' own code."""

from __future__ import annotations

import pytest
import torch

from pytest_qvl.oracles import delta

ROWS, LENGTH, HEADS, KEYS, VALUES = 2, 37, 3, 8, 4


def tokens(seed: int = 0, length: int = LENGTH) -> delta.Tokens:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(ROWS, length, HEADS, *shape, generator=generator, dtype=torch.float64)

    return delta.Tokens(
        delta.scaled(delta.of_unit_length(normal(KEYS))),
        delta.of_unit_length(normal(KEYS)),
        normal(VALUES),
        -normal().exp() / 5,
        torch.sigmoid(normal()),
    )


def empty() -> torch.Tensor:
    return torch.zeros(ROWS, HEADS, KEYS, VALUES, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 16, LENGTH, 64])
def test_chunks_are_the_recurrence(size: int) -> None:
    given, state = tokens(), torch.randn(ROWS, HEADS, KEYS, VALUES, generator=torch.Generator().manual_seed(1))
    read, after = delta.recurrent(given, state.double())
    by_chunks, after_chunks = delta.chunked(given, state.double(), size)
    torch.testing.assert_close(by_chunks, read, rtol=0, atol=1e-12)
    torch.testing.assert_close(after_chunks, after, rtol=0, atol=1e-12)


def test_kernels_compute_the_recurrence_too_and_round_where_they_are_told() -> None:
    given, state = tokens(length=150), torch.randn(ROWS, HEADS, KEYS, VALUES).double()
    read, after = delta.recurrent(given, state)
    by_kernel, after_kernel = delta.chunked_by_kernel(given, state, lambda x: x)
    torch.testing.assert_close(by_kernel, read, rtol=0, atol=1e-11)
    torch.testing.assert_close(after_kernel, after, rtol=0, atol=1e-11)
    for dtype, error in ((torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)):
        rounded, _state = delta.chunked_by_kernel(given, state, lambda x, dtype=dtype: x.to(dtype).to(x.dtype))
        off = (rounded - read).norm() / read.norm()
        assert error / 8 < off < 2 * error


def test_a_sequence_may_be_cut_anywhere() -> None:
    given = tokens()
    read, after = delta.recurrent(given, empty())
    first, second = (delta.Tokens(*(each[:, part] for each in given)) for part in (slice(11), slice(11, None)))
    begun, state = delta.recurrent(first, empty())
    rest, end = delta.recurrent(second, state)
    assert torch.equal(torch.cat((begun, rest), dim=1), read)
    assert torch.equal(end, after)
    amounts = delta.held(given, empty()[:, :, 0])
    torch.testing.assert_close(delta.held(second, amounts[:, 10])[:, -1], amounts[:, -1])


def test_one_token_is_read_back_by_its_own_key() -> None:
    """With a share of one, what is written for a key replaces what was there, and reading with the key returns it."""
    given = tokens(length=2)
    same = given._replace(
        key=given.key[:, :1].expand_as(given.key),
        query=given.key[:, :1].expand_as(given.key),
        share=torch.ones_like(given.share),
    )
    read, _ = delta.recurrent(same, empty())
    # A key's length is one but for the eps in its root.
    torch.testing.assert_close(read, given.value, rtol=0, atol=1e-4)


def test_the_state_holds_no_more_than_is_said() -> None:
    given = tokens()
    read, _ = delta.recurrent(given, empty())
    amounts = delta.held(given, empty()[:, :, 0]) * given.query.norm(dim=-1, keepdim=True)
    assert float((read.abs() / amounts).quantile(0.99)) < 3


def test_convolution_and_its_tail() -> None:
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(2, 9, 5, generator=generator), torch.randn(5, 4, generator=generator)
    whole = delta.convolved(x, x.new_zeros(2, 3, 5), weight)
    stock = torch.nn.functional.conv1d(x.mT.double(), weight[:, None].double(), padding=3, groups=5)[..., :9].mT
    torch.testing.assert_close(whole, stock, rtol=0, atol=1e-12)
    torch.testing.assert_close(delta.convolved(x[:, 6:], x[:, 3:6], weight), whole[:, 6:], rtol=0, atol=1e-12)


def test_transformers_computes_the_same() -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    given = tokens()
    single = delta.Tokens(*(each.float() for each in given))
    read, after = delta.recurrent(given, empty())
    raw = (single.query * KEYS**0.5, single.key, single.value)  # it divides by the root of the width itself
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        found, state = getattr(modeling, name)(*raw, g=single.decay, beta=single.share, output_final_state=True)
        torch.testing.assert_close(found.double(), read, rtol=0, atol=2e-6)
        torch.testing.assert_close(state.double(), after, rtol=0, atol=2e-6)
