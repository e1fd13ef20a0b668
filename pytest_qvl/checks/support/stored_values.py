"""A tensor in memory against the one it was made from, bit for bit, piece by piece."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.bitwise import bits_of
from pytest_qvl.models.quantized import dtype_name
from pytest_qvl.oracles.nf4 import CODE_BOOK

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from pytest_qvl.models.sources.stored import Piece, Stored

# Roundings on the longest way of a summand through a mean: sums over pairs of up to 2**32 values, each of them begun
# by a few additions one after the other.
MEAN_ROUNDINGS = 64
FLOAT32_UNIT = 2.0**-24


@dataclass
class Difference:
    """Where a tensor, or a part of a 4-bit weight, is not what was stored.

    Attributes:
        tensor: Dotted name in the base model.
        part: Which part of a 4-bit weight; empty for a plain tensor.
        count: Elements that differ.
        total: Elements in all.
        index: Of the first that differs.
        found: Its value in memory.
        wanted: Its value as stored, after the cast or the quantization.
        zeros: Whether everything that differs is zero in memory.
        factors: Smallest and largest ratio between memory and checkpoint where they differ.
    """

    tensor: str
    part: str
    count: int
    total: int
    index: tuple[int, ...]
    found: float
    wanted: float
    zeros: bool
    factors: tuple[float, float]

    def __str__(self) -> str:
        part = f"its {self.part} differs" if self.part else "differs"
        place = ", ".join(map(str, self.index))
        return (
            f"{self.tensor}: {part} in {self.count:,} of {self.total:,} elements, first at [{place}] "
            f"({self.found:.6g} instead of {self.wanted:.6g})"
        )


@dataclass
class _Comparison:
    """Counts differences over the pieces of one tensor."""

    tensor: str
    part: str
    shape: Sequence[int]
    total: int = 0
    count: int = 0
    first: int = -1
    found: float = 0.0
    wanted: float = 0.0
    zeros: bool = True
    factors: list[float] = field(default_factory=lambda: [math.inf, -math.inf])

    def add(self, start: int, memory: torch.Tensor, stored: torch.Tensor) -> None:
        """Compare the bits of two flat tensors of one dtype."""
        import torch

        self.total += memory.numel()
        if memory.numel() == stored.numel() and torch.equal(bits_of(memory), bits_of(stored)):
            return
        size = min(memory.numel(), stored.numel())
        different = bits_of(memory[:size]) != bits_of(stored[:size])
        here, there = memory[:size][different].double(), stored[:size][different].double()
        self.count += int(different.sum()) + abs(memory.numel() - stored.numel())
        if self.first < 0 and len(here):
            self.first = start + int(different.nonzero()[0])
            self.found, self.wanted = float(here[0]) + 0.0, float(there[0]) + 0.0
        self.zeros = self.zeros and not bool(here.any())
        ratios = (here / there)[there != 0]
        if len(ratios):
            self.factors = [min(self.factors[0], float(ratios.min())), max(self.factors[1], float(ratios.max()))]

    def result(self) -> Difference | None:
        if not self.count:
            return None
        first, index = max(self.first, 0), []
        for side in reversed(self.shape):
            first, place = divmod(first, side) if side else (first, 0)
            index.append(place)
        low, high = self.factors
        return Difference(
            self.tensor, self.part, self.count, self.total, tuple(reversed(index)), self.found, self.wanted,
            self.zeros, (low, high),
        )  # fmt: skip


def compare(name: str, part: str, memory: torch.Tensor, stored: torch.Tensor) -> Difference | None:
    """Compare two whole tensors; of another dtype is different throughout."""
    comparison = _Comparison(name, part, tuple(stored.shape))
    wanted = stored.to(memory.device)
    if memory.dtype != wanted.dtype:
        return Difference(
            name, f"{part or 'data'} ({dtype_name(memory.dtype)} instead of {dtype_name(wanted.dtype)})",
            wanted.numel(), wanted.numel(), (0,), 0.0, 0.0, False, (1.0, 1.0),
        )  # fmt: skip
    comparison.add(0, memory.detach().reshape(-1), wanted.reshape(-1))
    return comparison.result()


def plain_difference(
    name: str, memory: torch.Tensor, stored: Stored, through: Sequence[torch.dtype]
) -> tuple[Difference | None, torch.dtype | None]:
    """Compare a tensor that is not quantized with what is stored, cast to its dtype.

    A cast rounds to the nearest (IEEE 754), so it has one right result. What was cast twice, as after a load in
    float16 and ``prepare_model_for_kbit_training``, has lost in between what the narrower dtype cannot hold; such a
    tensor is compared with the same two casts.

    Args:
        name: Dotted name in the base model.
        memory: The tensor, or its first rows: what is stored behind them is not compared.
        stored: What holds it.
        through: Dtypes that the model was loaded or computes in, which a tensor may have passed.

    Returns:
        Where it differs, if it does; and the dtype in between, if only that explains it.
    """
    direct = _through(name, memory, stored, None)
    if direct is None:
        return None, None
    for between in through:
        if between != memory.dtype and _through(name, memory, stored, between) is None:
            return None, between
    return direct, None


def _through(name: str, memory: torch.Tensor, stored: Stored, between: torch.dtype | None) -> Difference | None:
    flat = memory.detach().reshape(-1)
    comparison = _Comparison(name, "", tuple(memory.shape))
    for start, values in stored.pieces(name):
        own = values[: max(0, flat.numel() - start)].to(flat.device)
        own = own if between is None else own.to(between)
        comparison.add(start, flat[start : start + own.numel()], own.to(flat.dtype))
    return comparison.result()


def dequantized_difference(name: str, memory: torch.Tensor, packed: dict[str, Any]) -> Difference | None:
    """Compare a weight in 16 or 32 bits with the values that a weight stored in 4 bits stands for."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = QuantState.from_dict({k: v for k, v in packed.items() if k != "weight"}, memory.device)
    values = dequantize_4bit(packed["weight"].to(memory.device), state)
    return compare(name, "", memory, values.to(memory.dtype))


