"""The oracles against worked examples, bitsandbytes' own dequantization, and arithmetic in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from pytest_qvl.checks.support.layers import text
from pytest_qvl.oracles import attention, elementary, lora, nf4, patches, rotary
from pytest_qvl.oracles.bounds import TAIL, Claim, summed, unit
from pytest_qvl.oracles.chained import chained

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# An error over its limit that is far below this would be a limit that sees nothing.
BLIND = 1e-3


def worst(got: torch.Tensor, claim: Claim) -> float:
    return float(((got.float() - claim.value).abs() / claim.limit).max())


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (6, 33 * 2), (5, 7 * 10)])
def test_packed_bytes_stand_for_the_weights_that_bitsandbytes_makes_of_them(
    double: bool, shape: tuple[int, int]
) -> None:
    import bitsandbytes.functional as functional

    data, state = functional.quantize_4bit(noise(*shape), quant_type="nf4", compress_statistics=double)
    outer: Any = state.state2
    nested = (outer.code, outer.absmax, outer.blocksize, state.offset) if double else ()
    packed = nf4.Packed(data, shape, state.absmax, state.blocksize, *nested)
    theirs = functional.dequantize_4bit(data, state)
    assert torch.equal(nf4.rows(packed, 0, shape[0]), theirs)
    assert torch.equal(nf4.rows(packed, 1, shape[0] - 1), theirs[1:-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", [8, 128, 3584])
def test_a_product_uses_its_limit_and_keeps_it(dtype: torch.dtype, terms: int) -> None:
    x, weight, bias = noise(64, terms, dtype=dtype), noise(48, terms, dtype=dtype, seed=1), noise(48, dtype=dtype)
    exact = x.double() @ weight.double().T + bias.double()
    claim = elementary.linear(x, weight, bias, dtype)
    # Of the same kernel in float32 the error is 0: what shows that the limit is no blind one is the exact result.
    used = [worst(got, claim) for got in (torch.nn.functional.linear(x, weight, bias), exact.to(dtype))]
    assert (BLIND if terms < 1024 else 0) < max(used) <= 1
    dose = 1e-3 if dtype == torch.float32 else 1e-2
    assert worst(((1 + dose) * exact).to(dtype), claim) > 1


def test_the_limit_of_a_long_sum_grows_with_the_root_of_its_terms() -> None:
    assert summed(10) == 10 * 2**-24
    assert summed(4 * 4096) == pytest.approx(2 * summed(4096))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_use_their_limits_and_keep_them(dtype: torch.dtype) -> None:
    x, weight, bias = noise(64, 96, dtype=dtype), noise(96, dtype=dtype, seed=1), noise(96, dtype=dtype, seed=2)
    normed = weight * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).to(dtype)
    assert BLIND < worst(normed, elementary.rms_norm(x, weight, 1e-6, dtype)) <= 1
    once = (weight.float() * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6))).to(dtype)
    assert BLIND < worst(once, elementary.rms_norm(x, weight, 1e-6, dtype, rounded_once=True)) <= 1
    if dtype != torch.float32:
        assert worst(normed, elementary.rms_norm(x, weight, 1e-6, dtype, rounded_once=True)) > 1
    centred = torch.nn.functional.layer_norm(x, (96,), weight, bias, 1e-6)
    assert BLIND < worst(centred, elementary.layer_norm(x, weight, bias, 1e-6, dtype)) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gain", DTYPES, ids=str)
def test_small_numbers_are_rounded_in_absolute_steps_before_a_gain_of_any_dtype(
    dtype: torch.dtype, gain: torch.dtype
) -> None:
    """``prepare_model_for_kbit_training`` makes gains float32; autocast in float16 gives such a norm 16-bit inputs."""
    x = (noise(64, 96) * 10 ** -(8 * torch.rand(64, 96, generator=torch.Generator().manual_seed(3)))).to(dtype)
    weight = noise(96, dtype=gain, seed=1)
    normed = weight * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).to(dtype)
    assert BLIND < worst(normed, elementary.rms_norm(x, weight, 1e-6, normed.dtype)) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "quick_gelu"])
def test_activations_are_those_of_their_names(dtype: torch.dtype, name: str) -> None:
    x = 4 * noise(4096, dtype=dtype)
    theirs = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    }
    got = {key: function(x) for key, function in theirs.items()}
    claim = elementary.activation(name, x)
    exact = theirs[name](x.double()).to(dtype)
    assert BLIND < max(worst(got.pop(name), claim), worst(exact, claim)) <= 1
    assert all(worst(other, claim) > 1 for other in got.values())


def test_what_an_error_makes_of_a_product_behind_it_is_found_by_trying() -> None:
    """Variances of even errors are a third of their limits' squares, and add up times the squares of the weights."""
    x, weight = noise(8, 96), noise(64, 96, seed=1) / 96**0.5
    limit = 0.1 * noise(8, 96, seed=2).abs()
    product = partial(elementary.linear, weight=weight, bias=None, dtype=torch.float32)
    claim = chained(Claim(x, limit), (product,))
    deviation = (limit.square() @ weight.square().T / 3).sqrt()
    own = product(x).limit
    assert torch.equal(claim.value, product(x).value)
    found = (claim.limit - own) / (TAIL * deviation)
    assert float(found.square().mean()) == pytest.approx(1, abs=0.05)
    assert 0.6 < float(found.min()) < float(found.max()) < 1.4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [64, 2048])
