"""Weights of a checkpoint by today's names: any rows of them in float32, also of those that are packed in 4 bits."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.renamed import in_todays_layout
from pytest_qvl.models.sources.model_source import ModelSourceError
from pytest_qvl.oracles import nf4
from pytest_qvl.preflight.files.values import FLOATS, read_runs, read_whole
from pytest_qvl.preflight.findings import neutral
from pytest_qvl.preflight.packed import STATE, STATE_LIMIT, STATISTICS
from pytest_qvl.preflight.refusals import UnsafeFileError
from pytest_qvl.preflight.rounding import nf4_table

if TYPE_CHECKING:
    import torch

    from pytest_qvl.preflight.files.headers import Tensor


class Weights:
    """The tensors of a checkpoint.

    Args:
        tensors: By the names in its files.

    Raises:
        UnsafeFileError: Two names mean one tensor (``visual.x`` and ``model.visual.x``); releases take either.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            today = in_todays_layout(name)
            if today in self._found:
                other = neutral(self._found[today].name, 160)
                raise UnsafeFileError(
                    f"{neutral(name, 160)} and {other} in {neutral(repr(tensor.file.parent.name), 160)} are one tensor "
                    "by their names, and releases differ in which of them they take"
                )
            self._found[today] = tensor
        self._states = {name.partition(STATE)[0]: name for name in self._found if STATE in name}
        self._scales: dict[str, tuple[dict[str, Any], torch.Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __getitem__(self, name: str) -> Tensor:
        return self._found[name]

    def names(self) -> list[str]:
        """Every tensor of the model; statistics and tables of packed ones are left out."""
        parts = {f"{name}.{part}" for name in self._states for part in STATISTICS}
        return [name for name in self._found if name not in parts and STATE not in name]

    def is_packed(self, name: str) -> bool:
        """Whether it is stored in 4 bits."""
        return name in self._states

    def is_numeric(self, name: str) -> bool:
        """Whether its values can be read as numbers here."""
        return self.is_packed(name) or self._found[name].dtype in FLOATS

    def shape(self, name: str) -> tuple[int, int]:
        """Rows and columns (all further axes in one), of a packed tensor those that it has unpacked.

        Raises:
            ModelSourceError: Its quantization state is not readable.
            CannotJudge: It is packed in FP4.
        """
        if self.is_packed(name):
            rows, columns = self._state(name)["shape"]
            return rows, columns
        shape = self._found[name].shape
        return (shape[0] if shape else 1), math.prod(shape[1:])

    def rows(self, name: str, runs: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """Runs of rows from the first to the one behind the last, each ``(rows, columns)`` float32.

        Raises:
            ModelSourceError: The file has become shorter, or a quantization state is not what bitsandbytes writes.
        """
        columns = self.shape(name)[1]
        if self.is_packed(name):
            return [self._unpacked(name, start, stop) for start, stop in runs]
        flat = read_runs(self._found[name], [(start * columns, stop * columns) for start, stop in runs])
        return [part.view(-1, columns).float() for part in flat]

    def cells(self, name: str, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Between which values a weight that is packed in 4 bits was before: the least and the largest of each element.

        NF4 takes the nearest of its numbers, times the largest magnitude of the block. Where that magnitude was
        quantized too (double quantization), it may be off by half the widest step of its own table.

        Args:
            name: A packed tensor.
            start: First row; has to begin a block.
            stop: The row behind the last.

        Raises:
            ModelSourceError: See :meth:`rows`.
        """
        import torch

        values = self._unpacked(name, start, stop)
        state, scales = self._statistics(name)
        columns, size = state["shape"][1], state["blocksize"]
        blocks = torch.arange(start * columns // size, -(-stop * columns // size))
        scale = scales[blocks].repeat_interleave(size)[: values.numel()].view_as(values)
        book, borders = nf4_table()
        codes = torch.bucketize((values / scale.masked_fill(scale == 0, 1.0)).flatten(), borders)
        bound = torch.cat((book[:1], borders, book[-1:]))
        least, most = (bound[codes + i].view_as(values) * scale for i in (0, 1))
        if "nested_blocksize" in state:
            outer = read_whole(self._part(name, ".nested_absmax")).float()[blocks // state["nested_blocksize"]]
            table = read_whole(self._part(name, ".nested_quant_map")).float().sort().values
            slack = (outer * (table.diff().max() / 2)).repeat_interleave(size)[: values.numel()].view_as(values)
            return least - slack, most + slack
        return least, most

    def close(self, name: str) -> None:
        """Forget what has been kept of a tensor while its rows were read."""
        self._scales.pop(name, None)

    def _unpacked(self, name: str, start: int, stop: int) -> torch.Tensor:
        state, scales = self._statistics(name)
        columns, size = state["shape"][1], state["blocksize"]
        # A run that starts or ends within a block is read from the block's start to its end.
        first = start * columns // size
        last = -(-stop * columns // size)
        end = min(last * size, state["shape"][0] * columns)
        data = read_runs(_as_bytes(self._found[name]), [(first * size // 2, (end + 1) // 2)])[0]
        part = nf4.Packed(data, (1, end - first * size), scales[first:last], size)
        values = nf4.rows(part, 0, 1).flatten()
        return values[start * columns - first * size : stop * columns - first * size].view(stop - start, columns)

    def _statistics(self, name: str) -> tuple[dict[str, Any], torch.Tensor]:
        import torch

        if name not in self._scales:
            state = self._state(name)
            absmax = read_whole(self._part(name, ".absmax")).flatten()
            packed = nf4.Packed(absmax, state["shape"], absmax, state["blocksize"])
            if "nested_blocksize" in state:
                outer = state["nested_blocksize"]
                code, largest = self._part(name, ".nested_quant_map"), self._part(name, ".nested_absmax")
                if absmax.dtype != torch.uint8 or code.numel != 256 or largest.numel != -(-absmax.numel() // outer):
                    raise ModelSourceError(f"the double quantization of {neutral(name, 160)} does not fit its data")
                packed = packed._replace(
                    outer_code=read_whole(code),
                    outer_absmax=read_whole(largest),
                    outer_blocksize=outer,
                    offset=torch.tensor(state["nested_offset"]),
                )
            self._scales[name] = state, nf4.block_scales(packed, torch.arange(absmax.numel()))
        return self._scales[name]

    def _part(self, name: str, part: str) -> Tensor:
        if f"{name}{part}" not in self._found:
            raise ModelSourceError(f"{neutral(name, 160)} is packed in 4 bits and its {part[1:]} is missing")
        return self._found[f"{name}{part}"]

    def _state(self, name: str) -> dict[str, Any]:
        tensor = self._found[self._states[name]]
        said = f"the quantization state of {neutral(name, 160)}"
        if tensor.nbytes > STATE_LIMIT or tensor.dtype != "U8":
            raise ModelSourceError(f"{said} is not what bitsandbytes writes; save the checkpoint again")
        try:
            state = json.loads(bytes(read_whole(tensor).tolist()))
            shape = tuple(state["shape"])
            sizes = [*shape, state["blocksize"], *([state["nested_blocksize"]] if "nested_blocksize" in state else [])]
            offset = float(state.get("nested_offset", 0.0))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ModelSourceError(f"{said} is not readable; save the checkpoint again") from None
        blocks = -(-math.prod(shape) // state["blocksize"]) if _are_sizes(sizes) and len(shape) == 2 else 0
        whole = blocks and state["blocksize"] % 2 == 0 and 2 * self._found[name].nbytes == math.prod(shape)
        kind = state.get("quant_type")
        if kind == "fp4":
            raise CannotJudge(f"{said} says 'fp4'; only NF4 is unpacked here")
        if kind != "nf4":
            raise ModelSourceError(f"{said} says {neutral(repr(kind), 40)}, which bitsandbytes does not write")
        if not whole or self._part(name, ".absmax").numel != blocks or not math.isfinite(offset):
            raise ModelSourceError(f"{said} does not fit its data; save the checkpoint again")
        return {**state, "shape": shape}


def _as_bytes(tensor: Tensor) -> Tensor:
    """Packed data as bytes, whatever dtype they are stored as (``bnb_4bit_quant_storage``)."""
    return replace(tensor, dtype="U8", shape=(tensor.nbytes,))


def _are_sizes(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31 for value in values)