def packed_differences(name: str, weight: Any, packed: dict[str, Any]) -> list[Difference | str]:
    """Compare a 4-bit weight with one that was stored in 4 bits: every part, bit for bit."""
    import torch

    state = weight.quant_state
    found: list[Difference | str | None] = [
        compare(name, "packed data", _bytes(weight.data), _bytes(packed["weight"])),
        compare(name, "absmax", state.absmax, packed["absmax"]),
        compare(name, "code book", state.code, packed["quant_map"]),
    ]
    settings: dict[str, tuple[Any, Any]] = {
        "quant_type": (state.quant_type, packed["quant_type"]),
        "blocksize": (state.blocksize, packed["blocksize"]),
        "shape": (tuple(state.shape), tuple(packed["shape"])),
        "double quantization": (bool(state.nested), "nested_absmax" in packed),
    }
    if state.nested and "nested_absmax" in packed:
        offset = torch.tensor(float(packed["nested_offset"]))
        found += [
            compare(name, "nested absmax", state.state2.absmax, packed["nested_absmax"]),
            compare(name, "nested code book", state.state2.code, packed["nested_quant_map"]),
            compare(name, "offset", state.offset.reshape(1), offset.reshape(1)),
        ]
        settings["nested blocksize"] = (state.state2.blocksize, packed["nested_blocksize"])
    return [each for each in (*found, *_settings(name, settings)) if each is not None]


def _settings(name: str, settings: dict[str, tuple[Any, Any]]) -> Iterator[str]:
    for what, (found, wanted) in settings.items():
        if found != wanted:
            yield f"{name}: its {what} is {found} instead of {wanted}"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.detach().contiguous().view(torch.uint8).reshape(-1)


_BY_KERNELS = ("packed data", "absmax", "nested absmax")  # what another device or dtype may give otherwise


class Routes:
    """Where a model's weights were quantized, and from which dtype.

    Usually on the device where they are, from the dtype that their state names. Kernels of a CPU and of a GPU may round
    a tie differently, and a state may name another dtype by now; so the other ways are tried too, until one was right,
    or the first weight was met for which none is.

    Args:
        through: Dtypes that the model was loaded or computes in.
    """

    def __init__(self, through: Sequence[torch.dtype]) -> None:
        self._through = through
        self._right: tuple[torch.device, torch.dtype] | None = None
        self._search = True

    def of(self, weight: Any) -> list[tuple[torch.device, torch.dtype]]:
        """Device and dtype to quantize from, the likeliest first."""
        import torch

        here, named = weight.device, weight.quant_state.dtype
        ways = [] if self._right is None else [self._right]
        ways.append((here, named))
        if self._search:
            ways += [(here, dtype) for dtype in self._through] + [(torch.device("cpu"), named)]
        return list(dict.fromkeys(ways))

    def was_right(self, way: tuple[torch.device, torch.dtype] | None) -> None:
        """Which of them gave the weight, or none."""
        self._search = False
        if way is not None:
            self._right = way


def quantized_differences(
    name: str, weight: Any, shape: tuple[int, ...], stored: Stored, routes: Routes
) -> list[Difference | str]:
    """Compare a 4-bit weight with the stored tensor, quantized once more by bitsandbytes.

    Blocks are quantized one by one, so quantizing in pieces gives the bits of the whole. Only the offset of double
    quantization is a mean over all blocks, whose last bits depend on the order of summation (threads, vector width,
    device): it is held to the mean in float64 within ``64 * 2**-24`` of the mean absmax, and everything that depends
    on it is computed from the offset that the model has, exactly. The code book is held to the paper's table.

    Args:
        name: Dotted name in the base model.
        weight: ``Params4bit`` with its quantization state.
        shape: Shape of the layer's weight.
        stored: What holds the tensor in 16 or 32 bits.
        routes: Where to quantize, and from which dtype.
    """
    first: list[Difference | str] | None = None
    for way in routes.of(weight):
        found = _requantized(name, weight, shape, stored, way)
        if not any(isinstance(each, Difference) and each.part in _BY_KERNELS for each in found):
            routes.was_right(way)
            return found
        first = first or found
    routes.was_right(None)
    return first or []