def test_a_chain_sees_as_much_of_many_terms_as_of_few(dtype: torch.dtype, width: int) -> None:
    x = noise(8, width, dtype=dtype)
    weights = [(noise(width, width, seed=seed) / width**0.5).to(dtype) for seed in (1, 2)]
    first, second = (partial(elementary.linear, weight=w.float(), bias=None, dtype=dtype) for w in weights)
    ones = torch.ones(width, dtype=dtype)
    behind = (first, partial(elementary.activation, "gelu", dtype=dtype), second)
    claim = chained(elementary.rms_norm(x, ones, 1e-6, dtype), behind)
    normed = elementary.rms_norm(x, ones, 1e-6, dtype).value.to(dtype)
    inner = torch.nn.functional.gelu(normed @ weights[0].T)
    # Of float32 the same kernel's error is far below any: there it is the dose that shows that the limit sees.
    assert (100 * BLIND if dtype == torch.bfloat16 else 0) < worst(inner @ weights[1].T, claim) <= 1
    dose = 0.1 if dtype == torch.bfloat16 else 1e-2
    inner = torch.nn.functional.gelu((1 + dose) * normed @ weights[0].T)
    assert worst(inner @ weights[1].T, claim) > 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eager", [False, True])
def test_attention_uses_its_limit_and_keeps_it(dtype: torch.dtype, eager: bool) -> None:
    query, key, value = (noise(heads, 40, 32, dtype=dtype, seed=heads) for heads in (8, 2, 4))
    value = value[:2]
    allowed = attention.causal(torch.ones(1, 40, dtype=torch.bool), 40)[0]
    keys, values = (each.repeat_interleave(4, dim=0) for each in (key, value))
    scaling = 32**-0.5
    mask = torch.where(allowed, 0.0, -torch.inf)
    exact = ((query.double() @ keys.double().mT) * scaling + mask).softmax(-1) @ values.double()
    if eager:
        scores = (query @ keys.mT) * scaling + torch.where(allowed, 0.0, torch.finfo(dtype).min).to(dtype)
        got = scores.softmax(-1, dtype=torch.float32).to(dtype) @ values
    else:
        got = torch.nn.functional.scaled_dot_product_attention(query[None], keys[None], values[None], is_causal=True)[0]
    claim = attention.attention(query, key, value, allowed, scaling, eager=eager)
    assert BLIND < max(worst(got, claim), worst(exact.to(dtype), claim)) <= 1
    other = attention.attention(query, key, value, allowed, 1.05 * scaling, eager=eager)
    assert worst(got, other) > 1


