"""Linear layers, norms, embeddings and the patch embedding: one module each, judged as soon as it has run."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.layers.copies import place_of
from pytest_qvl.checks.support.layers.tally import error_over_limit, multiple
from pytest_qvl.models.anatomy import TOWER
from pytest_qvl.models.layers import VISION_EPS, family_of, has_bias
from pytest_qvl.oracles import elementary, nf4
from pytest_qvl.oracles.bounds import unit

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from pytest_qvl.checks.support.layers.flow import Call
    from pytest_qvl.checks.support.layers.tally import Tally
    from pytest_qvl.models.anatomy import Parts
    from pytest_qvl.oracles.bounds import Claim

ELEMENTS = 2**24
"""Weights, inputs or results that are held in float32 at a time: 64 MiB; with less, a GPU waits for its next call."""
FEW_ROWS = 32
"""Rows for which bitsandbytes may take a kernel without tensor cores, where the length of a row is a multiple of 64."""
PRODUCT_4BIT, PRODUCT_16BIT = "4-bit product", "linear product"
# Names of norms in layers, blocks and mergers; their class says nothing, as kernel packages put their own there.
TEXT_NORMS, TOWER_NORMS = (
    ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm"),
    ("norm1", "norm2", "norm", "ln_q"),
)
# Of numbers so large, whose squares float32 holds and float16 need not, an eps of 1 is 3e-8 of the power.
EPS_LOST = 4096.0
BIAS, BOOK, NORM, EPSILON, EMBEDDING = "bias", "NF4 code book", "norm", "eps of a norm", "embedding"


def packed_of(module: Any) -> nf4.Packed | None:
    """What an NF4 layer of bitsandbytes stores, as the paper names it; None for another type of weight."""
    state = getattr(module.weight, "quant_state", None)
    if state is None or state.quant_type != "nf4":
        return None
    shape = (int(module.out_features), int(module.in_features))
    if not state.nested:
        return nf4.Packed(module.weight.data, shape, state.absmax, state.blocksize)
    outer = state.state2
    nested = (outer.code, outer.absmax, outer.blocksize, state.offset)
    return nf4.Packed(module.weight.data, shape, state.absmax, state.blocksize, *nested)


def weight_rows(module: Any, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a linear layer's weight as its product takes them: NF4 dequantized, and all rounded to its dtype."""
    packed = packed_of(module)
    if packed is None:
        rows: torch.Tensor = module.weight.detach()[start:stop].to(dtype)
        return rows
    return nf4.rows(packed, start, stop).to(dtype)


