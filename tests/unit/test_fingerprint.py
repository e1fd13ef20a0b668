"""Digests: every single change is seen, in any dtype and layout, and order counts."""

from __future__ import annotations

import hashlib

import pytest
import torch

from pytest_qvl.models.fingerprint.digests import CHUNK_BYTES, Fingerprint, digests

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.complex64,
)


def digest(tensor: torch.Tensor) -> int:
    return digests([("t", tensor)])["t"]


def random_bits(count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, (count,), generator=generator).bool()
    size = torch.empty((), dtype=dtype).element_size()
    return torch.randint(0, 256, (count * size,), dtype=torch.uint8, generator=generator).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 3, 8, 1001])
def test_each_single_bit_counts(dtype: torch.dtype, count: int) -> None:
    tensor = random_bits(count, dtype)
    before = digest(tensor)
    assert before == digest(tensor.clone())
    octets = tensor.view(torch.uint8) if dtype != torch.bool else None
    if octets is None:
        tensor[count // 2] = ~tensor[count // 2]
        assert digest(tensor) != before
        return
    for place in {0, octets.numel() // 2, octets.numel() - 1}:
        octets[place] ^= 1
        assert digest(tensor) != before
        octets[place] ^= 1
    assert digest(tensor) == before


def test_order_counts_even_where_a_sum_would_not_see_it() -> None:
    values = torch.arange(64, dtype=torch.int64)
    seen = {digest(values.roll(shift)) for shift in range(64)}
    assert len(seen) == 64
    high_bits = torch.zeros(4, dtype=torch.int64)
    # Differences in the top bit alone cancel under odd position multipliers; a bijective mix keeps them
    # apart.
    two = {digest(high_bits.index_fill(0, torch.tensor(pair), -(2**63))) for pair in ([0, 1], [0, 2], [1, 3])}
    assert len(two) == 3


def test_flipped_signs_do_not_cancel() -> None:
    """The top bit of a word is where a multiplication passes nothing on: the hardest pair of changes to see."""
    values = torch.randn(2**13, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = digests((str(i), value) for i, value in enumerate(values))
    flipped = digests((str(i), -value) for i, value in enumerate(values))
    moved = [(flipped[name] - plain[name]) % 2**64 for name in plain]
    assert len({*moved, *(2**64 - step for step in moved)}) == 2 * len(values)


def test_swapping_rows_of_packed_weights_is_seen() -> None:
    packed = random_bits(128 * 64, torch.uint8).view(128, 64)
    swapped = packed[[1, 0, *range(2, 128)]]
    assert digest(packed) != digest(swapped)


def test_dtype_and_shape_count() -> None:
    bits = torch.zeros(8, dtype=torch.int16)
    others = (bits.view(torch.bfloat16), bits.view(torch.float16), bits.view(2, 4), bits.view(torch.int32))
    assert len({digest(bits), *map(digest, others)}) == 5


def test_negative_zero_and_nan_payloads_are_bits_like_any_other() -> None:
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))
    assert digest(torch.tensor([float("nan")])) == digest(torch.tensor([float("nan")]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.float64])
def test_layout_does_not_count(dtype: torch.dtype) -> None:
    tensor = random_bits(60 * 70, dtype).view(60, 70)
    for view in (tensor.t(), tensor[::2, 3:], tensor.expand(2, 60, 70), tensor.flatten()[1:]):
        assert digest(view) == digest(view.contiguous().clone())


def test_many_small_tensors_are_each_what_they_are_alone() -> None:
    """They are mixed many at a time; the third does not fit into the chunk of the first two."""
    counts = (1, 17, CHUNK_BYTES - 8, 3, 0, 24, 5 * 2**20, 5 * 2**20)
    named = [(f"{n} {count}", random_bits(count, torch.uint8, n)) for n, count in enumerate(counts)]
    assert digests(named) == {name: digest(tensor) for name, tensor in named}


def test_reading_again_sees_values_and_tensors_that_changed() -> None:
    tensors = {name: random_bits(33, torch.bfloat16, seed) for seed, name in enumerate("abc")}
    fingerprint = Fingerprint()
    before = fingerprint.read(tensors.items())
    assert fingerprint.read(tensors.items()) == before
    tensors["a"].view(torch.uint8)[5] ^= 1
    tensors["b"] = tensors["b"].clone()
    tensors["c"] = tensors["c"].float()
    after = fingerprint.read(tensors.items())
    assert {name for name in after if after[name] != before[name]} == {"a", "c"}
    assert after == digests(tensors.items())


def test_chunks_join_without_a_seam() -> None:
    tensor = random_bits(CHUNK_BYTES // 4 * 2 + 17, torch.float32)
    before = digest(tensor)
    for place in (CHUNK_BYTES // 4 - 1, CHUNK_BYTES // 4, tensor.numel() - 1):
        octets = tensor.view(torch.uint8)
        octets[place * 4] ^= 128
        assert digest(tensor) != before
        octets[place * 4] ^= 128
    halves = tensor.view(torch.int32).clone()
    first, second = halves[:16].clone(), halves[CHUNK_BYTES // 4 : CHUNK_BYTES // 4 + 16].clone()
    halves[:16], halves[CHUNK_BYTES // 4 : CHUNK_BYTES // 4 + 16] = second, first
    assert digest(halves.view(torch.float32)) != before


def test_a_strided_tensor_longer_than_a_chunk() -> None:
    wide = random_bits(CHUNK_BYTES // 2, torch.bfloat16).view(-1, 2)
    assert digest(wide.t()) == digest(wide.t().contiguous())


def test_empty_and_scalar_tensors() -> None:
    found = digests([("empty", torch.empty(0)), ("scalar", torch.tensor(1.5)), ("one", torch.tensor([1.5]))])
    assert len(set(found.values())) == 3


def test_parameters_and_names_keep_their_order() -> None:
    module = torch.nn.Linear(3, 2)
    found = digests(module.named_parameters())
    assert list(found) == ["weight", "bias"]
    assert all(0 <= value < 2**64 for value in found.values())
    assert found["bias"] == digest(module.bias.detach().clone())


def test_digests_do_not_collide_by_chance() -> None:
    many = digests((str(seed), random_bits(2, torch.int16, seed)) for seed in range(2000))
    distinct = {tuple(random_bits(2, torch.int16, seed).tolist()) for seed in range(2000)}
    assert len(set(many.values())) == len(distinct)


def test_equals_its_definition_written_out_in_plain_integers() -> None:
    """Wrapping products, logical shifts and the padded last word, without torch."""
    tensor = random_bits(37, torch.bfloat16)
    raw = bytes(tensor.view(torch.uint8).tolist())
    words = [int.from_bytes(raw[at : at + 8].ljust(8, b"\0"), "little") for at in range(0, len(raw), 8)]
    expected = int.from_bytes(hashlib.blake2b(b"torch.bfloat16 (37,)", digest_size=8).digest(), "little")
    for position, word in enumerate(words, start=1):
        mixed = (word + position * 0x9E3779B97F4A7C15) % 2**64
        mixed ^= mixed >> 32
        for multiplier in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
            mixed = mixed * multiplier % 2**64
            mixed ^= mixed >> 32
        expected += mixed
    assert digest(tensor) == expected % 2**64


def test_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match="w is on the meta device"):
        digests([("w", torch.empty(3, device="meta"))])
    with pytest.raises(ValueError, match="two tensors are called 'w'"):
        digests([("w", torch.zeros(1)), ("w", torch.zeros(1))])