def test_a_causal_query_sees_itself_and_attended_tokens_before_it() -> None:
    seen = attention.causal(torch.tensor([[False, True, True, True]]), 2)
    assert seen[0].tolist() == [[False, True, True, False], [False, True, True, True]]
    seen = attention.causal(torch.ones(1, 4, dtype=torch.bool), 4, window=2)
    assert seen[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_frequencies_go_to_axes_by_runs_or_in_turn() -> None:
    assert rotary.axis_of_each_frequency((1, 2, 2), interleaved=False) == [0, 1, 1, 2, 2]
    assert rotary.axis_of_each_frequency((4, 2, 2), interleaved=True) == [0, 1, 2, 0, 1, 2, 0, 0]


def test_rotation_leaves_the_product_of_a_pair_to_the_distance_of_their_positions() -> None:
    query, key = noise(16), noise(16, seed=1)
    axes = rotary.axis_of_each_frequency((8,), interleaved=False)

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        positions = torch.full((3, 1, 1), position)
        cosines, sines = rotary.turned(rotary.text_angles(positions, 100.0, axes), 100.0, torch.float32)
        return rotary.rotated(x, cosines.value[0, 0], sines.value[0, 0])

    assert float(turned(query, 5) @ turned(key, 2)) == pytest.approx(
        float(turned(query, 13) @ turned(key, 10)), abs=1e-4
    )
    assert abs(float(turned(query, 5) @ turned(key, 3)) - float(turned(query, 5) @ turned(key, 2))) > 1e-2


def test_windows_follow_each_other_row_by_row_and_are_cut_at_the_edges() -> None:
    laid = patches.patches([(1, 4, 6)], merge=2, window=2)
    assert laid.order == [0, 1, 3, 4, 2, 5]
    assert (laid.windows, laid.frames) == ([16, 8], [24])
    assert laid.positions[:5] == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2)]
    assert laid.positions[16] == (0, 4)
    plain = patches.patches([(2, 2, 4), (1, 2, 2)], merge=2, window=None)
    assert (plain.order, plain.windows, plain.frames) == ([0, 1, 2, 3, 4], [], [8, 8, 4])


def test_learned_positions_are_bilinear_between_the_corners_of_the_table() -> None:
    table = noise(9, 8)
    relative = [(row / 4, column / 4) for row in range(5) for column in range(5)]
    image = table.view(1, 3, 3, 8).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(image, size=(5, 5), mode="bilinear", align_corners=True)
    claim = patches.with_learned_positions(torch.zeros(25, 8), table, relative)
    assert worst(wanted[0].permute(1, 2, 0).reshape(25, 8), claim) <= 1
    assert worst(1.001 * wanted[0].permute(1, 2, 0).reshape(25, 8), claim) > 1


def test_small_learned_positions_are_rounded_in_absolute_steps() -> None:
    table, embedded = ((1e-6 * noise(rows, 8, seed=rows)).half() for rows in (9, 4))
    claim = patches.with_learned_positions(embedded, table, [(0.25, 0.5), (0.25, 0.75), (0.75, 0.5), (0.75, 0.75)])
    assert worst((claim.value - embedded.float()).half() + embedded, claim) <= 1


def test_scaling_of_lora_and_of_rslora() -> None:
    assert lora.scaling_of(16, 8, rank_stabilised=False) == 2
    assert lora.scaling_of(16, 4, rank_stabilised=True) == 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_adapters_add_is_their_sum(dtype: torch.dtype) -> None:
    x, base = noise(32, 64, dtype=dtype), noise(32, 48, dtype=dtype, seed=3)
    pairs = [lora.Matrices(noise(4, 64, seed=s) / 8, noise(48, 4, seed=s + 9) / 2, None, 2.0) for s in (1, 2)]
    got = base
    for pair in pairs:
        got = got + (x.float() @ pair.down.T @ pair.up.T * pair.scaling).to(dtype)
    assert worst(got, lora.adapted(x, base, None, pairs, dtype)) <= 1
    assert worst(got, lora.adapted(x, base, None, pairs[:1], dtype)) > 1


def test_half_a_step_of_each_dtype() -> None:
    assert [unit(dtype) for dtype in DTYPES] == [2**-24, 2**-8, 2**-11]


def test_attention_in_slices_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (noise(4, 30, 16, seed=seed) for seed in range(3))
    allowed = attention.causal(torch.ones(1, 30, dtype=torch.bool), 30)[0]
    whole = attention.attention(query, key, value, allowed, 0.25, eager=False)
    monkeypatch.setattr(attention, "ELEMENTS", 7 * 30)
    sliced = attention.attention(query, key, value, allowed, 0.25, eager=False)
    for one, other in zip(whole, sliced, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at_once", [1, 2**24])
def test_rows_of_a_decode_step_are_more_heads(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(text, "KEYS_AT_ONCE", at_once)
    query, keys, values = noise(3, 6, 1, 16), noise(3, 2, 30, 16, seed=1), noise(3, 2, 30, 16, seed=2)
    allowed = noise(3, 1, 30, seed=3) > 0
    attend = partial(attention.attention, scaling=0.25, eager=False)
    claims = list(text._one_query_a_row(query, keys, values, allowed, attend))
    for row, claim in enumerate(claims):
        alone = attend(query[row], keys[row], values[row], allowed[row])
        assert all(map(torch.equal, claim, alone))
    assert len(claims) == 3
    assert not list(text._one_query_a_row(query[:, :, :0], keys, values, allowed[:, :0], attend))