def judge_linear(tally: Tally, parts: Parts, name: str, call: Call) -> None:
    """``x W' + b`` of one linear layer, in slices of its outputs.

    In one of the dtypes that :func:`_computed_in` says.
    """
    module = call.module
    is_4bit = getattr(module.weight, "quant_state", None) is not None
    if packed_of(module) is None if is_4bit else not module.weight.is_floating_point():
        tally.leave_out(f"{type(module).__name__} that is not NF4", name)
        return
    given, result = call.given.flatten(0, -2), call.made.flatten(0, -2)
    step = max(1, ELEMENTS // module.in_features)
    some = max(1, ELEMENTS // max(module.in_features, min(step, module.out_features)))
    for start, first in product(range(0, module.out_features, step), range(0, len(given), some)):
        stop = min(start + step, module.out_features)
        bias = None if module.bias is None else module.bias.detach()[start:stop]
        x, part = given[first : first + some], result[first : first + some, start:stop]
        claims = (
            elementary.linear(
                _cast(x, casts),
                _cast(weight, casts),
                None if bias is None else _cast(bias, casts),
                casts[-1],
                result=result.dtype,
                products_rounded_to=rounded,
            )
            for casts in _computed_in(module, call, is_4bit=is_4bit)
            for weight, rounded in weights_of_kernels(
                module, start, stop, casts[0], inputs=len(given), fused=x.device.type != "cpu" and len(casts) == 1
            )
        )
        words = partial(_product_words, part, bias)
        tally.hold_to_one(PRODUCT_4BIT if is_4bit else PRODUCT_16BIT, name, part, claims, words)
    expected = has_bias(parts, place_of(name))
    if expected is not None:
        tally.count(BIAS, 1)
        if expected != (module.bias is not None):
            tally.fail(BIAS, name, "has no bias, where the family has one" if expected else "has a bias too many")


def _computed_in(module: Any, call: Call, *, is_4bit: bool) -> list[tuple[torch.dtype, ...]]:
    """What input, weight and bias are cast to, one behind another, before they are multiplied in the last of these.

    A 4-bit layer casts to its compute dtype, and back what comes out. Where it multiplies by ``torch``'s own product
    (on the CPU, and on a GPU wherever no kernel of bitsandbytes is quicker), autocast casts once more. Another layer
    takes the dtype of its weight, or that of autocast, and gives what it makes in it: that tells what ran, whatever
    autocast its own forward brings. What else may have run comes behind, for a forward that casts its result.
    """
    if is_4bit:
        compute = module.compute_dtype or call.given.dtype
        return [(compute,)] if call.autocast in (None, compute) else [(compute, call.autocast), (compute,)]
    return [(dtype,) for dtype in _multiplied_in(module.weight.dtype, call)]


def _multiplied_in(stored: torch.dtype, call: Call) -> dict[torch.dtype, None]:
    """Of a product by ``torch``: the dtype that is likeliest by what it gave, then others."""
    made, usual = call.made.dtype, call.autocast or stored
    told = made if made == stored or unit(made) >= unit(usual) else usual
    return dict.fromkeys((told, usual, stored))


def _cast(values: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
    for dtype in dtypes:
        values = values.to(dtype)
    return values


def weights_of_kernels(
    module: Any, start: int, stop: int, dtype: torch.dtype, *, inputs: int, fused: bool
) -> Iterator[tuple[torch.Tensor, float]]:
    """Weights as each kernel that may have run takes them, and the unit roundoff of its products, 0 for exact ones.

    On the CPU bitsandbytes dequantizes in float32, rounds, and multiplies; on a GPU too, for long inputs. Its fused
    kernels there (0.50, csrc/gemm_4bit_*.cu) compute a block's scale by one multiply-add. The one with tensor cores
    then does the same; the one without, for few inputs and by 0.49 and before for one, rounds code book and scale,
    multiplies those in the dtype, and rounds each product with an input as well.

    Args:
        module: A linear layer.
        start: First of its outputs.
        stop: Output after the last.
        dtype: In which it computes.
        inputs: How many rows it was given.
        fused: Whether it may have been a kernel that does not dequantize first: on a GPU, where autocast casts no more.
    """
    yield weight_rows(module, start, stop, dtype), 0.0
    packed = packed_of(module)
    if packed is None or not fused:
        return
    if packed.outer_code is not None:
        yield nf4.rows(packed, start, stop, fused=True).to(dtype), 0.0
    if dtype.itemsize == 2 and (inputs <= FEW_ROWS or module.in_features % 64):
        yield nf4.rows(packed, start, stop, fused=True, rounded=dtype), unit(dtype)


def _product_words(got: torch.Tensor, bias: torch.Tensor | None, expected: torch.Tensor) -> str:
    if bias is not None:
        away = (got.float() - expected).norm()
        if bool((got.float() - expected + bias.float()).norm() < away / 4):
            return "does not add its bias: it returns x·Wᵀ instead of x·Wᵀ + b"
    off = ((got.float() - expected).abs() > expected.abs() / 2).all(dim=0).nonzero().flatten().tolist()
    if 0 < len(off) <= expected.shape[1] / 2 and not bool(got[:, off].any()):
        return f"leaves {len(off)} of {expected.shape[1]} outputs at 0, output {off[0]} the first: x·Wᵀ + b"
    return f"{multiple(got, expected)}: x·Wᵀ + b"


def judge_code_book(tally: Tally, name: str, module: Any) -> None:
    """The code book that a GPU's kernels look numbers up in, bitwise; the CPU's have it built in."""
    import torch

    state = getattr(module.weight, "quant_state", None)
    if state is None or state.quant_type != "nf4":
        return
    expected = torch.tensor(nf4.CODE_BOOK, dtype=torch.float32, device=state.code.device)
    wrong = (state.code.float() != expected).nonzero().flatten().tolist() if state.code.shape == expected.shape else [0]
    first = f"entry {wrong[0]} of NF4's sixteen" if wrong else ""
    tally.same(BOOK, name, state.code.float(), expected, f"has another number than the paper at {first}")


def is_norm(parts: Parts, place: str) -> bool:
    """Whether a norm without a gate stands in a place of the model, by dotted name."""
    last = place.rpartition(".")[2]
    if parts.group_of(place) in TOWER:
        return last in TOWER_NORMS
    return place == f"{parts.roots['language']}.norm" or (parts.group_of(place) == "language" and last in TEXT_NORMS)


def is_centred(parts: Parts, place: str) -> bool:
    """Whether the norm in a place scales by one more than its weight, and in float32, as a family's backbone may."""
    return bool(family_of(parts).zero_centred_norms) and parts.group_of(place) == "language"


def gain_of(parts: Parts, place: str, norm: Any) -> torch.Tensor:
    """What a norm in a place multiplies by."""
    weight: torch.Tensor = norm.weight.detach()
    return 1 + weight.float() if is_centred(parts, place) else weight


def normed(
    parts: Parts, place: str, module: Any, x: torch.Tensor, dtype: torch.dtype, *, eps: float | None = None
) -> Claim:
    """What an RMS norm, or a layer norm, which has a bias, makes of x.

    Args:
        parts: The model.
        place: Dotted name of the norm, or of a module around it.
        module: The norm.
        x: Its input.
        dtype: Of what it returns.
        eps: Another than that of the place.
    """
    weight, bias = gain_of(parts, place, module), getattr(module, "bias", None)
    eps = norm_epsilon(parts, place) if eps is None else eps
    if bias is None:
        return elementary.rms_norm(x, weight, eps, dtype, rounded_once=is_centred(parts, place))
    return elementary.layer_norm(x, weight, bias.detach(), eps, dtype)


def judge_norm(tally: Tally, parts: Parts, name: str, call: Call) -> None:
    """An RMS or layer norm on its own input."""
    import torch

    place, module, got = place_of(name), call.module, call.made

    def words() -> str:
        if not is_centred(parts, place):
            return ""
        eps, gain = norm_epsilon(parts, place), gain_of(parts, place, module)
        for dtype in (torch.bfloat16, torch.float16):
            rounded = elementary.rms_norm(call.given, gain.to(dtype), eps, got.dtype, rounded_once=True)
            if error_over_limit(got, rounded) <= 1:
                return f"scales by 1 + weight rounded to {str(dtype).removeprefix('torch.')}, not by that of float32"
        return ""

    tally.hold(NORM, name, got, normed(parts, place, module, call.given, got.dtype), words)


def judge_epsilon(tally: Tally, parts: Parts, name: str, module: Any, like: torch.Tensor) -> None:
    """The eps of a norm, by what it makes of numbers as small: of ``±sqrt(eps)`` it halves the power.

    On the activations of a model eps is far below their variance, and a wrong one is lost in 16-bit rounding. What no
    other eps explains, and what is off at :data:`EPS_LOST` too, beside which none counts, counts as a norm.
    """
    import torch

    place = place_of(name)
    width, eps = like.shape[-1], norm_epsilon(parts, place)
    signs = 1 - 2 * (torch.arange(width, device=like.device) % 2)

    def held(size: float) -> tuple[torch.Tensor, torch.Tensor, Claim]:
        x = (signs * size).to(like.dtype)[None]
        got = module(x).detach()
        return x, got, normed(parts, place, module, x, got.dtype)

    x, got, claim = held(eps**0.5)
    if error_over_limit(got, claim) <= 1:
        tally.hold(EPSILON, name, got, claim)
        return
    shift = 0.0 if getattr(module, "bias", None) is None else module.bias.detach().float()
    gains = (got.float() - shift).abs() / gain_of(parts, place, module).float().abs()
    found = float((x.float().square() * (gains**-2 - 1)).nanmedian())
    explained = error_over_limit(got, normed(parts, place, module, x, got.dtype, eps=found)) <= 1
    if explained and error_over_limit(*held(EPS_LOST)[1:]) <= 1:
        tally.hold(EPSILON, name, got, claim, lambda: f"computes as with eps {found:.2g}, not {eps:g}")
    else:
        tally.hold(NORM, name, got, claim)


def norm_epsilon(parts: Parts, name: str) -> float:
    """The eps that a norm of this name has to have."""
    in_tower = parts.group_of(name) in TOWER
    return VISION_EPS if in_tower else float(parts.text_config.rms_norm_eps)


def judge_patch_embedding(tally: Tally, name: str, call: Call) -> None:
    """Each patch times the kernel of the convolution that makes one number per channel of it."""
    projection = call.module.proj
    weight = projection.weight.detach().flatten(1)
    bias = None if projection.bias is None else projection.bias.detach()
    x = call.given.reshape(-1, weight.shape[1]).to(weight.dtype)
    got = call.made.reshape(len(x), -1)
    claims = (
        elementary.linear(
            x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), dtype, result=got.dtype
        )
        for dtype in _multiplied_in(weight.dtype, call)
    )
    tally.hold_to_one("patch embedding", name, got, claims, lambda _expected: "")


def judge_embedding(tally: Tally, name: str, call: Call) -> None:
    """The table's row of each token, every bit of it."""
    words = "returns other rows of its table than those asked for"
    tally.same(EMBEDDING, name, call.made, call.module.weight.detach()[call.given], words)