def _requantized(
    name: str, weight: Any, shape: tuple[int, ...], stored: Stored, way: tuple[torch.device, torch.dtype]
) -> list[Difference | str]:
    import torch
    from bitsandbytes.functional import get_4bit_type, quantize_4bit

    state = weight.quant_state
    device, dtype = way
    memory = _bytes(weight.data)
    comparison = _Comparison(name, "packed data", (memory.numel(),))
    absmax = []
    for start, values in stored.pieces(name, state.blocksize):
        # In one row, as bitsandbytes takes its blocks.
        own, part = quantize_4bit(
            values.to(device).to(dtype)[None], blocksize=state.blocksize, quant_type=state.quant_type
        )
        packed = _bytes(own).to(memory.device)
        comparison.add(start // 2, memory[start // 2 : start // 2 + packed.numel()], packed)
        absmax.append(part.absmax)
    book = torch.tensor(CODE_BOOK) if state.quant_type == "nf4" else get_4bit_type(state.quant_type, device="cpu")
    found: list[Difference | str | None] = [
        comparison.result(),
        compare(name, "code book", state.code, book),
        *_statistics(name, state, torch.cat(absmax)),
        *_settings(name, {"shape": (tuple(state.shape), tuple(shape))}),
    ]
    return [each for each in found if each is not None]


def _statistics(name: str, state: Any, absmax: torch.Tensor) -> Iterator[Difference | str | None]:
    """The block statistics of one weight against ``absmax`` (blocks,) float32."""
    from bitsandbytes.functional import quantize_blockwise

    if not state.nested:
        yield compare(name, "absmax", state.absmax, absmax)
        return
    mean, found = float(absmax.double().mean()), float(state.offset)
    if abs(found - mean) > MEAN_ROUNDINGS * FLOAT32_UNIT * abs(mean):
        yield (
            f"{name}: the offset of its double quantization is {found:.6g} instead of {mean:.6g}, the mean of its "
            "block statistics"
        )
        return
    codes, nested = quantize_blockwise(absmax - state.offset.to(absmax.device), blocksize=state.state2.blocksize)
    yield compare(name, "absmax", state.absmax, codes)
    yield compare(name, "nested absmax", state.state2.absmax, nested.absmax)
    yield compare(name, "nested code book", state.state2.code, nested.code)


def usual_cause(difference: Difference, memory: torch.Tensor, first: Piece, twin: str) -> str:
    """What usually makes such a difference.

    Args:
        difference: What was found.
        memory: The tensor, or the packed data of a 4-bit one.
        first: The first rows of what it should hold.
        twin: Another tensor whose stored values it holds; empty if there is none.
    """
    if twin:
        return f"it holds the values of {twin}: two layers changed places"
    if memory.requires_grad:
        return "it requires grad: it was trained, which no policy names (--qvl-adapter-policy)"
    if difference.zeros and difference.count * 4 >= difference.total:
        return "what differs is zero in memory: its values were lost after they were loaded"
    if said := _by_a_factor(difference):
        return said
    if difference.part == "" and difference.count * 2 > difference.total:
        return _of_most(memory, first.values)
    return _UNKNOWN


def _by_a_factor(difference: Difference) -> str:
    """What it says that all that differs does so by about one factor; empty where it does not."""
    low, high = difference.factors
    if difference.part or difference.count < 2 or not math.isfinite(low) or high - low > 0.02 * abs(high):
        return ""
    if low < 1 < high:  # a factor goes one way
        return (
            "what differs is off by roundings, up and down: something was added and taken away again, as by "
            "merge_adapter() and unmerge_adapter(); load the model again"
        )
    return f"what differs is about {(low + high) / 2:.4g} times what was stored: it was scaled after it was loaded"


_UNKNOWN = "it was written to after it was loaded, or loaded from elsewhere"


def _of_most(memory: torch.Tensor, stored: torch.Tensor) -> str:
    import torch

    width = math.prod(memory.shape[1:])
    here = memory.detach().reshape(-1, width)[: stored.numel() // width].double()
    there = stored.to(memory.device).double().reshape(-1, width)[: len(here)]
    if width > 1 and len(here) > 1:
        if float((here[1:] == there[:-1]).double().mean()) > 0.9:
            return "each of its rows holds the one before it: rows were moved by one"
        if float((here[:-1] == there[1:]).double().mean()) > 0.9:
            return "each of its rows holds the one behind it: rows were moved by one"
    flat = torch.stack([here.reshape(-1), there.reshape(-1)])
    if flat.shape[1] > 2 and abs(float(torch.corrcoef(flat)[0, 1])) < 5 / math.sqrt(flat.shape[1]):
        return "it has nothing in common with what was stored: it was initialised anew, or is another model's"
    return _UNKNOWN
