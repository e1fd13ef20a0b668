"""Values of safetensors files: a bounded number of bytes at a time, where the header says that they are.

Files are read and not mapped: one that becomes shorter meanwhile ends a read, but kills a process that has it mapped.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.sources.model_source import ModelSourceError
from pytest_qvl.preflight.files.folder import MiB
from pytest_qvl.preflight.findings import neutral
from pytest_qvl.preflight.refusals import UnsafeFileError

if TYPE_CHECKING:
    import torch

    from pytest_qvl.preflight.files.headers import Tensor

# Matrices of an adapter are read whole: rank 256 on the vocabulary of Qwen in float32 has 149 MiB.
WHOLE_LIMIT = 512 * MiB
PIECE_BYTES = 16 * MiB
_AHEAD = 8 * MiB  # Linux fetches no more at a time
_NAMES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    **{f"{kind}{bits}": f"{word}{bits}" for kind, word in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
}
FLOATS = ("F64", "F32", "F16", "BF16")
NARROW_FLOATS = ("F8_E4M3", "F8_E5M2")  # of which every value is one of float32


def dtype_of(tensor: Tensor) -> torch.dtype:
    """The dtype that a tensor is stored in.

    Raises:
        ModelSourceError: torch has none such, or packs several numbers into a byte.
    """
    import torch

    if tensor.dtype not in _NAMES:
        raise ModelSourceError(
            f"{neutral(tensor.name, 160)} is stored as {tensor.dtype}, whose values are not read here"
        )
    found: torch.dtype = getattr(torch, _NAMES[tensor.dtype])
    return found


def read_runs(tensor: Tensor, runs: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Flat runs of elements, from the first to the one behind the last, each in the dtype it is stored in.

    Raises:
        UnsafeFileError: More is asked for than may be held at once.
        ModelSourceError: The file has become shorter since its header was read.
    """
    import torch

    dtype = dtype_of(tensor)
    _refuse_large(tensor, sum(stop - start for start, stop in runs) * dtype.itemsize)
    found = []
    for start, stop in runs:
        buffer = torch.empty((stop - start) * dtype.itemsize, dtype=torch.uint8)
        view: Any = buffer.numpy()
        with tensor.file.open("rb", buffering=0) as stream:
            stream.seek(tensor.begin + start * dtype.itemsize)
            _fill(stream, memoryview(view), tensor)
        found.append(buffer.view(dtype))
    return found


def _refuse_large(tensor: Tensor, size: int) -> None:
    if size > WHOLE_LIMIT:
        raise UnsafeFileError(
            f"{neutral(tensor.name, 160)} in {neutral(repr(tensor.file.name), 160)} would need {size / MiB:,.0f} MiB "
            f"at once, which no matrix of an adapter has and no row of a model (at most {WHOLE_LIMIT // MiB})"
        )


class Reader:
    """Reads a tensor from front to back: its file stays open, and the system fetches what comes next meanwhile.

    Args:
        tensor: What to read of.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._dtype = tensor, dtype_of(tensor)
        self._stream = tensor.file.open("rb", buffering=0)
        self._fetched = tensor.begin

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def into(self, buffer: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """A flat run of elements, in the dtype it is stored in, as a view of a buffer.

        Args:
            buffer: Flat, uint8, at least as long as the run.
            start: First element.
            stop: The one behind the last.

        Raises:
            ModelSourceError: The file has become shorter since its header was read.
        """
        width = self._dtype.itemsize
        part = buffer[: (stop - start) * width]
        view: Any = part.numpy()
        self._stream.seek(self._tensor.begin + start * width)
        self._fetch(self._tensor.begin + stop * width)
        _fill(self._stream, memoryview(view), self._tensor)
        return part.view(self._dtype)

    def _fetch(self, position: int) -> None:
        """Ask the system for what is behind a position, half a stretch before it is needed."""
        if hasattr(os, "posix_fadvise") and position + _AHEAD // 2 > self._fetched < self._tensor.end:
            stretch = min(_AHEAD, self._tensor.end - self._fetched)
            os.posix_fadvise(self._stream.fileno(), self._fetched, stretch, os.POSIX_FADV_WILLNEED)
            self._fetched += stretch


def _fill(stream: Any, target: memoryview, tensor: Tensor) -> None:
    done = 0
    while done < len(target):
        count = stream.readinto(target[done:])
        if not count:
            name = neutral(repr(tensor.file.name), 160)
            raise ModelSourceError(f"{name} has become shorter while it was read; download it again")
        done += count


def read_whole(tensor: Tensor) -> torch.Tensor:
    """A whole tensor in its shape.

    Raises:
        UnsafeFileError: It has more bytes than a matrix of an adapter may have.
        ModelSourceError: See :func:`read_runs`.
    """
    return read_runs(tensor, [(0, tensor.numel)])[0].view(tensor.shape)


def pieces(tensor: Tensor, bytes_at_once: int = PIECE_BYTES) -> Iterator[tuple[int, torch.Tensor]]:
    """A tensor from front to back in whole rows: the number of the first row, and rows by columns.

    Every piece is a view of one buffer, which the next one overwrites. A row longer than may be held at once is still
    one piece.

    Raises:
        ModelSourceError: See :meth:`Reader.into`.
    """
    import torch

    rows = tensor.shape[0] if tensor.shape else 1
    columns = math.prod(tensor.shape[1:])
    if not rows * columns:
        return
    width = dtype_of(tensor).itemsize
    step = min(rows, max(1, bytes_at_once // (columns * width)))
    _refuse_large(tensor, step * columns * width)
    buffer = torch.empty(step * columns * width, dtype=torch.uint8)
    with Reader(tensor) as reader:
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            yield start, reader.into(buffer, start * columns, stop * columns).view(stop - start, columns)
